"""The toy world: the same files every time, true maps, and classes that no single frame tells."""

import numpy as np

import data


def scene(motion, i):
    rng = np.random.default_rng([9, i])
    turns = rng.uniform(size=(1, 3))
    turns = turns + np.array(data.MOTIONS[motion]) * np.arange(data.LENGTH)[:, None] / data.LENGTH
    return data.draw_scene(rng, rng.choice(data.KINDS), turns)


def test_two_renderings_give_the_same_files(toy, tmp_path):
    data.make_toy(tmp_path / "again", groups=4, images=(64, 16), labelled=3)
    files = [path.relative_to(toy) for path in toy.rglob("*") if path.is_file()]
    assert len(files) > 300
    for path in files:
        assert (tmp_path / "again" / path).read_bytes() == (toy / path).read_bytes(), path


def test_depth_and_classes_agree_with_the_pixels():
    """Where the large object is seen, the pixels have its color, the maps its distance and kind."""
    for i in range(12):
        objects = scene("Slope", i)
        pixels, depth, classes, first = data.render(objects)
        large = objects[-1]
        assert first.any() and (classes[first] == data.MAPS.index(large["kind"])).all()
        distance = np.broadcast_to(large["place"][:, 2, None, None], depth.shape)
        assert np.allclose(depth[first], distance[first])
        inner = first.copy()  # not its edge, where colors are averaged
        for axis in (1, 2):
            inner &= np.roll(first, 1, axis) & np.roll(first, -1, axis)
        shade = pixels[inner] / 255 / np.maximum(large["color"], 1e-9)  # one light for all channels
        assert inner.any() and np.ptp(shade, axis=1).max() < 0.06
        assert (depth[(classes == 1) & ~first] == data.BACK).all()


def test_a_mirrored_or_reversed_clip_is_one_of_its_class():
    """It moves along the same axes, within the same swings."""
    for motion, axes in data.MOTIONS.items():
        place = scene(motion, 3)[-1]["place"]
        for changed in (place, place * [-1, 1, 1], place[::-1]):
            assert (np.ptp(changed, axis=0) > 1e-9).tolist() == [bool(axis) for axis in axes]
            assert np.abs((changed - data.CENTER) / data.SWING).max() <= 1 + 1e-9


def test_one_frame_does_not_tell_the_class():
    """A ridge regression on any one frame is at chance, within two standard errors."""
    rng, names = np.random.default_rng(0), list(data.MOTIONS)
    frames, labels = [], np.arange(600) % 6
    for i, label in enumerate(labels):
        objects = scene(names[label], i)
        pixels = data.render([dict(o, place=o["place"][[12]]) for o in objects])[0]
        frames.append(pixels[0].reshape(12, 4, 12, 4, 3).mean((1, 3)).ravel() / 255)
    x, y, order = np.stack(frames), np.eye(6)[labels], rng.permutation(600)
    train, test = order[:400], order[400:]
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    square = x[train].T @ x[train] + 300 * np.eye(x.shape[1])
    weights = np.linalg.solve(square, x[train].T @ y[train])
    right = ((x[test] @ weights).argmax(1) == labels[test]).mean()
    assert abs(right - 1 / 6) < 2 * np.sqrt(1 / 6 * 5 / 6 / 200), right

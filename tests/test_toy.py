"""The toy world: the same files every time, true maps, and classes that no single frame tells."""

import numpy as np
import pytest

import data


@pytest.fixture
def scene(monkeypatch):
    """scene(motion, i) -> objects of a clip, (kind, color, radius, place), as they are drawn."""
    def drawn(motion, i):
        caught = []
        with monkeypatch.context() as patched, pytest.raises(TypeError):
            patched.setattr(data, "render", caught.append)  # returns nothing: no file is written
            data.write_toy((None, f"{motion}/x", [9, i]))
        return caught[0]
    return drawn


def test_two_renderings_give_the_same_files(toy, tmp_path):
    data.make_toy(tmp_path / "again", groups=4, images=(64, 16), labelled=3)
    files = [path for path in toy.rglob("*") if path.is_file()]
    assert len(files) > 300
    for path in files:
        assert (tmp_path / "again" / path.relative_to(toy)).read_bytes() == path.read_bytes(), path


def test_depth_and_classes_agree_with_the_pixels(scene):
    """Where the large object is seen, the pixels have its color, the maps its distance and kind."""
    for i in range(12):
        *_, (kind, color, _, place) = objects = scene("Slope", i)
        pixels, depth, classes, first = data.render(objects)
        assert first.any() and (classes[first] == data.MAPS.index(kind)).all()
        distance = np.broadcast_to(place[:, 2, None, None], depth.shape)
        assert np.allclose(depth[first], distance[first])
        inner = first.copy()  # not its edge, where colors are averaged
        for step in (1, -1):
            inner &= np.roll(first, step, 1) & np.roll(first, step, 2)
        shade = pixels[inner] / 255 / np.maximum(color, 1e-9)  # one light for all channels
        assert inner.any() and np.ptp(shade, axis=1).max() < 0.06
        assert (depth[(classes == 1) & ~first] == data.BACK).all()


def test_one_frame_does_not_tell_the_class(scene):
    """A ridge regression on any one frame is at chance, within two standard errors."""
    frames, labels = [], np.arange(600) % 6
    for i, label in enumerate(labels):
        objects = scene(list(data.MOTIONS)[label], i)
        pixels = data.render([(*look, place[[12]]) for *look, place in objects])[0]
        frames.append(pixels[0].reshape(12, 4, 12, 4, 3).mean((1, 3)).ravel() / 255)
    x, y = np.stack(frames), np.eye(6)[labels]
    train, test = np.split(np.random.default_rng(0).permutation(600), [400])
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    square = x[train].T @ x[train] + 300 * np.eye(x.shape[1])
    weights = np.linalg.solve(square, x[train].T @ y[train])
    right = ((x[test] @ weights).argmax(1) == labels[test]).mean()
    assert abs(right - 1 / 6) < 2 * np.sqrt(1 / 6 * 5 / 6 / 200), right

"""The project as its reader meets it: reading order, shape comments, headers, README."""

import ast
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import finetune
import mae_image
import mae_video
import masking
import multimae
import omni
from conftest import ROOT, TINY_IMAGE

ORDER = ["masking", "data", "mae_image", "mae_video", "omni", "multimae", "finetune"]
FILES = [ROOT / f"{name}.py" for name in ORDER if (ROOT / f"{name}.py").exists()]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_imports_only_from_files_to_its_left(path):
    tree, place = ast.parse(path.read_text()), ORDER.index(path.stem)
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            root = name.split(".")[0]
            if root in ORDER:
                assert ORDER.index(root) < place, f"{path.name} imports {root}"
            else:
                known = {"torch", "torchvision", "av", "numpy", "PIL"} | set(sys.stdlib_module_names)
                known |= {"safetensors"} if path.stem == "finetune" else set()  # if it is installed
                assert root in known, f"{path.name} imports {root}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_opens_with_what_to_run_and_what_to_read_next(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert (
        doc.startswith(f"{path.name} - ")
        and f"python {path.name}" in doc
        and "Next  " in doc
        and "arXiv" in doc + "arXiv" * (path.stem == "data")
    )
    assert max(len(line) for line in path.read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_is_imported_or_defined_that_is_not_used(path):
    text = path.read_text()
    later = "".join(p.read_text() for p in FILES if p != path) + "".join(
        p.read_text() for p in (ROOT / "tests").glob("*.py")
    )
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                name = (a.asname or a.name).split(".")[0]
                assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{path.name} imports {name} for nothing"
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert len(re.findall(rf"\b{node.name}\b", text)) > 1 or re.search(rf"\b{node.name}\b", later), (
                f"{path.name}: {node.name}"
            )


COMMENT = re.compile(r"^\s*(\w+) = .*#.*?(?<!\w)\((\w[^()\[\]]*,[^()\[\]]*)\)")


def check_shapes(path, letters, call):
    """Trace call(); after each line `name = ...  # (B, K, D)` compare the tensor `name` with the comment.

    Names stand for an argument of the function (or its u), else for `letters`, else for a local variable.
    Returns the lines that were checked."""
    wanted = {i: m.groups() for i, line in enumerate(path.read_text().splitlines(), 1) if (m := COMMENT.match(line))}
    checked, before = set(), {}

    def look(frame, line):
        name, shape = wanted[line]
        value = frame.f_locals.get(name)
        if not torch.is_tensor(value):
            return
        whole = {k: v for k, v in frame.f_locals.items() if isinstance(v, int)}
        # u is a function's own: frames of a cube, or those of it that are painted
        given = {k: v for k, v in whole.items() if k in ("u", *frame.f_code.co_varnames[: frame.f_code.co_argcount])}
        known = {**whole, **letters, **given}
        try:
            want = tuple(int(eval(part, {}, known)) for part in shape.split(","))
        except (NameError, SyntaxError):
            return
        assert tuple(value.shape) == want, (
            f"{path.name}:{line}: {name} is {tuple(value.shape)}, the comment says ({shape})"
        )
        checked.add(line)

    def trace(frame, event, _):
        if frame.f_code.co_filename != str(path):
            return None
        if (line := before.pop(id(frame), None)) in wanted:
            look(frame, line)
        if event == "line":
            before[id(frame)] = frame.f_lineno
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(old)
    return checked


def test_shape_comments_of_the_image_model_are_true():
    model = mae_image.MAE((16, 24), 4, (36, 1, 3), (20, 1, 4))
    mask = masking.random_mask(2, model.grid, 0.75, torch.Generator())
    letters = dict(B=2, C=3, H=16, W=24, p=4, h=4, w=6, N=24, K=6, M=18, D=36, E=20, P=48)
    imgs = torch.randn(2, 3, 16, 24)
    checked = check_shapes(
        ROOT / "mae_image.py",
        letters,
        lambda: (model(imgs, mask), mae_image.reconstruct(model, imgs, mask)),
    )
    checked |= check_shapes(
        ROOT / "masking.py", letters, lambda: masking.random_mask(2, (1, 4, 6), 0.75, torch.Generator())
    )
    assert len(checked) >= 15, sorted(checked)


@pytest.mark.parametrize("kind", [mae_video.VideoMAE, mae_video.MAEST])
def test_shape_comments_of_the_video_models_are_true(kind):
    model = kind(6, (16, 24), 2, 4, (36, 1, 3), (20, 1, 4))
    mask = masking.tube_mask(2, model.grid, 0.75, torch.Generator())
    P = 96 if kind is mae_video.VideoMAE else 48
    letters = dict(B=2, C=3, T=6, H=16, W=24, u=2, p=4, t=3, h=4, w=6, N=72, K=18, M=54, D=36, E=20, P=P)
    clips = torch.randn(2, 3, 6, 16, 24)
    checked = check_shapes(
        ROOT / "mae_video.py", letters, lambda: (model(clips, mask), mae_image.reconstruct(model, clips, mask))
    )
    assert len(checked) >= 10, sorted(checked)


def test_shape_comments_of_the_joint_model_are_true():
    model = omni.OmniMAE(6, (16, 24), 2, 4, (36, 1, 3), (20, 1, 4))
    clips, imgs = torch.randn(2, 3, 6, 16, 24), torch.randn(2, 3, 16, 24)
    masks = [masking.random_mask(2, g, 0.75, torch.Generator(), "hide") for g in ((1, 4, 6), model.grid)]
    letters = dict(B=2, C=3, T=6, H=16, W=24, u=2, p=4, t=3, h=4, w=6, N=72, K=18, M=54, D=36, E=20, P=96)
    checked = check_shapes(ROOT / "omni.py", letters, lambda: (model(clips, masks[1]), model.encode(clips)))
    checked |= check_shapes(ROOT / "omni.py", {**letters, "N": 24, "K": 6, "M": 18}, lambda: model(imgs, masks[0]))
    assert len(checked) >= 2, sorted(checked)


def test_shape_comments_of_the_multimodal_model_are_true():
    model = multimae.MultiMAE(16, 8, (36, 1, 3), (20, 1, 4), classes=5, class_width=4)
    inputs = {
        "rgb": torch.randn(2, 3, 16, 16),
        "depth": torch.randn(2, 1, 16, 16),
        "semseg": torch.zeros(2, 4, 4).long(),
    }
    mask = masking.dirichlet_mask(2, [4, 4, 4], 5, torch.Generator())
    letters = dict(B=2, C=3, H=16, W=16, N=4, K=5, D=36, E=20)
    checked = check_shapes(ROOT / "multimae.py", letters, lambda: model(inputs, mask))
    assert len(checked) >= 6, sorted(checked)


def test_shape_comments_of_the_classifier_and_the_other_masks_are_true():
    model = finetune.Classifier(mae_video.MAEST(6, (16, 24), 2, 4, (36, 1, 3), (20, 1, 4), cls=False), 5)
    letters = dict(B=2, D=36, N=72, t=3, h=4, w=6)
    checked = check_shapes(ROOT / "finetune.py", letters, lambda: model(torch.randn(2, 3, 6, 16, 24)))
    assert len(checked) >= 2, sorted(checked)

    for mask, grid, N in ((masking.tube_mask, (3, 4, 6), 24), (masking.frame_mask, (8, 4, 6), 8)):
        letters = dict(B=2, N=N, t=8, h=4, w=6)  # N tokens are ranked: one for each tube, or for each frame
        assert len(check_shapes(ROOT / "masking.py", letters, lambda: mask(2, grid, 0.75, torch.Generator()))) >= 3
    draw = lambda: masking.dirichlet_mask(2, [24, 24, 24], 12, torch.Generator())
    assert len(check_shapes(ROOT / "masking.py", dict(B=2, N=72, modalities=3, size=24), draw)) >= 4


def test_a_stale_shape_comment_is_noticed(tmp_path):
    path = tmp_path / "stale.py"
    path.write_text("def f(x):\n    y = x[:, 0]  # (B, N, D)\n    return y\n")
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    with pytest.raises(AssertionError, match="stale.py:2"):
        check_shapes(path, dict(B=2, N=3, D=4), lambda: scope["f"](torch.zeros(2, 3, 4)))


# ---- README ---------------------------------------------------------------------------------------------------


def test_every_picture_of_the_readme_exists_and_every_asset_is_shown():
    shown = set(re.findall(r"\((assets/[^)]+)\)", README)) | set(re.findall(r'src="(assets/[^"]+)"', README))
    assert shown == {str(p.relative_to(ROOT)) for p in (ROOT / "assets").iterdir()} and shown
    for name in shown:
        Image.open(ROOT / name).verify()


def test_links_inside_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) >= 10 and [t for t in targets if not (ROOT / t).exists()] == []


def test_line_counts_in_the_readme_are_about_right():
    counts = dict(re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \| (\d+)", README))
    assert set(counts) == {p.name for p in FILES}
    for name, lines in counts.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 15, name


def commands():
    """python commands in the README's code blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(("python ", "torchrun "))})


PRETRAINING = ("mae_image.py", "mae_video.py", "omni.py", "multimae.py")


@pytest.fixture(scope="module")
def small_run(toy, tmp_path_factory):
    """small_run(script) -> checkpoint of the smallest run there is, made once."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "toy").symlink_to(toy)

    def make(script):
        path = folder / "runs" / script.removesuffix(".py") / "checkpoint.pt"
        if not path.exists():
            flags = [*TINY_IMAGE, *([] if script == "multimae.py" else ["--frames", 4])]
            if script == "finetune.py":
                flags = ["--init", make("mae_video.py"), "--workers", 0, "--clips", 1]
            command = [sys.executable, ROOT / script, *flags, "--data", "toy", "--smoke"]
            subprocess.run(list(map(str, command)), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return path

    return make


def before_finetuning(small_run, folder, words):
    """Put the checkpoint that a command of finetune.py starts from where it looks for it."""
    path = words[words.index("--init") + 1] if "--init" in words else "runs/mae_video/checkpoint.pt"
    scripts = {"runs/omni": "omni.py", "runs/multimae": "multimae.py", "runs/finetune": "finetune.py"}
    script = scripts.get(path.removesuffix("/checkpoint.pt"), "mae_video.py")
    (folder / path).parent.mkdir(parents=True)
    shutil.copy(small_run(script), folder / path)


SLOW = ("tests", "data.py toy", "pip", "venv", "pytest", "benchmark")


@pytest.mark.parametrize("command", [c for c in commands() if not any(s in c for s in SLOW)])
def test_a_readme_command_runs(command, run, toy, tmp_path, clips_by_name, small_run):
    """As printed, with --smoke and small widths in place of hours; the data folders are small ones of the same layout."""
    words = shlex.split(command)
    (tmp_path / "toy").symlink_to(toy)
    clips_by_name(tmp_path, words)
    if words[0] == "torchrun":
        words = [w for w in words[1:] if not w.startswith("--nproc")]
    else:
        words = words[1:]
    small = []
    if words[0] in PRETRAINING:
        small = [*map(str, TINY_IMAGE), "--smoke", "--size", "nano"]
        small += ["--frames", "4"] if words[0] in ("mae_video.py", "omni.py") else []
        small += ["--data", "toy"] if "cifar10" in words else []  # no network
    if words[0] == "finetune.py":
        small = ["--smoke", "--workers", "0", "--batch", "4", "--clips", "1", "--crops", "1"]
        before_finetuning(small_run, tmp_path, words)
    run(*words, *small, env={"TORCHDYNAMO_DISABLE": "1"})  # --compile is accepted, machine code is not made


def test_the_python_lines_of_the_readme_run(toy, tmp_path, monkeypatch, run):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(next((toy / "videos").rglob("*.mp4")), tmp_path / "clip.avi")
    run("mae_video.py", "--data", toy, "--smoke", "--workers", 0)
    monkeypatch.chdir(tmp_path)
    exec(code, scope := {})
    assert scope["tokens"].shape == (1, 256, 96) and scope["x"].shape == (1, 3, 8, 64, 64)


@pytest.fixture
def clips_by_name(toy):
    """Make the folders that README commands name: UCF101, HMDB51, my_images, my_videos."""

    def make(folder, words):
        source = sorted((toy / "videos/Still").glob("*.mp4"))
        names = [f"{path.stem}.avi" for path in source]
        for root in {"UCF101", "UCF101-128", "HMDB51"} & set(words) - ({"UCF101-128"} if "shrink" in words else set()):
            ucf = root != "HMDB51"
            videos = folder / root / ("UCF-101/Still" if ucf else "hmdb51_org/wave")
            lists = folder / root / ("ucfTrainTestlist" if ucf else "testTrainMulti_7030_splits")
            videos.mkdir(parents=True)
            lists.mkdir()
            for name, path in zip(names, source):
                (videos / name).write_bytes(path.read_bytes())
            for fold in (1, 2, 3):
                if ucf:
                    (lists / "classInd.txt").write_text("1 Still\n")
                    (lists / f"trainlist0{fold}.txt").write_text("".join(f"Still/{n} 1\n" for n in names * 3))
                    (lists / f"testlist0{fold}.txt").write_text(f"Still/{names[0]}\n")
                else:
                    text = f"{names[0]} 2\n" + "".join(f"{n} 1\n" for n in names[1:] * 3)
                    (lists / f"wave_test_split{fold}.txt").write_text(text)
        if "clip.avi" in words:
            (folder / "clip.avi").write_bytes(source[0].read_bytes())
        for name, part in (("my_images", "rgb/train"), ("my_videos", "videos")):
            if name in words:
                (folder / name).symlink_to(toy / part)

    return make

"""The project as its reader meets it: order of the files, size, shape comments, README."""

import ast
import io
import re
import shlex
import shutil
import sys
import tokenize

import pytest
import torch
from PIL import Image

import claims
import finetune
import mae_image
import mae_video
import masking
import multimae
import omni
from conftest import ROOT, TINY_IMAGE, TINY_VIDEO

ORDER = ["masking", "data", "mae_image", "mae_video", "omni", "multimae", "finetune"]
FILES = [ROOT / f"{name}.py" for name in ORDER]
README = (ROOT / "README.md").read_text()
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@each_file
def test_a_file_imports_only_from_files_before_it(path):
    allowed = {"torch", "torchvision", "av", "numpy", "PIL"} | set(sys.stdlib_module_names)
    allowed |= set(ORDER[: ORDER.index(path.stem)])
    allowed |= {"safetensors"} if path.stem == "data" else set()  # if it is installed
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed


@each_file
def test_a_file_opens_with_what_to_run_and_what_to_read_next(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc.startswith(f"{path.name} - ") and f"python {path.name}" in doc and "Next  " in doc
    assert "arXiv" in doc or path.stem == "data"


@each_file
def test_nothing_is_imported_or_defined_that_is_not_used(path):
    text = path.read_text()
    later = "".join(p.read_text() for p in [*FILES, *(ROOT / "tests").glob("*.py")] if p != path)
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                name = (a.asname or a.name).split(".")[0]
                assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{path.name} imports {name}"
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            used = len(re.findall(rf"\b{node.name}\b", text)) > 1
            assert used or re.search(rf"\b{node.name}\b", later), f"{path.name}: {node.name}"


def test_the_house_does_not_grow():
    """Lines, tokens and what makes code dense. Whoever needs more takes something away first."""
    lines, tokens, kinds = [], 0, []
    for path in FILES:
        text = path.read_text()
        lines.append(len(text.splitlines()))
        assert max(map(len, text.splitlines())) <= 100 and "fmt: skip" not in text, path.name
        kinds += [type(node).__name__ for node in ast.walk(ast.parse(text))]
        skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        tokens += sum(t.type not in skip for t in tokenize.generate_tokens(io.StringIO(text).readline))
    assert sum(lines) <= 5260 and max(lines) <= 1210 and tokens <= 40_800
    counts = {kind: kinds.count(kind) for kind in ("Lambda", "IfExp", "Raise", "Try")}
    assert all(counts[k] <= n for k, n in dict(Lambda=10, IfExp=90, Raise=75, Try=20).items()), counts


def test_the_reading_path_of_the_readme_is_short():
    """From an image file to the optimiser, what the README lists has at most 650 lines."""
    (part,) = re.findall(r"<!-- path -->\n(.*?)<!-- end -->", README, re.S)
    wanted, total = set(re.findall(r"`(\w+)`", part)), 0
    for path in FILES[:3]:
        for node in ast.parse(path.read_text()).body:
            if getattr(node, "name", None) in wanted:
                wanted.remove(node.name)
                total += node.end_lineno - node.lineno + 1
    assert not wanted and 400 < total <= 650


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
    options = {} if kind is mae_video.VideoMAE else {"cls": False}
    model = kind(6, (16, 24), 2, 4, (36, 1, 3), (20, 1, 4), **options)
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
    checked = check_shapes(ROOT / "omni.py", letters, lambda: model(clips, masks[1]))
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


# ---- README ----------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 240


def test_every_picture_of_the_readme_exists_and_every_asset_is_named():
    named = set(re.findall(r"\((assets/[^)]+)\)", README))
    assert named == {str(p.relative_to(ROOT)) for p in (ROOT / "assets").iterdir()} and named
    for name in named:
        assert (ROOT / name).stat().st_size < 1_000_000
        if not name.endswith(".bib"):
            Image.open(ROOT / name).verify()


def test_links_and_files_that_are_named_exist():
    texts = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "tests").glob("*.md")]}
    for path, text in texts.items():
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert [x for x in links if not (path.parent / x).exists()] == []
        scripts = set(re.findall(r"python ((?:tests/)?\w+\.py)", text))
        assert [x for x in scripts if not (ROOT / x).exists()] == []


def test_claims_and_flags_that_are_named_exist():
    text = README + "".join(path.read_text() for path in (ROOT / "tests").glob("*.md"))
    for asked in re.findall(r"--only ([A-Z]\d[A-Z\d,]*)", text):
        assert set(asked.split(",")) <= set(claims.CLAIMS)
    known = "".join(p.read_text() for p in [*FILES, ROOT / "tests/claims.py", ROOT / "tests/benchmark.py"])
    others = {"nproc_per_node", "index-url", "help"}  # torchrun's, pip's, argparse's
    for flag in set(re.findall(r"`[^`\n]*?--(?:no-)?([a-z][a-z0-9-]+)", text)) - others:
        assert re.search(rf"^    {flag.replace('-', '_')}: |--{flag}\"", known, re.M), flag


def test_line_counts_in_the_readme_are_right():
    counts = dict(re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \| (\d+)", README))
    assert set(counts) == {path.name for path in FILES}
    for name, lines in counts.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 5, name


def commands():
    """python commands in the README's code blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    lines = {line for line in lines if line.startswith(("python ", "torchrun "))}
    slow = ("tests", "venv", "pytest")
    return sorted(line for line in lines if not any(word in line for word in slow))


PRETRAINING = ("mae_image.py", "mae_video.py", "omni.py", "multimae.py")
SCRIPTS = {"runs/omni": omni, "runs/multimae": multimae, "runs/finetune": finetune,
           "runs/small_ft": finetune}


@pytest.fixture(scope="module")
def small_run(toy, tmp_path_factory):
    """small_run(script) -> checkpoint of the smallest run there is, made once."""
    folder = tmp_path_factory.mktemp("small")

    def make(module):
        path = folder / module.__name__ / "checkpoint.pt"
        if not path.exists():
            few = [*map(str, TINY_VIDEO if module in (mae_video, omni) else TINY_IMAGE)]
            if module is finetune:
                few = ["--init", str(make(mae_video)), "--workers", "0", "--clips", "1"]
            few += ["--images", str(toy)] if module is omni else []
            module.main([*few, "--data", str(toy), "--smoke", "--out", str(path.parent)])
        return path

    return make


@pytest.mark.parametrize("command", commands())
def test_a_readme_command_runs(command, run, toy, tmp_path, small_run):
    """As printed, with --smoke and small widths in place of hours, on small folders of that layout."""
    _, *words = shlex.split(command)
    words = [word for word in words if not word.startswith("--nproc")]
    (tmp_path / "toy").symlink_to(toy)
    make_folders(tmp_path, words, toy)
    module, small = sys.modules[words[0].removesuffix(".py")], []
    if words[0] in PRETRAINING and "--picture" not in words:
        small = [*map(str, TINY_VIDEO if module in (mae_video, omni) else TINY_IMAGE), "--smoke"]
        small += ["--data", "toy"] if "cifar10" in words else []  # no network
        words = [word for word in words if word != "--compile"]  # no machine code for three updates
    elif words[0] in PRETRAINING:
        words = [word if word != "FILE" else "runs/mae_image/checkpoint.pt" for word in words]
        provide(small_run(module), tmp_path / f"runs/{module.__name__}")
    if module is finetune:
        path = words[words.index("--init") + 1] if "--init" in words else "runs/mae_video/x"
        folder = path.rpartition("/")[0]
        provide(small_run(SCRIPTS.get(folder, mae_video)), tmp_path / folder)
        small = [] if "--predict" in words else ["--smoke", "--workers", "0", "--batch", "4"]
        small += ["--clips", "1", "--crops", "1", "--epochs", "1"]
        if "scratch" in words:
            small += "--frames 4 --tubelet 2 --img-size 16 --patch 8 --size 24x1x2".split()
        provide(small_run(mae_video), tmp_path / "runs/ucf101")
    run(module, *words[1:], *small)


def provide(checkpoint, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint, folder / "checkpoint.pt")


def make_folders(folder, words, toy):
    """The data that README commands name: UCF101, UCF101-128, my_videos, clip.avi, cat.jpg."""
    source = [path for name in ("Still", "Wheel") for path in sorted((toy / "videos" / name).glob("*"))]
    roots = {"UCF101", "UCF101-128"} & set(words)
    for root in roots - {"UCF101-128"} if "shrink" in words else roots:
        videos, lists = folder / root / "UCF-101", folder / root / "ucfTrainTestlist"
        lists.mkdir(parents=True)
        names = [f"{path.parent.name}/{path.stem}.avi" for path in source]
        for path, name in zip(source, names):
            (videos / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, videos / name)
        (lists / "classInd.txt").write_text("1 Still\n2 Wheel\n")
        for fold in (1, 2, 3):
            lines = [f"{name} {1 + name.startswith('Wheel')}\n" for name in names[1:] * 3]
            (lists / f"trainlist0{fold}.txt").write_text("".join(lines))
            (lists / f"testlist0{fold}.txt").write_text(f"{names[0]}\n")
    shutil.copy(source[0], folder / "clip.avi")
    shutil.copy(next((toy / "rgb/train").rglob("*.jpg")), folder / "cat.jpg")
    (folder / "my_videos").symlink_to(toy / "videos")


def test_the_python_lines_of_the_readme_run(toy, tmp_path, monkeypatch, run):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(next((toy / "videos").rglob("*.mp4")), tmp_path / "clip.avi")
    run(mae_video, "--data", toy, "--smoke", "--workers", 0)
    run(finetune, "--data", toy, "--mode", "features", "--workers", 0, "--out", "runs/features")
    monkeypatch.chdir(tmp_path)
    exec(code, scope := {})
    assert scope["tokens"].shape == (1, 72, 96) and scope["heat"].shape == (1, 2, 6, 6)
    assert abs(scope["heat"].sum().item() - 1) < 1e-4
    vectors = scope["vectors"]
    assert vectors["train_features"].shape == (len(vectors["train_labels"]), 96)

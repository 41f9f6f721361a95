"""The project as its reader meets it: order of the files, size, shape comments, README."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import sys
import tokenize

import pytest
import torch

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
TEXT = {path: path.read_text() for path in [*FILES, *(ROOT / "tests").glob("*.py")]}
README = (ROOT / "README.md").read_text()
LINES, LONGEST = 4885, 1155  # of all scripts, of one


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_has_its_header_uses_what_it_names_and_imports_only_from_files_before_it(path):
    tree, everything = ast.parse(TEXT[path]), "".join(TEXT.values())
    doc = ast.get_docstring(tree)
    assert doc.startswith(f"{path.name} - ") and f"python {path.name}" in doc and "Next  " in doc
    assert "arXiv" in doc or path.stem == "data"
    allowed = {"torch", "torchvision", "av", "numpy", "PIL"} | set(sys.stdlib_module_names)
    allowed |= set(ORDER[: ORDER.index(path.stem)])
    allowed |= {"safetensors"} if path.stem == "data" else set()  # if it is installed
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name: (a.asname or a.name).split(".")[0] for a in node.names}
            modules = [node.module] if isinstance(node, ast.ImportFrom) else names
            assert {module.split(".")[0] for module in modules} <= allowed
            assert all(len(re.findall(rf"\b{x}\b", TEXT[path])) > 1 for x in names.values()), names
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in tree.body:
            assert len(re.findall(rf"\b{node.name}\b", everything)) > 1, node.name


def test_the_house_does_not_grow():
    """Lines, tokens and what makes code dense. Whoever needs more takes something away first."""
    lines, tokens, kinds = {path: text.splitlines() for path, text in TEXT.items()}, 0, []
    code = tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING
    for path in FILES:
        assert max(map(len, lines[path])) <= 100 and "fmt: skip" not in TEXT[path]
        kinds += [type(node).__name__ for node in ast.walk(ast.parse(TEXT[path]))]
        read = tokenize.generate_tokens(io.StringIO(TEXT[path]).readline)
        tokens += sum(token.type in code for token in read)
    sizes = [len(lines[path]) for path in FILES]
    assert sum(sizes) <= LINES and max(sizes) <= LONGEST
    assert sum(map(len, lines.values())) - sum(sizes) <= 4500  # tests
    # a docstring is one token; from Python 3.12 on an f-string is many
    assert tokens <= 37_350 or sys.version_info >= (3, 12)
    for kind, most in dict(Lambda=10, IfExp=85, Raise=70, Try=18).items():
        assert kinds.count(kind) <= most, kind


def test_the_reading_path_of_the_readme_is_short():
    part, total = README.split("<!-- path -->")[1].split("<!-- end -->")[0], 0
    wanted = set(re.findall(r"`(\w+)`", part))
    for node in [node for path in FILES[:3] for node in ast.parse(TEXT[path]).body]:
        if getattr(node, "name", None) in wanted:
            wanted.remove(node.name)
            total += node.end_lineno - node.lineno + 1
    assert not wanted and 400 < total <= 650


def check_shapes(path, letters, call):
    """Trace call(); after each line `name = ...  # (B, K, D)` compare the tensor with the comment.
    Letters: an argument of the function (or its u), else `letters`, else a local variable."""
    comment = r"\s*(\w+) = .*#.*?(?<!\w)\((\w[^()\[\]]*,[^()\[\]]*)\)"
    comments = {i: found.groups() for i, line in enumerate(path.read_text().splitlines(), 1)
                if (found := re.match(comment, line))}
    checked, before = set(), {}
    def trace(frame, event, _):
        code, line = frame.f_code, before.pop(id(frame), None)
        if code.co_filename != str(path):
            return None
        if line in comments:
            name, shape = comments[line]
            whole = {k: v for k, v in frame.f_locals.items() if isinstance(v, int)}
            # u is a function's own: frames of a cube, or those of it that are painted
            own = {k: whole[k] for k in {"u", *code.co_varnames[: code.co_argcount]} & set(whole)}
            with contextlib.suppress(NameError, SyntaxError, AttributeError):
                want = tuple(int(eval(x, {}, whole | letters | own)) for x in shape.split(","))
                found = tuple(frame.f_locals[name].shape)
                assert found == want, f"{path.name}:{line}: {name} is {found}, not ({shape})"
                checked.add(line)
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


def test_shape_comments_are_true(tmp_path):
    """A forward pass of every model and every mask; how many comments it must have met at least."""
    stale, scope = tmp_path / "stale.py", {}
    stale.write_text("def f(x):\n    y = x[:, 0]  # (B, N, D)\n    return y\n")
    exec(compile(stale.read_text(), str(stale), "exec"), scope)
    with pytest.raises(AssertionError, match="stale.py:2"):
        check_shapes(stale, dict(B=2, N=3, D=4), lambda: scope["f"](torch.zeros(2, 3, 4)))
    g, sizes, video = torch.Generator(), ((36, 1, 3), (20, 1, 4)), (6, (16, 24), 2, 4)
    image = dict(B=2, C=3, H=16, W=24, p=4, h=4, w=6, N=24, K=6, M=18, D=36, E=20, P=48)
    clip = image | dict(T=6, u=2, t=3, N=72, K=18, M=54, P=96)
    maps = dict(B=2, C=3, H=16, W=16, N=4, K=5, D=36, E=20)
    imgs, mask = torch.randn(2, 3, 16, 24), masking.random_mask(2, (1, 4, 6), 0.75, g)
    clips, tubes = torch.randn(2, 3, 6, 16, 24), masking.tube_mask(2, (3, 4, 6), 0.75, g)
    inputs = {"rgb": torch.randn(2, 3, 16, 16), "depth": torch.randn(2, 1, 16, 16),
              "semseg": torch.zeros(2, 4, 4).long()}
    encoder, maest = (mae_video.MAEST(*video, *sizes, cls=False) for _ in range(2))
    mae, videomae = mae_image.MAE((16, 24), 4, *sizes), mae_video.VideoMAE(*video, *sizes)
    joint, many = omni.OmniMAE(*video, *sizes), multimae.MultiMAE(16, 8, *sizes, [*inputs], 5, 4)
    runs = [
        ("mae_image", image, mae_image.reconstruct, (mae, imgs, mask)),
        ("mae_video", clip, mae_image.reconstruct, (videomae, clips, tubes)),
        ("mae_video", clip | dict(P=48), mae_image.reconstruct, (maest, clips, tubes)),
        ("omni", clip, joint, (clips, tubes)), ("omni", image | dict(P=96), joint, (imgs, mask)),
        ("multimae", maps, many, (inputs, masking.dirichlet_mask(2, [4, 4, 4], 5, g))),
        ("finetune", clip, finetune.Classifier(encoder, 5), (clips,)),
        # masks rank N tokens: one for each tube, or for each frame
        *(("masking", image | dict(N=N), draw, (2, grid, 0.75, g)) for draw, N, grid in (
            (masking.random_mask, 24, (1, 4, 6)), (masking.tube_mask, 24, (3, 4, 6)),
            (masking.frame_mask, 8, (8, 4, 6)))),
        ("masking", dict(B=2, N=72, size=24), masking.dirichlet_mask, (2, [24] * 3, 12, g))]
    met = {name: set() for name in ORDER}
    for name, letters, function, given in runs:
        met[name] |= check_shapes(ROOT / f"{name}.py", letters, lambda: function(*given))
    least = dict(masking=9, mae_image=13, mae_video=16, omni=3, multimae=7, finetune=2)
    assert all(len(met[name]) >= count for name, count in least.items()), met


def test_the_readme_is_short_counts_lines_rightly_and_shows_every_asset():
    assert len(README.splitlines()) <= 240
    for path in (ROOT / "assets").iterdir():
        assert f"(assets/{path.name})" in README and path.stat().st_size < 1_000_000
    counts = dict(re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \| (\d+)", README))
    assert set(counts) == {path.name for path in FILES}
    for path in FILES:
        assert abs(len(TEXT[path].splitlines()) - int(counts[path.name])) <= 5, path.name


def test_links_files_claims_and_flags_that_are_named_exist():
    texts = {p: p.read_text() for p in [ROOT / "README.md", *(ROOT / "tests").glob("*.md")]}
    flagged = [path for path in TEXT if path in FILES or path.stem in ("claims", "benchmark")]
    known = "".join(TEXT[path] for path in flagged)
    others = {"nproc_per_node", "index-url", "help"}  # torchrun's, pip's, argparse's
    for path, text in texts.items():
        links = [path.parent / x for x in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
        scripts = [ROOT / x for x in re.findall(r"python ((?:tests/)?\w+\.py)", text)]
        assert [x for x in links + scripts if not x.exists()] == []
        for asked in re.findall(r"--only ([A-Z]\d[A-Z\d,]*)", text):
            assert set(asked.split(",")) <= set(claims.CLAIMS)
        for flag in set(re.findall(r"`[^`\n]*?--(?:no-)?([a-z][a-z0-9-]+)", text)) - others:
            field = rf"^    {flag.replace('-', '_')}: |--{flag}\""
            assert re.search(field, known, re.M), flag


SHELL = "".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = sorted({line.strip() for line in re.findall(r"^(?:python|torchrun) [^#\n]*", SHELL, re.M)
                   if not re.search("tests|venv|pytest", line)})
TINY = {mae_image: TINY_IMAGE, mae_video: TINY_VIDEO, omni: TINY_VIDEO, multimae: TINY_IMAGE}


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """Folder with the smallest run there is of each script, under all names that README has."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--init", folder / "mae_video/checkpoint.pt", "--workers", 0, "--clips", 1]
    for module, sizes in (TINY | {finetune: flags}).items():
        more = ["--data", toy, "--smoke", "--out", folder / module.__name__]
        more += ["--images", toy] * (module is omni)
        module.main([str(flag) for flag in [*sizes, *more]])
    for name in ("mae_video_small", "mae_video_ucf101", "finetune_small"):
        (folder / name).symlink_to(folder / name.rpartition("_")[0])
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_runs(command, run, toy, tmp_path, runs):
    """As printed, with --smoke and small widths in place of hours, on small folders."""
    videos, image = toy / "videos", next((toy / "rgb/train").rglob("*.jpg"))  # with UCF101's lists
    links = {"toy": toy, "my_videos": videos, "UCF101": videos, "cat.jpg": image,
             "clip.avi": next(videos.rglob("*.mp4"))}
    if "shrink" not in command:
        links["UCF101-128"] = videos
    name, *words = [word for word in shlex.split(command)[1:] if not word.startswith("--nproc")]
    words = [word if word != "FILE" else "runs/mae_image/checkpoint.pt" for word in words]
    module, small = sys.modules[name.removesuffix(".py")], []
    if module in TINY and "--picture" not in words:
        small = [*TINY[module], "--smoke"]
        small += ["--data", "toy"] if "cifar10" in words else []  # no network
        words = [word for word in words if word != "--compile"]  # no machine code for three updates
    else:
        links |= {f"runs/{x.name}": x for x in runs.iterdir()
                  if not x.name.startswith("finetune") or f"runs/{x.name}/" in command}
    if module is finetune:
        small = [] if "--predict" in words else ["--smoke", "--workers", 0, "--batch", 4]
        small += ["--clips", 1, "--crops", 1, "--epochs", 1]
    if "scratch" in words:
        small += "--frames 4 --tubelet 2 --img-size 16 --patch 8 --size 24x1x2".split()
    (tmp_path / "runs").mkdir()
    for name, path in links.items():
        (tmp_path / name).symlink_to(path)
    run(module, *words, *small)


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

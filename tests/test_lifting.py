"""Whoever copies one part of a file needs what its banner names, and nothing else."""

import ast
import fnmatch
import functools
import re
import subprocess
import sys

import pytest

from conftest import ROOT

ORDER = ["masking", "data", "mae_image", "mae_video", "omni", "multimae", "finetune"]
PACKAGES = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "av": "av", "PIL": "pillow"}
BANNER = re.compile(r"^#  (THE PAPERS?, part|PART|THE RUN)\W*(\d*)(.*\n(?:#.*\n)*?)# =", re.M)


@functools.cache
def read(name):
    """-> {definition: (part or "", node)}, {number of a part: what its banner says that it needs}, imports."""
    text = (ROOT / f"{name}.py").read_text()
    heads, needs = [], {}
    for found in BANNER.finditer(text):
        part = f"part {found[2]}" if found[1] != "THE RUN" else "the run"
        heads.append((text[: found.start()].count("\n"), part))
        if part != "the run":
            needs[part] = re.search(r"\(needs: ([^)]*)\)", found[3])[1].replace("\n#   ", " ")
    defined, imports = {}, {}
    for node in ast.parse(text).body:
        part = ([""] + [part for line, part in heads if line < node.lineno])[-1]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = part, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                defined.update({n.id: (part, node) for n in ast.walk(target) if isinstance(n, ast.Name)})
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                imports[a.asname or a.name.split(".")[0]] = (getattr(node, "module", None) or a.name), a.name
    return defined, needs, imports


def used_by(name, definition):
    """-> {(file, definition)} and {package} that the code of one definition mentions."""
    defined, _, imports = read(name)
    ours, packages, node = set(), set(), defined[definition][1]
    own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and n.id not in own - {definition}:
            if n.id in defined:
                ours.add((name, n.id))
            elif n.id in imports:
                module, what = imports[n.id]
                ours |= {(module, what)} if module in ORDER and what != module else set()
                packages |= {PACKAGES[module.split(".")[0]]} if module.split(".")[0] in PACKAGES else set()
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            module = imports.get(n.value.id, ("", ""))[0]
            ours |= {(module, n.attr)} if module in ORDER and n.attr in read(module)[0] else set()
    return ours - {(name, definition)}, packages


def named(name, part):
    """The banner of a part -> (whether it is a whole part, {(file, definition)}) item by item, packages."""
    items, packages = [], set()
    for group in read(name)[1][part].split("; "):
        file, _, rest = group.partition(".py ") if ".py " in group else (name, "", group)
        rest = re.sub(r"(\d)-(\d)", lambda m: ", ".join(map(str, range(int(m[1]), int(m[2]) + 1))), rest)
        for item in rest.replace("parts ", "part ").split(", "):
            if item in PACKAGES.values():
                packages.add(item)
            elif item != "math":
                number = re.fullmatch(r"(?:part )?(\d)", item)
                defined = read(file)[0]
                inside = {d for d, (p, _) in defined.items() if number and p == f"part {number[1]}"}
                items.append((bool(number), {(file, d) for d in inside or fnmatch.filter(defined, item)}))
                assert items[-1][1], f"{name}.py, {part}: its banner names {item}, which is not in {file}.py"
    return items, packages


def lift(name, part):
    """All that the banners name, those of the parts that are named in turn.   -> {(file, definition)}"""
    todo, done, found = [(name, part)], set(), set()
    while todo:
        file, one = todo.pop()
        done.add((file, one))
        defined = read(file)[0]
        found |= {(file, d) for d, (p, _) in defined.items() if p == one}
        for whole, item in named(file, one)[0]:
            found |= item
            todo += {(f, read(f)[0][d][0]) for f, d in item if whole} - done
    return found


PARTS = [(name, part) for name in ORDER for part in read(name)[1]]


@pytest.mark.parametrize("name, part", PARTS)
def test_a_banner_names_what_its_part_needs_and_nothing_else(name, part):
    items, packages = named(name, part)
    own = {d for d, (p, _) in read(name)[0].items() if p == part}
    used = [used_by(name, d) for d in own]
    direct = set().union(*(ours for ours, _ in used)) - {(name, d) for d in own}
    assert set().union(*(p for _, p in used)) == packages
    told = set().union(*(item for _, item in items))
    assert direct <= told, direct - told
    # a name that stands alone may be there for another one's sake
    needed = direct | set().union(*(used_by(f, d)[0] for whole, item in items if not whole for f, d in item))
    for _, item in items:
        assert item & needed, f"not needed: {sorted(item)}"
    everything = lift(name, part)
    for file, definition in everything:
        missing = used_by(file, definition)[0] - everything
        assert not missing, f"{file}.{definition} needs {missing}"


MODELS = {
    ("mae_image", "part 3"): "MAE(32, 8, (16, 1, 2), (16, 1, 2))(torch.zeros(1, 3, 32, 32), mask(16))[0]",
    ("mae_video", "part 2"): "VideoMAE(4, 32, 2, 8, (16, 1, 2), (16, 1, 2))(torch.zeros(1, 3, 4, 32, 32), mask(32))[0]",
    ("mae_video", "part 3"): "MAEST(4, 32, 2, 8, (16, 1, 2), (16, 1, 2))(torch.zeros(1, 3, 4, 32, 32), mask(32))[0]",
    ("omni", "part 2"): "OmniMAE(4, 32, 2, 8, (16, 1, 2), (16, 1, 2))(torch.zeros(1, 3, 32, 32), mask(16))[0]",
    ("multimae", "part 3"): "MultiMAE(32, 8, (16, 1, 2), (16, 1, 2), ('rgb', 'depth'))"
    "({'rgb': torch.zeros(1, 3, 32, 32), 'depth': torch.zeros(1, 1, 32, 32)}, mask(32))[0]",
}


@pytest.mark.parametrize("name, part", MODELS)
def test_a_model_runs_in_an_empty_folder_with_what_its_banner_names(name, part, tmp_path):
    everything = lift(name, part)
    for file in {file for file, _ in everything}:
        text = (ROOT / f"{file}.py").read_text()
        defined, lines = read(file)[0], []
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module in ORDER:
                node.names = [a for a in node.names if (node.module, a.name) in everything]
                lines += [ast.unparse(node)] if node.names else []
            elif isinstance(node, ast.Import) and node.names[0].name in ORDER:
                continue
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                lines.append(ast.unparse(node))
            elif any(node.lineno == defined[d][1].lineno for f, d in everything if f == file):
                lines.append(ast.unparse(node))
        (tmp_path / f"{file}.py").write_text("\n\n".join(lines))
    program = (
        f"import torch; from {name} import *; mask = lambda n: torch.arange(n)[None] % 2 > 0; "
        f"loss = {MODELS[name, part]}; loss.backward(); assert loss.isfinite(); print('ran')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "ran\n", result.stderr

"""Whoever copies one part of a file needs what its banner names, and nothing else."""

import ast
import fnmatch
import functools
import re

import pytest

from conftest import ROOT

ORDER = ["masking", "data", "mae_image", "mae_video", "omni", "multimae", "finetune"]
BANNER = re.compile(r"^#  (THE PAPERS?, part|PART|THE RUN)\W*(\d*)(.*\n(?:#.*\n)*?)# =", re.M)


@functools.cache
def read(name):
    """-> {definition: (part or "", node)}, {part: what its banner needs}, {imported name: node}."""
    text = (ROOT / f"{name}.py").read_text()
    heads, needs, defined, imports = [], {}, {}, {}
    for found in BANNER.finditer(text):
        part = f"part {found[2]}" if found[1] != "THE RUN" else "the run"
        heads.append((text[: found.start()].count("\n"), part))
        if said := re.search(r"\(needs: ([^)]*)\)", found[3]):
            needs[part] = said[1].replace("\n#  ", " ")
    for node in ast.parse(text).body:
        part = ([""] + [part for line, part in heads if line < node.lineno])[-1]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = part, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
                defined.update({n: (part, node) for n in names})
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update({(a.asname or a.name.split(".")[0]): node for a in node.names})
    return defined, needs, imports


def used_by(name, definition):
    """-> {(file, definition)} and {imported name} that the code of one definition mentions."""
    defined, _, imports = read(name)
    node, ours, imported = defined[definition][1], set(), set()
    own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for n in ast.walk(node):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "data":
            ours |= {("data", n.attr)} if n.attr in read("data")[0] else set()
        elif isinstance(n, ast.Name) and n.id not in own - {definition}:
            module = getattr(imports.get(n.id), "module", None)
            if n.id in defined:
                ours.add((name, n.id))
            elif module in ORDER:
                ours.add((module, n.id))
            elif n.id in imports and n.id != "data":
                imported.add(n.id)
    return ours - {(name, definition)}, imported


def named(name, part):
    """A banner -> [(whether it is a whole part, {(file, definition)})], {imported name}."""
    items, imported = [], set()
    for group in read(name)[1][part].split("; "):
        file, _, rest = group.partition(".py ") if ".py " in group else (name, "", group)
        rest = re.sub(r"(\d)-(\d)", lambda m: ", ".join(map(str, range(int(m[1]), int(m[2]) + 1))), rest)
        for item in rest.replace("parts ", "part ").split(", ") if rest != "nothing" else ():
            defined, number = read(file)[0], re.fullmatch(r"(?:part )?(\d)", item)
            inside = {d for d, (p, _) in defined.items() if number and p == f"part {number[1]}"}
            inside = inside or fnmatch.filter(defined, item)
            assert inside or item in read(name)[2], f"{name}.py, {part} needs {item}: what is that?"
            if inside:
                items.append((bool(number), {(file, d) for d in inside}))
            else:
                imported.add(item)
    return items, imported


def lift(name, part):
    """All that the banners name, those of the parts that are named in turn.   -> {(file, definition)}"""
    todo, done, found = [(name, part)], set(), set()
    while todo:
        file, one = todo.pop()
        done.add((file, one))
        found |= {(file, d) for d, (p, _) in read(file)[0].items() if p == one}
        for whole, item in named(file, one)[0]:
            found |= item
            todo += {(f, read(f)[0][d][0]) for f, d in item if whole} - done
    return found


PARTS = [(name, part) for name in ORDER for part in read(name)[1]]


@pytest.mark.parametrize("name, part", PARTS)
def test_a_banner_names_what_its_part_needs_and_nothing_else(name, part):
    items, imported = named(name, part)
    own = {d for d, (p, _) in read(name)[0].items() if p == part}
    used = [used_by(name, d) for d in own]
    assert set().union(*(names for _, names in used)) == imported
    direct = set().union(*(ours for ours, _ in used)) - {(name, d) for d in own}
    # a name that stands alone may be there for another one's sake
    lone = [used_by(f, d)[0] for whole, item in items if not whole for f, d in item]
    for _, item in items:
        assert item & direct.union(*lone), f"not needed: {sorted(item)}"
    everything = lift(name, part)
    assert direct <= everything, direct - everything
    for file, definition in everything:
        missing = used_by(file, definition)[0] - everything
        assert not missing, f"{file}.{definition} needs {missing}"


SMALL = "(16, 1, 2), (16, 1, 2)"
CLIP = "torch.zeros(1, 3, 4, 32, 32)"
MODELS = {
    ("mae_image", "part 3"): f"MAE(32, 8, {SMALL})(torch.zeros(1, 3, 32, 32), mask(16))[0]",
    ("mae_video", "part 2"): f"VideoMAE(4, 32, 2, 8, {SMALL})({CLIP}, mask(32))[0]",
    ("mae_video", "part 3"): f"MAEST(4, 32, 2, 8, {SMALL})({CLIP}, mask(32))[0]",
    ("omni", "part 1"): f"OmniMAE(4, 32, 2, 8, {SMALL})(torch.zeros(1, 3, 32, 32), mask(16))[0]",
    ("multimae", "part 3"): f"MultiMAE(32, 8, {SMALL}, ('rgb', 'depth'))({{'rgb': torch.zeros(1, 3, 32, "
    "32), 'depth': torch.zeros(1, 1, 32, 32)}, mask(32))[0]",
}


@pytest.mark.parametrize("name, part", MODELS)
def test_a_model_runs_in_one_file_with_what_its_banner_names(name, part):
    """The definitions as text, in reading order, under the imports that the banners name."""
    everything, text = lift(name, part), ["import torch"]
    for file in ORDER:
        names = {n for f, d in everything if f == file for n in used_by(file, d)[1]}
        nodes = {id(read(file)[2][n]): read(file)[2][n] for n in names}
        text += [ast.unparse(node) for node in nodes.values()]
    for file in ORDER:
        wanted = {id(read(file)[0][d][1]) for f, d in everything if f == file}
        body = {id(node): node for _, node in read(file)[0].values()}
        text += [ast.unparse(node) for key, node in body.items() if key in wanted]
    text += ["mask = lambda n: torch.arange(n)[None] % 2 > 0", f"loss = {MODELS[name, part]}"]
    scope = {"__name__": "lifted"}
    exec(compile("\n\n".join([*text, "loss.backward()"]), "lifted.py", "exec"), scope)
    assert scope["loss"].isfinite() and not set(ORDER) & set(scope)

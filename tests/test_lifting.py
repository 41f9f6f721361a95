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
    heads, needs, defined, imports = [(0, "")], {}, {}, {}
    for found in BANNER.finditer(text):
        part = f"part {found[2]}" if found[1] != "THE RUN" else "the run"
        heads.append((text[: found.start()].count("\n"), part))
        if said := re.search(r"\(needs: ([^)]*)\)", found[3]):
            needs[part] = said[1].replace("\n#  ", " ")
    for node in ast.parse(text).body:
        part = [part for line, part in heads if line < node.lineno][-1]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = part, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
                defined |= {n: (part, node) for n in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports |= {(a.asname or a.name.split(".")[0]): node for a in node.names}
    return defined, needs, imports


def used_by(name, definition):
    """-> {(file, definition)} and {imported name} that the code of one definition mentions."""
    defined, _, imports = read(name)
    nodes, ours, imported = [*ast.walk(defined[definition][1])], set(), set()
    names = [n for n in nodes if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)} - {definition}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    for n in nodes:
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "data":
            ours |= {("data", n.attr)} if n.attr in read("data")[0] else set()
    for used in {n.id for n in names} - own:
        module = getattr(imports.get(used), "module", None)
        if used in defined or module in ORDER:
            ours.add((name if used in defined else module, used))
        elif used in imports and used != "data":
            imported.add(used)
    return ours - {(name, definition)}, imported


def named(name, part):
    """A banner -> [(whether it is a whole part, {(file, definition)})], {imported name}."""
    items, imported = [], set()
    for group in read(name)[1][part].split("; "):
        file, _, rest = group.partition(".py ") if ".py " in group else (name, "", group)
        rest = re.sub(r"(\d)-(\d)", lambda x: ", ".join("12345"[int(x[1]) - 1 : int(x[2])]), rest)
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
    """All that a banner names, and what the parts need that it names.   -> {(file, definition)}"""
    found = {(name, d) for d, (p, _) in read(name)[0].items() if p == part}
    for whole, item in named(name, part)[0]:
        found |= item
        for file, one in {(f, read(f)[0][d][0]) for f, d in item} if whole else ():
            found |= lift(file, one)
    return found


@pytest.mark.parametrize("name, part", [(name, part) for name in ORDER for part in read(name)[1]])
def test_a_banner_names_what_its_part_needs_and_nothing_else(name, part):
    items, imported = named(name, part)
    own = {(name, d) for d, (p, _) in read(name)[0].items() if p == part}
    used = [used_by(*one) for one in own]
    assert set().union(*(names for _, names in used)) == imported
    direct = set().union(*(ours for ours, _ in used)) - own
    # a name that stands alone may be there for another one's sake
    direct |= {d for whole, item in items if not whole for one in item for d in used_by(*one)[0]}
    assert [sorted(item) for _, item in items if not item & direct] == []  # not needed
    everything = lift(name, part)
    for one in everything:
        assert used_by(*one)[0] <= everything, f"{one} needs {used_by(*one)[0] - everything}"


SMALL = "(16, 1, 2), (16, 1, 2)"
IMAGE, CLIP = "torch.zeros(1, 3, 32, 32)", "torch.zeros(1, 3, 4, 32, 32)"
MODELS = {
    ("mae_image", "part 3"): f"MAE(32, 8, {SMALL})({IMAGE}, mask(16))[0]",
    ("mae_video", "part 2"): f"VideoMAE(4, 32, 2, 8, {SMALL})({CLIP}, mask(32))[0]",
    ("mae_video", "part 3"): f"MAEST(4, 32, 2, 8, {SMALL})({CLIP}, mask(32))[0]",
    ("omni", "part 1"): f"OmniMAE(4, 32, 2, 8, {SMALL})({IMAGE}, mask(16))[0]",
    ("multimae", "part 3"): f"MultiMAE(32, 8, {SMALL}, ('rgb', 'depth'))("
                            f"{{'rgb': {IMAGE}, 'depth': {IMAGE}[:, :1]}}, mask(32))[0]"}


@pytest.mark.parametrize("name, part", MODELS)
def test_a_model_runs_in_one_file_with_what_its_banner_names(name, part):
    """The definitions as text, in reading order, under the imports that the banners name."""
    everything, imports, code = lift(name, part), {"import torch": None}, {}
    for file in ORDER:
        defined, _, known = read(file)
        wanted = {d for f, d in everything if f == file}
        names = {n for d in wanted for n in used_by(file, d)[1]}
        imports |= {ast.unparse(known[n]): None for n in names}
        code |= {ast.unparse(node): None for d, (_, node) in defined.items() if d in wanted}
    text = [*imports, *code, "mask = lambda n: torch.arange(n)[None] % 2 > 0"]
    text += [f"loss = {MODELS[name, part]}", "loss.backward()"]
    exec("\n\n".join(text), scope := {"__name__": "lifted"})
    assert scope["loss"].isfinite() and not set(ORDER) & set(scope)

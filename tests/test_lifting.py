"""Whoever copies one part of a file needs what its banner names, and nothing else."""

import ast
import dis
import fnmatch
import functools
import importlib
import re

import pytest
import torch

from test_style import ORDER, ROOT

S = "(16, 1, 2), (16, 1, 2)"  # encoder and decoder: width, depth, heads
BANNER = re.compile(r"^# =+ ((?:THE PAPERS?, part|PART|THE RUN).*\n(?:#.*\n)*)", re.M)


@functools.cache
def read(name):
    """-> {definition: (part, node)}, {part: what its banner needs}, {imported name: its module}."""
    texts = BANNER.split((ROOT / f"{name}.py").read_text())
    defined, needs, imports = {}, {}, {}
    for banner, code in zip(["", *texts[1::2]], texts[::2], strict=True):
        number = re.match(r"(?:THE PAPERS?, )?part (\d)", banner, re.I)
        part = f"part {number[1]}" if number else banner[:7]  # "THE RUN", or "" at the top
        needs |= {part: said for said in re.findall(r"\(needs: ([^)]*)\)", banner)}
        for node in ast.parse(code).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports |= {a.asname or a.name: getattr(node, "module", None) for a in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name] = part, node
            else:
                names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                defined |= {n.id: (part, node) for n in names if isinstance(n.ctx, ast.Store)}
    return defined, needs, imports


def used_by(name, definition):
    """-> {(file, definition)} and {imported name} that one definition looks up outside of it."""
    defined, _, imports = read(name)
    node, words = defined[definition][1], set()
    codes = [compile(ast.Module([node], []), name, "exec")]
    for code in codes:
        codes += [x for x in code.co_consts if hasattr(x, "co_code")]  # the functions in it
        steps = dis.get_instructions(code)
        words |= {i.argval for i in steps if re.match("LOAD_(NAME|.*GLOBAL)", i.opname)}
    of_data = set(re.findall(r"\bdata\.(\w+)", ast.unparse(node))) & set(read("data")[0])
    pairs = {(name if x in defined else imports[x], x) for x in words & {*defined, *imports}}
    ours = {pair for pair in pairs if pair[0] in ORDER} | {("data", x) for x in of_data}
    return ours - {(name, definition)}, {x for file, x in pairs if file not in ORDER} - {"data"}


def of_part(name, part):
    return {(name, d) for d, (p, _) in read(name)[0].items() if p == part}


def named(name, part):
    """A banner -> [(whether it is a whole part, {(file, definition)})], {imported name}."""
    file, items, imported = name, [], set()
    for word in re.findall(r"[\w*-]+(?:\.py)?", read(name)[1][part]):
        if word.endswith(".py"):
            file = word.removesuffix(".py")
        elif word[0].isdigit():  # 1-3: parts 1, 2 and 3
            numbers = range(int(word[0]), int(word[-1]) + 1)
            items += [(True, of_part(file, f"part {n}")) for n in numbers]
        elif found := fnmatch.filter(read(file)[0], word):
            items.append((False, {(file, d) for d in found}))
        elif word not in ("part", "parts", "nothing"):
            assert word in read(name)[2], f"{name}.py, {part} needs {word}: what is that?"
            imported.add(word)
    return items, imported


def lift(name, part):
    """All that a banner names, and what the parts need that it names.   -> {(file, definition)}"""
    found = of_part(name, part)
    for whole, item in named(name, part)[0]:
        found |= item
        for file, one in {(f, read(f)[0][d][0]) for f, d in item} if whole else ():
            found |= lift(file, one)
    return found


@pytest.mark.parametrize("name, part", [(name, part) for name in ORDER for part in read(name)[1]])
def test_a_banner_names_what_its_part_needs_and_nothing_else(name, part):
    (items, imported), own, everything = named(name, part), of_part(name, part), lift(name, part)
    used, names = zip(*[used_by(*one) for one in own])
    assert set().union(*names) == imported
    # a name that stands alone may be there for another one's sake
    alone = [used_by(*one)[0] for whole, item in items if not whole for one in item]
    direct = set().union(*used, *alone) - own
    assert [sorted(item) for _, item in items if not item & direct] == []  # not needed
    for one in everything:
        assert used_by(*one)[0] <= everything, f"{one} needs {used_by(*one)[0] - everything}"


@pytest.mark.parametrize("name, part, line", [
    ("mae_image", "part 3", f"MAE(32, 8, {S})(x, mask)"),
    ("mae_video", "part 2", f"VideoMAE(4, 32, 4, 8, {S})(clip, mask)"),
    ("mae_video", "part 3", f"MAEST(4, 32, 4, 8, {S})(clip, mask)"),
    ("omni", "part 1", f"OmniMAE(4, 32, 4, 8, {S})(x, mask)"),
    ("multimae", "part 3", f"MultiMAE(32, 8, {S}, ['rgb'])({{'rgb': x}}, mask)")])
def test_a_model_runs_alone_with_what_its_banner_names(name, part, line):
    everything, scope = lift(name, part), {"torch": torch, "__name__": "lifted"}
    for file, one in [(file, one) for file in ORDER for one in read(file)[0]]:
        if (file, one) in everything:
            scope |= {n: vars(importlib.import_module(file))[n] for n in used_by(file, one)[1]}
            exec(ast.unparse(read(file)[0][one][1]), scope)
    scope |= {"x": torch.zeros(1, 3, 32, 32), "mask": torch.arange(16)[None] % 2 > 0}
    exec(f"clip = x[:, :, None].repeat(1, 1, 4, 1, 1)\nloss = {line}[0]\nloss.backward()", scope)
    assert scope["loss"].isfinite() and not set(ORDER) & set(scope)

"""What a class is called decides nothing: each place where a name is looked at is listed here with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import regraft

PACKAGE = Path(regraft.__file__).parent
NAMES = {"__name__", "__qualname__", "__module__"}
TESTS = {"startswith", "endswith", "search", "match", "fullmatch", "get", "split", "removesuffix", "isdigit"}
ALLOWED = {
    "cli/architectures.py: inputs_for": "chooses an input to try; the forward shows whether it is one",
    "find/bytecode_scan.py: is_torchs": "whose function it is, by the package it comes from",
    "find/bytecode_scan.py: written_calls": "whose class it is, by the package it comes from",
    "find/merge_probe.py: _unnamed_sites": "whose class it is, by the package it comes from",
    "find/probe/example_inputs.py: _of_torchvision": "chooses inputs to try; the forward shows whether they are",
    "find/probe/ledger.py: _rate": "the name of an operator, which is what it is",
    "find/probe/preserve_state.py: remembering": "in whose files to look, by the package a class comes from",
    "find/recognize.py: _by_law": "a name nominates; what the class draws decides",
    "find/recognize.py: _by_name": "a class without a forward, as read from a file: its name is all there is",
    "find/recognize.py: own_name": "what a site is called, so that no class passes for an operation",
    "find/tensor_io.py: _key": "a field of a tuple, given as text",
    "find/trace.py: is_leaf_module": "whose class it is, by the package it comes from",
    "find/recognize.py: quantized": "whose class it is, by the library that it comes from",
    "find/recognize.py: _is_kerass": "whose class it is, by the library that it comes from",
    "find/walk.py: _no_module": "the article in a message",
    "find/weights.py: _idle": "whose class it is, by the package it comes from",
    "graft/classes.py: _rebuild_foreign": "names a rebuilt class of torch's as the one that it stands for",
    "graft/proof.py: record": "the name of an operator, which is what it is",
    "graft/verify.py: _travels": "a copy has classes of the same names, as promised",
    "planning/insertions.py: _depth": "the depth at which a rate stands in a series; all of them are shown",
    "planning/rules.py: _drop_path_place": "the selector that a message offers",
    "training/passes/sharded.py: gathering_hooks": "whose hook it is, by the package it comes from",
    "training/rdrop/criterion.py: _known": "a loss of timm's own, by the package it comes from",
    "find/advice.py: _drop_path": "advice, and no claim",
}


def decisions(tree: ast.AST) -> Iterator[str]:
    """The functions in which the name of a class, or a number in a path, decides something."""
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def function(node: ast.AST) -> ast.AST | None:
        while node in above and not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            node = above[node]
        return node if isinstance(node, ast.FunctionDef) else above.get(node)

    def decides(node: ast.AST) -> bool:
        """Is it compared, searched or looked up, and not only told?"""
        while node in above and not isinstance(node, ast.stmt):
            inside, node = node, above[node]
            if isinstance(node, (ast.JoinedStr, ast.keyword)):
                return False
            if isinstance(node, ast.Compare) or (isinstance(node, ast.Subscript) and node.slice is inside):
                return True
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in TESTS:
                return True
            if isinstance(node, ast.Call) and inside is not node.func:
                return False
        return False

    holding: dict[ast.AST | None, set[str]] = {}
    for node in ast.walk(tree):
        holder = above.get(above.get(node)) if isinstance(above.get(node), ast.SetComp) else above.get(node)
        if isinstance(node, ast.Attribute) and node.attr in NAMES and isinstance(holder, ast.Assign):
            names = {target.id for target in holder.targets if isinstance(target, ast.Name)}
            holding.setdefault(function(node), set()).update(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) and getattr(node.iter, "id", "") in holding.get(
            function(node), ()
        ):
            holding[function(node)].add(getattr(node.target, "id", ""))
    for node in ast.walk(tree):
        where = function(node)
        named = isinstance(node, ast.Attribute) and node.attr in NAMES
        held = isinstance(node, ast.Name) and node.id in holding.get(where, ())
        number = isinstance(node, ast.Attribute) and node.attr == "isdigit"
        if number or ((named or held) and decides(node)):
            yield getattr(where, "name", "the module")


def test_every_place_where_a_name_decides_is_listed_with_its_reason():
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in decisions(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set()


def test_it_sees_what_it_looks_for():
    source = """
def one(m): return type(m).__name__ == "Conv1D"
def two(m):
    name = type(m).__name__
    return name.startswith("Drop")
def three(m): return TABLE[type(m).__name__]
def told(m): raise ValueError(f"{type(m).__name__} is no module")
def four(p): return p.isdigit()
"""
    assert set(decisions(ast.parse(source))) == {"one", "two", "three", "four"}

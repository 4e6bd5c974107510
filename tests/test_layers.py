"""The layers of the package: imports point down only. Read from the sources, not from what runs."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import regraft

PACKAGE = Path(regraft.__file__).parent
LAYERS = [
    {"errors", "libraries"},
    {"interrupts", "record", "variants", "report", "ops"},
    {"find"},
    {"planning"},
    {"graft"},
    {"training"},
    {"integrations"},
    {"files"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FREE = {"__init__", "__main__", "nn", "results"}
"""`__init__.py` names everything lazily, `nn.py` and `results.py` re-export, `__main__` is the command."""
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    "timm",
    "transformers",
    "typer",
    "rich",
    "matplotlib",
    "accelerate",
    "lightning",
    "pytorch_lightning",
}
ids = [str(path.relative_to(PACKAGE)) for path in FILES]
files = pytest.mark.parametrize("path", FILES, ids=ids)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Names of the modules a file imports, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    inside = {id(one) for top in tree.body for one in ast.walk(top) if not _is_top(top)}
    return [(name, id(node) not in inside) for name, node in found]


def _is_top(node: ast.stmt) -> bool:
    """Statements whose imports run with the file: not functions, not classes, not TYPE_CHECKING."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" not in ast.unparse(node.test)
    return not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def own(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "regraft" and len(parts) > 1 else None


def test_every_part_of_the_package_has_a_layer():
    assert {layer_of(path) for path in FILES} <= RANK.keys() | FREE
    assert {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")
    } <= RANK.keys()


@files
def test_imports_point_down(path):
    layer = layer_of(path)
    if layer in FREE:
        return
    upward = []
    for name, _ in imported(path):
        other = own(name)
        if other is None:
            # The package itself is the whole public list: only the command line calls that.
            assert name.split(".")[0] != "regraft" or layer == "cli", f"{path.name} imports {name}"
        elif other in RANK and RANK[other] > RANK[layer]:
            upward.append(name)
        elif other in RANK and RANK[other] == RANK[layer]:
            assert other == layer, f"{path.name} imports its neighbour {name}"
        elif other in FREE:
            assert layer == "cli", f"{path.name} imports {name}"
    assert upward == []


@files
def test_no_string_names_a_module_above(path):
    """What is imported by its name in a string is an import, too."""
    layer = layer_of(path)
    texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node)]
    named = [text for text in texts if re.fullmatch(r"regraft(\.\w+)+(:\w+)?", text)]
    above = [name for name in named if RANK.get(own(name) or "", -1) > RANK.get(layer, 99)]
    assert layer in FREE or above == []


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_files_import_each_other_in_a_circle():
    names = {".".join(("regraft", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    needs = {
        file: {name if name in names else name.rpartition(".")[0] for name, _ in imported(path)}
        & names.keys() - {file}
        for file, path in names.items()
    }
    assert len(needs["regraft.planning.plan"]) > 5
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@files
def test_variants_know_nothing_of_sites_and_views_nothing_of_torch(path):
    names = {name.split(".")[0] for name, _ in imported(path)}
    if layer_of(path) == "report":
        assert "torch" not in names
    if layer_of(path) == "errors":
        assert names <= {"__future__", "difflib", "collections"}


@files
def test_heavy_packages_are_imported_where_they_are_used(path):
    layer = layer_of(path)
    top = {name.split(".")[0] for name, at_top in imported(path) if at_top}
    allowed = {"typer", "rich"} if layer == "cli" else {"rich"} if path.name == "text.py" else set()
    assert top & HEAVY <= allowed

"""`.pt2`, a program of torch.export: its modules and its dropouts, from the JSON of its graph."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from regraft.cli.reading.archive import Archive, Member
from regraft.cli.reading.limits import JSON_BYTES
from regraft.cli.reading.model import NOT_RUN, ReadModel
from regraft.cli.reading.tensors import ReadTensor
from regraft.cli.reading.tree import Planted, ReadModule
from regraft.cli.reading.values import printable
from regraft.errors import FileError

_GRAPHS = ("models/model.json", "serialized_exported_program.json")
_STEP = re.compile(r"[^;]*?,([^;,]{0,2000}),([\w.@\[\]$]{1,400})(?:;|$)")
_DROPOUTS = ("dropout", "native_dropout", "feature_dropout", "alpha_dropout")


def program_in(archive: Archive) -> Member | None:
    """The graph of an exported program, if the archive is one."""
    return next((member for name in _GRAPHS for member in archive.members(name)), None)


def read_program(path: Path, archive: Archive, graph: Member) -> ReadModel:
    """The modules that an exported program was traced from.

    Raises:
        FileError: it is damaged.
    """
    try:
        program = json.loads(archive.read(graph, JSON_BYTES))
        module = program["graph_module"]
        nodes, values = module["graph"]["nodes"], module["graph"]["tensor_values"]
        inputs = module["signature"]["input_specs"]
        tree = Planted(ReadModule("Module"))
        for node in nodes:
            _enter(tree, node)
        for entry in inputs:
            _weigh(tree, entry, values)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise FileError("the exported program is damaged, or of a version that is not known") from None
    note = "a program of torch.export, whose graph is fixed; graft the Python model, then export it"
    return ReadModel(path, "program", tree.root, [f"{NOT_RUN}: {note}"])


def _enter(tree: Planted, node: dict[str, Any]) -> None:
    """Put the modules on the way to a node into the tree, and the rate of a dropout to its module."""
    stack = printable(str((node.get("metadata") or {}).get("nn_module_stack") or ""))
    place = tree.root
    for path, cls in _STEP.findall(stack):
        place = tree.at(path)
        place.home, _, place.type = cls.rpartition(".")
    operation = str(node.get("target", "")).removeprefix("torch.ops.aten.").partition(".")[0]
    if operation in _DROPOUTS:
        arguments = {one["name"]: one["arg"] for one in node["inputs"]}
        rate = (arguments.get("p") or {}).get("as_float")
        if isinstance(rate, float):
            place.attributes["p"] = rate


def _weigh(tree: Planted, entry: dict[str, Any], values: dict[str, Any]) -> None:
    """Give the module of a parameter its shape."""
    parameter = entry.get("parameter")
    if not parameter:
        return
    path, _, name = printable(str(parameter["parameter_name"])).rpartition(".")
    sizes = [one["as_int"] for one in values[parameter["arg"]["name"]]["sizes"]]
    if not all(type(size) is int and 0 <= size < 2**50 for size in sizes):
        raise ValueError
    place = tree.at(path)
    place.tensors[name] = ReadTensor(tuple(sizes), None)
    if name == "weight" and place.type == "Linear" and len(sizes) == 2:
        place.attributes |= {"in_features": sizes[1], "out_features": sizes[0]}
    if name == "weight" and place.type == "Embedding" and len(sizes) == 2:
        place.attributes |= {"num_embeddings": sizes[0], "embedding_dim": sizes[1]}

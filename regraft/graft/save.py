"""The grafts of a model beside its checkpoint: `regraft.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from regraft.errors import FileError
from regraft.find.inspect import look
from regraft.graft.apply import Report, apply
from regraft.graft.calls import BOUNDARY
from regraft.graft.graph_nodes import placed_grafts
from regraft.planning.plan import Edit, Plan, fingerprint
from regraft.variants.spec import Variant

FILE_NAME = "regraft.json"


def save_plan(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the grafts that a model has as a plan; returns the file.

    Args:
        model: a grafted model (one without grafts gives an empty plan).
        path: a file, or a folder, which then holds `regraft.json`.

    Example:
        >>> import regraft, tempfile
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "gaussian"})
        >>> folder = tempfile.mkdtemp()
        >>> regraft.save_plan(net, folder).name
        'regraft.json'
        >>> again = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.load_plan(again, folder)
        >>> again[1]
        GaussianDropout(p=0.1)
    """
    file = _file(path)
    file.write_text(plan_of_grafts(model).to_json() + "\n", encoding="utf-8")
    return file


def load_plan(model: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Give a model the grafts that `save_plan` wrote; returns the report.

    Args:
        model: of the architecture that the plan was made for.
        path: the file, or the folder that holds `regraft.json`.

    Example:
        >>> import regraft, tempfile
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "gaussian"})
        >>> file = regraft.save_plan(net, tempfile.mkdtemp())
        >>> len(regraft.load_plan(nn.Sequential(nn.Dropout(0.1)), file).grafted)
        1

    Raises:
        FileError: no such file, or no plan (also an OSError).
        MisfitError: the plan was made for another model (also a ValueError).
    """
    file = _file(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"the plan cannot be read: {error.strerror}", where=str(file)) from None
    try:
        made = Plan.from_json(text)
    except FileError as error:
        error.where = f"{file}: {error.where}".removesuffix(": ")
        raise
    return apply(model, made)


def plan_of_grafts(model: nn.Module) -> Plan:
    """The grafts that a model has, as a plan with one rule for each."""
    inspection = look(model)
    edits: list[Edit] = []
    rules: list[list[Any]] = []
    boundaries: list[str] = []
    for named, slot, graft in placed_grafts(inspection.modules):
        if slot == BOUNDARY:
            boundaries.append(named.paths[0])
            continue
        if not graft.edit:
            continue  # passes of the whole model: no site is edited
        edit = Edit(**{**graft.edit, "path": named.paths[0], "rule": len(rules)})
        edits.append(edit)
        rules.append([_selector(edit), str(Variant(edit.variant, edit.options))])
    return Plan(
        model=type(inspection.root).__name__,
        rules=rules,
        grafted=edits,
        skipped=[],
        fingerprint=fingerprint(inspection, [edit.path for edit in edits]),
        boundaries=boundaries,
    )


def _selector(edit: Edit) -> str:
    """The text of a rule's key that means the edit alone."""
    op = f"{edit.position}:{edit.place}" if edit.position else edit.op
    return (f"{op}@{edit.path}" if edit.path else op) + (f"#{edit.field}" if edit.field else "")


def _file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file / FILE_NAME if file.is_dir() else file

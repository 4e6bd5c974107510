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
from regraft.graft.rates import unscheduled_edit
from regraft.planning.plan import Edit, Plan, fingerprint
from regraft.variants.registry import rate_matters, spec
from regraft.variants.spec import Variant

FILE_NAME = "regraft.json"


def save_plan(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the grafts that a model has as a plan; returns the file. See `regraft.save_plan`."""
    file = file_of(path)
    file.write_text(plan_of_grafts(model).to_json() + "\n", encoding="utf-8")
    return file


def load_plan(model: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Give a model the grafts that `save_plan` wrote; returns the report. See `regraft.load_plan`."""
    file = file_of(path)
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
        edit = Edit(**{**unscheduled_edit(graft), "path": named.paths[0], "rule": len(rules)})
        edits.append(edit)
        matters = rate_matters(spec(edit.variant), edit.options)
        options = {key: value for key, value in edit.options.items() if key != "p" or matters}
        rules.append([_selector(edit), str(Variant(edit.variant, options))])
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


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file that a path means: a folder holds `regraft.json`."""
    file = Path(path)
    return file / FILE_NAME if file.is_dir() else file

"""The grafts of a model beside its checkpoint: `regraft.json`."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import FileError
from regraft.find.inspect import look
from regraft.graft.apply import Report, graft_rules
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
    return graft_rules(model, made, saved=lambda keys: _saved_tensors(file.parent, keys))


def _saved_tensors(folder: Path, keys: list[str]) -> dict[str, Tensor]:
    """The tensors that the weights in a folder have for these keys, as `save_pretrained` writes them."""
    if not keys:
        return {}
    files = dict.fromkeys(keys, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(files[key] for key in keys if key in files):
        if (folder / name).is_file():
            with importlib.import_module("safetensors").safe_open(folder / name, "pt") as opened:
                present = set(opened.keys()).intersection(keys)
                tensors |= {key: opened.get_tensor(key) for key in present}
    pickled = folder / "pytorch_model.bin"
    if not tensors and pickled.is_file():
        whole = torch.load(pickled, map_location="cpu", weights_only=True)
        tensors = {key: whole[key] for key in keys if key in whole}
    return tensors


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

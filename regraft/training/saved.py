"""What regraft does to a model, beside its checkpoint: its grafts and R-Drop, in `regraft.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from regraft.errors import FileError, LossError
from regraft.find.walk import inner_model
from regraft.graft import save
from regraft.graft.apply import Report
from regraft.training.rdrop.criterion import RDropCriterion
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop import graft_rdrop
from regraft.training.rdrop.state import state_of

_RDROP = "rdrop"


def save_plan(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the grafts that a model has as a plan, and the options of its R-Drop; returns the file.

    Of a criterion only its name is written: `load_plan` has to be given it again.

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
    file = save.save_plan(model, path)
    state = state_of(model)
    if state is not None:
        values = {**json.loads(file.read_text(encoding="utf-8")), _RDROP: state.options.to_dict()}
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return file


def load_plan(
    model: nn.Module, path: str | os.PathLike[str], *, criterion: Callable[..., Any] | None = None
) -> Report:
    """Give a model the grafts and the R-Drop that `save_plan` wrote; returns the report.

    State of the grafts (mixout's weights, learned rates and gates) is read from the weights that lie in the
    same folder, `model.safetensors` or `pytorch_model.bin`. Where there are none, it has to be loaded with
    the model's state dict: until then a training forward raises.

    Args:
        model: of the architecture that the plan was made for.
        path: the file, or the folder that holds `regraft.json`.
        criterion: of R-Drop, where it was made with one; of `regraft.rdrop_criterion` what that returns for
            this model, whose options are then those of the file.

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
        LossError: R-Drop was made with a criterion, and none is given; nothing was changed.
        MisfitError: the plan was made for another model (also a ValueError).
    """
    values = _rdrop_in(path)
    options = None if values is None else _options(values, model, criterion)
    report = save.load_plan(model, path)
    if options is not None:
        graft_rdrop(model, options)
    return report


def _options(values: dict[str, Any], model: nn.Module, criterion: Any) -> RDropOptions:
    if not values.get("outside"):
        return RDropOptions.from_dict(values, criterion)
    if not isinstance(criterion, RDropCriterion) or criterion.model is not inner_model(model)[0]:
        raise LossError(
            f"R-Drop was made by rdrop_criterion with {values.get('criterion')}, which a file cannot hold",
            remedy="criterion = regraft.rdrop_criterion(model, ...), then "
            "regraft.load_plan(model, path, criterion=criterion)",
        )
    return RDropOptions.from_dict(values, criterion.criterion)


def _rdrop_in(path: str | os.PathLike[str]) -> Any:
    """The options of R-Drop in a file that is a plan; None if it has none, or is none."""
    try:
        values = json.loads(save.file_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # which reading the plan says better
    found = values.get(_RDROP) if isinstance(values, dict) else None
    if found is not None and not isinstance(found, dict):
        raise FileError(f"the options of R-Drop are a {type(found).__name__}", where=str(path))
    return found

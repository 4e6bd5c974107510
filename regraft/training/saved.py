"""All that regraft does to a model, beside its checkpoint: the file `regraft.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from regraft.errors import FileError, LossError, OptionError
from regraft.find.walk import inner_model, named_modules
from regraft.graft import save
from regraft.graft.apply import Report
from regraft.graft.graph_nodes import placed_grafts
from regraft.graft.revert import revert
from regraft.training.max_norm import MaxNorm, limits_on, restore_limits
from regraft.training.rdrop.criterion import RDropCriterion
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop import graft_rdrop
from regraft.training.rdrop.state import state_of
from regraft.training.schedule import Schedule, restore_schedule, schedules_on


class LoadReport(Report):
    """What `regraft.load_plan` returns: the report of the grafts, and what else was put back.

    Attributes:
        schedules: of rates, at the step where they were; call their `step` as before.
        max_norms: the limits on weights, each with the bounds that it had.
    """

    schedules: tuple[Schedule, ...] = ()
    max_norms: tuple[MaxNorm, ...] = ()


def save_plan(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write all that regraft does to a model: grafts, R-Drop, schedules and max-norm; returns the file.

    Grafts are written as a plan, schedules and max-norm with their present state. Of a criterion only its
    name is written: `load_plan` has to be given it again, and max-norm's optimizer.

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
    root, state = inner_model(model)[0], state_of(model)
    more = {
        "rdrop": None if state is None else state.options.to_dict(),
        "schedules": schedules_on(root),
        "max_norm": limits_on(root),
    }
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {key: value for key, value in more.items() if value is not None}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return file


def load_plan(
    model: nn.Module,
    path: str | os.PathLike[str],
    optimizer: Any = None,
    *,
    criterion: Callable[..., Any] | None = None,
) -> LoadReport:
    """Give a model what `save_plan` wrote: grafts, R-Drop, schedules and max-norm; returns the report.

    State of the grafts (mixout's weights, learned rates and gates) is read from the weights that lie in the
    same folder, `model.safetensors` or `pytorch_model.bin`. Where there are none, it has to be loaded with
    the model's state dict: until then a training forward raises.

    Args:
        model: of the architecture that the plan was made for.
        path: the file, or the folder that holds `regraft.json`.
        optimizer: of max-norm, where the plan has one.
        criterion: of R-Drop, where it was made with one; of `regraft.rdrop_criterion` what that returns for
            this model, whose options are then those of the file.

    Returns:
        The report; `.schedules` and `.max_norms` are those that were put back.

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
        OptionError: the plan has max-norm, and no optimizer is given; nothing was changed.
        MisfitError: the plan was made for another model (also a ValueError).
    """
    rdrop, schedules, limits = _more_in(path)
    options = None if rdrop is None else _options(rdrop, model, criterion)
    if limits and optimizer is None:
        raise OptionError(
            "the plan has max-norm, which acts after the steps of an optimizer, and none is given",
            where=str(path),
            remedy="regraft.load_plan(model, path, optimizer=optimizer)",
        )
    plain = next(placed_grafts(named_modules(inner_model(model)[0])), None) is None
    report = LoadReport(**vars(save.load_plan(model, path)))
    try:
        if options is not None:
            graft_rdrop(model, options)
        report.schedules = tuple(restore_schedule(model, state) for state in schedules)
        report.max_norms = tuple(restore_limits(model, state, optimizer) for state in limits)
    except BaseException:
        if plain:
            revert(model)
        raise
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


def _more_in(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, list[Any], list[Any]]:
    """What a plan has beside its grafts: R-Drop's options, and the states of schedules and of max-norm."""
    try:
        values = json.loads(save.file_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, [], []  # which reading the plan says better
    values = values if isinstance(values, dict) else {}
    rdrop, schedules, limits = (values.get(key) for key in ("rdrop", "schedules", "max_norm"))
    if rdrop is not None and not isinstance(rdrop, dict):
        raise FileError(f"the options of R-Drop are a {type(rdrop).__name__}", where=str(path))
    needed = {"schedules": {"steps_done", "curve", "bases", "temporary"}, "max_norm": {"rules", "bounds"}}
    for key, names in needed.items():
        states = values.get(key) or []
        if not isinstance(states, list) or any(not isinstance(x, dict) or names - x.keys() for x in states):
            raise FileError(f"{key!r} is not what save_plan wrote", where=str(path))
    return rdrop, schedules or [], limits or []

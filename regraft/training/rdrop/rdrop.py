"""`regraft.rdrop`: a model that trains with R-Drop by itself, whatever trains it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regraft.errors import LossError, ModelError, RateError
from regraft.find.inspect import inspect as inspect_sites
from regraft.find.walk import inner_model
from regraft.graft.classes import Namespace
from regraft.graft.slots import set_graft
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.training.passes.api import check_strategy
from regraft.training.passes.reentrancy import is_passing
from regraft.training.rdrop.labels import TASKS, check_options
from regraft.training.rdrop.objective import Objective, rdrop_forward
from regraft.training.rdrop.rdrop_loss import RDropTerms

PASSES = Slot("passes")
_KEY = str(PASSES)


def rdrop(
    model: nn.Module,
    alpha: float = 1.0,
    passes: int = 2,
    criterion: Callable[..., Any] | None = None,
    *,
    task: str | None = None,
    ce: str = "sum",
    reduction: str = "batchmean",
    shift: bool | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    strategy: str = "auto",
    chunk: int | None = None,
    inputs: Any = None,
) -> nn.Module:
    """Make a model train with R-Drop, in place: any loop that trains it then does, unchanged.

    In training its forward makes `passes` passes and returns the R-Drop loss and the first pass's
    outputs; in eval it is the model. A second call takes the first one's place, other grafts stay, and
    `regraft.revert(model)` undoes it. `alpha=0, passes=8, ce="mean"` is multi-sample dropout as its paper
    has it.

    Args:
        model: one that takes `labels` and returns a loss, as those of Transformers do; any other with a
            `criterion`. DDP and compiled wrappers are looked into.
        alpha: weight of the KL between the passes.
        passes: how many.
        criterion: `criterion(logits, labels)`, the loss of one pass. In training the model is then called
            with its own inputs and `labels=`, and returns `(loss, logits)`.
        task: "classification", "multilabel" or "regression", where the labels do not tell; see
            `regraft.rdrop_loss`.
        ce: "sum" or "mean", see `regraft.rdrop_loss`.
        reduction: of the KL, see `regraft.rdrop_loss`.
        shift: whether position t predicts label t + 1. By default found out from the model's own loss.
        label_smoothing: of the cross-entropy; Trainer's own `label_smoothing_factor` takes the labels away
            from the model.
        ignore_index: positions with this label count in neither term.
        strategy: of the passes, see `regraft.stochastic_passes`.
        chunk: of the passes, likewise.
        inputs: for the look at which dropouts run, see `regraft.inspect`.

    Returns:
        The model.

    Raises:
        ModelError: a model that returns no loss by itself, without a criterion.
        LossError: in training, outputs and labels that R-Drop is not defined for.

    Warns:
        If every rate is 0: the passes would be equal, and the KL 0.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"; Inoue 2019,
        "Multi-Sample Dropout for Accelerated Training and Better Generalization".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3))
        >>> model = regraft.rdrop(net, alpha=1.0, criterion=nn.functional.cross_entropy)
        >>> loss, logits = model(torch.ones(2, 4), labels=torch.tensor([0, 2]))
        >>> logits.shape
        torch.Size([2, 3])
    """
    objective = Objective(
        alpha=alpha,
        passes=passes,
        criterion=criterion,
        task=task,
        ce=ce,
        reduction=reduction,
        shift=shift,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        strategy=strategy,
        chunk=passes if chunk is None else chunk,
    )
    _check(objective)
    root, _ = inner_model(model)
    if criterion is None:
        _check_returns_loss(root)
    _warn_of_no_noise(model, inputs)
    previous = set_graft(root, PASSES, Graft(PASSES, Layer(passes_layer), options={"objective": objective}))
    if _is_bypassed(root):
        set_graft(root, PASSES, previous)
        raise ModelError(
            f"{type(root).__name__}'s forward was replaced on the model itself, and would never reach R-Drop",
            where="accelerate does so in mixed precision",
            remedy="call regraft.rdrop before accelerator.prepare, or before the Trainer is made",
        )
    return model


def _check(what: Objective) -> None:
    """Raise for settings that no model could be trained with."""
    check_options(what.alpha, what.ce, what.reduction, what.label_smoothing)
    check_strategy(what.strategy)
    if what.reduction == "none":
        raise LossError('a model trains on one number: reduction is "batchmean" or "sum"')
    passes: Any = what.passes
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < (2 if what.alpha else 1):
        raise RateError(f"passes={passes!r} is too few", remedy="R-Drop compares 2 or more")
    if what.task is not None and what.task not in TASKS:
        raise LossError(f"task={what.task!r} is not one of {', '.join(map(repr, TASKS))}")


@contextmanager
def _entered_once(model: nn.Module) -> Iterator[None]:
    """Take accelerate's wrapped forward off the instance while it runs.

    It enters one and the same autocast object each time: entered again inside itself, for a pass or a
    look at the model, the object forgets that autocast was off before, and leaves it on for good.
    """
    wrapped = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def passes_layer(base: type[nn.Module]) -> Namespace:
    """The layer of R-Drop: in training the forward makes passes and returns their loss."""
    own = base.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graft: Graft | None = self.__dict__.get(RECORD, {}).get(_KEY)
        if graft is None or is_passing(self):
            return own(self, *args, **kwargs)
        with _entered_once(self):
            return rdrop_forward(
                self, functools.partial(own, self), graft.options["objective"], (args, kwargs)
            )

    return {"forward": forward}


def _is_bypassed(model: nn.Module) -> bool:
    """Whether a forward on the instance was made of one that is not the grafted class's."""
    function: Any = model.__dict__.get("forward")
    if function is None or "_old_forward" in model.__dict__:
        return False  # accelerate's hooks call `_old_forward`, which every graft binds anew
    while function is not None:
        function = getattr(function, "__func__", function)
        if function is type(model).forward:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def without_rdrop(model: nn.Module) -> nn.Module:
    """The model without R-Drop; its other grafts stay."""
    root, _ = inner_model(model)
    if _KEY in grafts_of(root):
        set_graft(root, PASSES, None)
    return model


class RDropLog:
    """Means of R-Drop's two terms over steps, which cost no wait for a GPU before they are asked for."""

    def __init__(self) -> None:
        self.objective: Objective | None = None
        self._steps: list[RDropTerms] = []

    def watch(self, model: nn.Module) -> None:
        """From here on it is this model's steps."""
        self.objective = objective_of(model)
        self._steps = []

    def step(self) -> None:
        """A step was made."""
        if self.objective is not None and self.objective.terms is not None:
            self._steps.append(self.objective.terms)

    def means(self) -> dict[str, float]:
        """`task_loss` and `kl` since the last call; nothing if no step was made."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        names = ("task_loss", "kl")
        return {
            name: float(torch.stack(each).mean())
            for name, each in zip(names, zip(*steps, strict=True), strict=True)
        }


def _check_returns_loss(model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    if "labels" in parameters:
        return
    name = type(model).__name__
    several = [one for one in parameters if one.endswith(("_positions", "_labels"))]
    if several:
        raise ModelError(
            f"{name} has several outputs and losses ({', '.join(several)}): R-Drop is defined for one",
            where=f"{name}.forward",
            remedy="make the passes by regraft.stochastic_passes and add the rdrop_loss of each output",
        )
    raise ModelError(
        f"{name} takes no labels, so it returns no loss by itself",
        where=f"{name}.forward",
        remedy="regraft.rdrop(model, criterion=torch.nn.functional.cross_entropy), then in training "
        "loss, logits = model(x, labels=y)",
    )


def _warn_of_no_noise(model: nn.Module, inputs: Any) -> None:
    sites = inspect_sites(model, inputs).sites
    noise = [site for site in sites if site.family in ("Dropout", "DropPath") or site.variant]
    if any((site.p or site.variant) and site.calls != 0 for site in noise):
        return
    there = f"all {len(noise)} dropout sites are at rate 0 or never run" if noise else "it has no dropout"
    warnings.warn(
        f"R-Drop on {type(inner_model(model)[0]).__name__} has nothing to compare, {there}: the passes are "
        "equal and the KL is 0. Build the model with rates above 0, or give them one: "
        "regraft.apply(model, {'Dropout': 'dropout(p=0.1)'})",
        stacklevel=3,
    )


def objective_of(model: nn.Module) -> Objective | None:
    """The objective of a model that `rdrop` grafted, with the terms of its last step; None for another."""
    graft = grafts_of(inner_model(model)[0]).get(_KEY)
    return None if graft is None else graft.options["objective"]

"""`regraft.rdrop` and `regraft.rdrop_criterion`: a model that trains with R-Drop, whatever trains it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError, ModelError
from regraft.find.inspect import inspect as inspect_sites
from regraft.find.walk import inner_model, one_at_a_time
from regraft.training.rdrop.criterion import RDropCriterion
from regraft.training.rdrop.fields import argument_name
from regraft.training.rdrop.layer import arm
from regraft.training.rdrop.options import Key, RDropOptions
from regraft.training.rdrop.rdrop_loss import RDropTerms
from regraft.training.rdrop.state import RDrop, data_parallel, learn_from, state_of


def rdrop(
    model: nn.Module,
    alpha: float = 1.0,
    passes: int = 2,
    criterion: Callable[..., Any] | None = None,
    *,
    logits: Key | tuple[Key, ...] | None = None,
    loss: Key | None = None,
    labels: Key | tuple[Key, ...] = "labels",
    task: str | None = None,
    ce: str = "mean",
    reduction: str = "batchmean",
    shift: bool | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_axis: int | None = None,
    consistency: str = "labelled",
    strategy: str = "auto",
    chunk: int | None = None,
    fork: str | float | None = None,
    inputs: Any = None,
) -> nn.Module:
    """Make a model train with R-Drop, in place: any loop that trains it then does, unchanged.

    In training its forward makes `passes` passes and returns the R-Drop loss and the first pass's
    outputs; in eval it is the model. A second call takes the first one's place, other grafts stay, and
    `regraft.revert(model)` undoes it. `alpha=0, passes=8` is multi-sample dropout as its paper has it.

    The loss of each pass is the model's own. Where it has been shown to be the plain loss of its logits,
    by a few forwards without gradients at the first step, it is computed from the logits of all passes.
    That is compared with the model's own again every 100 steps, and a disagreement raises.

    Args:
        model: one that takes labels and returns a loss; for a loss outside the model see
            `regraft.rdrop_criterion`. DDP and compiled wrappers are looked into.
        alpha: weight of the KL between the passes.
        passes: how many.
        criterion: `criterion(logits, labels)`, the loss of one pass. In training the model is then called
            with its own inputs and `labels=`, and returns `(loss, logits)`.
        logits: the output to compare, by name or position; of several, a tuple: their KL is the mean.
            By default the one called logits.
        loss: the output that is the loss; naming it says that the model's own is always used.
        labels: the argument that holds the labels, by name or position; of several logits, a tuple.
        task: "classification", "multilabel" or "regression", where the labels do not tell; see
            `regraft.rdrop_loss`.
        ce: "mean" or "sum", see `regraft.rdrop_loss`.
        reduction: of the KL, see `regraft.rdrop_loss`.
        shift: whether position t predicts label t + 1. By default found out from the model's own loss.
        label_smoothing: of a plain cross-entropy. Trainer's own `label_smoothing_factor` will do as well:
            its loss is then computed from each pass.
        ignore_index: positions with this label count in neither term.
        consistency: "all" lets positions without a label count in the KL.
        class_axis: of one pass, see `regraft.rdrop_loss`.
        strategy: of the passes, see `regraft.stochastic_passes`.
        chunk: of the passes, likewise.
        fork: of the passes, likewise.
        inputs: for the look at which dropouts run, see `regraft.inspect`. A dict with labels also shows
            what the model's own loss is, which `torch.compile(fullgraph=True)` needs beforehand.

    Returns:
        The model.

    Raises:
        ModelError: a model that returns no loss by itself, without a criterion; in training, a forward
            that does not reach R-Drop, because a trainer replaced it.
        LossError: in training, no labels, outputs and labels that R-Drop is not defined for, or a loss
            that has changed.

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
    return graft_rdrop(model, RDropOptions.of(locals()), inputs)


def rdrop_criterion(
    model: nn.Module,
    criterion: Callable[..., Any],
    alpha: float = 1.0,
    passes: int = 2,
    *,
    logits: Key | None = None,
    task: str | None = None,
    ce: str = "mean",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    class_axis: int | None = None,
    consistency: str = "labelled",
    strategy: str = "auto",
    chunk: int | None = None,
    fork: str | float | None = None,
    inputs: Any = None,
) -> RDropCriterion:
    """A criterion with which a loop trains by R-Drop: `loss = criterion(model(x), y)` stays as it is.

    In training the model makes several passes and returns the first, in its ordinary type and shape. The
    criterion fetches the others, averages the losses of all and adds alpha * the KL. In eval, and without
    gradients, both are what they were. `regraft.revert(model)` undoes it.

    What the criterion is given must be what the model returned, or a part of it, at most reshaped or cast;
    anything else belongs into the criterion: `lambda outputs, y: loss(outputs.float().log_softmax(-1), y)`.

    Args:
        model: as it is trained; DDP and compiled wrappers are looked into.
        criterion: the loss of one pass, from the model's outputs and whatever else it takes. Those of torch
            and timm are read: what the logits mean, their class axis, and which labels they ignore.
        alpha: weight of the KL between the passes.
        passes: how many.
        logits: where the model returns several tensors, the one to compare, by name or position.
        task: what the logits mean, for any other criterion: "classification", "multilabel", "regression".
        shift: position t predicts label t + 1.
        ce: "mean" or "sum", see `regraft.rdrop_loss`.
        reduction: of the KL, see `regraft.rdrop_loss`.
        ignore_index: positions with this label do not count in the KL.
        class_axis: of one pass.
        consistency: "all" lets positions without a label count in the KL.
        strategy: of the passes, see `regraft.stochastic_passes`.
        chunk: of the passes, likewise.
        fork: of the passes, likewise.
        inputs: for the look at which dropouts run, see `regraft.inspect`.

    Returns:
        A module that holds `criterion`; `.terms` are the two terms of the last step. The model is not one
        of its submodules.

    Raises:
        LossError: a criterion that is not known, without `task=`; in training, passes that were not
            fetched before the next forward, or outputs that are not the model's.
        ModelError: `nn.DataParallel`.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3))
        >>> criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), alpha=1.0)
        >>> loss = criterion(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.shape
        torch.Size([])
    """
    if not callable(criterion):
        raise LossError(
            f"criterion is a {type(criterion).__name__}, not a function of outputs and labels",
            remedy="criterion = rdrop_criterion(model, nn.CrossEntropyLoss()), once, before training",
        )
    if isinstance(model, nn.DataParallel):
        raise data_parallel()
    graft_rdrop(model, RDropOptions.of(locals(), outside=True), inputs)
    return RDropCriterion(inner_model(model)[0], criterion)


@one_at_a_time
def graft_rdrop(model: nn.Module, options: RDropOptions, inputs: Any = None) -> nn.Module:
    """What `rdrop` and `rdrop_criterion` do to a model, with their options as one value."""
    root, _ = inner_model(model)
    if options.criterion is None:
        options = _with_named_labels(root, options)
    state = RDrop(options)
    warn_of_no_noise(model, options.alpha, inputs)

    def learn() -> None:
        if (
            isinstance(inputs, Mapping)
            and options.criterion is None
            and inputs.get(state.labels[0]) is not None
        ):
            learn_from(root, inputs)

    arm(root, state, options.fork, learn)
    return model


class RDropLog:
    """Means of R-Drop's two terms over steps, which cost no wait for a GPU before they are asked for."""

    def __init__(self) -> None:
        self.state: RDrop | None = None
        self._parts: list[RDropTerms] = []
        self._steps: list[Tensor] = []

    def watch(self, model: nn.Module) -> None:
        """From here on it is this model's steps."""
        self.__init__()  # type: ignore[misc]
        self.state = state_of(model)

    def substep(self) -> None:
        """A step within a gradient accumulation was made."""
        if self.state is not None and self.state.terms is not None:
            self._parts.append(self.state.terms)

    def step(self) -> None:
        """A step was made: its terms are what its loss consists of, whatever the accumulation."""
        self.substep()
        if self._parts and self.state is not None:
            total = torch.stack([torch.stack(terms) for terms in self._parts]).sum(0)
            # With a count of items Trainer adds the losses up, else it divides each by their number.
            self._steps.append(total if self.state.counted else total / len(self._parts))
        self._parts = []

    def means(self) -> dict[str, float]:
        """`task_loss` and `kl` since the last call; nothing if no step was made."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        task, kl = torch.stack(steps).mean(0).tolist()
        return {"task_loss": task, "kl": kl}


def _with_named_labels(model: nn.Module, options: RDropOptions) -> RDropOptions:
    """The options with the labels' arguments by name, which the model has to have."""
    parameters = inspect.signature(model.forward).parameters
    name = type(model).__name__
    if options.labels != "labels" or "labels" in parameters:
        names = tuple(argument_name(model.forward, key) for key in options.label_keys)
        return replace(options, labels=names if isinstance(options.labels, tuple) else names[0])
    several = [other for other in parameters if other.endswith(("_positions", "_labels"))]
    if several:
        raise ModelError(
            f"{name} has several outputs and losses ({', '.join(several)}): which are compared?",
            where=f"{name}.forward",
            remedy=f"name them: regraft.rdrop(model, logits=(...), labels={tuple(several)!r})",
        )
    raise ModelError(
        f"{name} takes no labels, so it returns no loss by itself",
        where=f"{name}.forward({', '.join(parameters)})",
        remedy="for criterion(model(x), y): criterion = regraft.rdrop_criterion(model, criterion); for "
        "labels of another name: regraft.rdrop(model, labels='targets', logits=0, loss=1)",
    )


def warn_of_no_noise(model: nn.Module, alpha: float, inputs: Any) -> None:
    """Say that passes of a model would all be equal."""
    sites = inspect_sites(model, inputs).sites
    noise = [site for site in sites if site.family in ("Dropout", "DropPath") or site.variant]
    if not alpha or any((site.p or site.variant) and site.calls != 0 for site in noise):
        return
    there = f"all {len(noise)} dropout sites are at rate 0 or never run" if noise else "it has no dropout"
    warnings.warn(
        f"R-Drop on {type(inner_model(model)[0]).__name__} has nothing to compare, {there}: the passes are "
        "equal and the KL is 0. Build the model with rates above 0, or give them one: "
        "regraft.apply(model, {'Dropout': 'dropout(p=0.1)'})",
        stacklevel=5,
    )

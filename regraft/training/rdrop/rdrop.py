"""`regraft.rdrop`: a model that trains with R-Drop by itself, whatever trains it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regraft.errors import LossError, ModelError
from regraft.find.inspect import inspect as inspect_sites
from regraft.find.locks import one_at_a_time
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.find.walk import inner_model
from regraft.training.passes.api import run_passes
from regraft.training.passes.outputs import pass_of
from regraft.training.rdrop.criteria import Reading, compared_positions, read_criterion
from regraft.training.rdrop.fields import argument_name, logits_in, loss_in, named_call, with_loss
from regraft.training.rdrop.infer_loss import (
    OwnLoss,
    disagreement,
    infer_loss,
    problem_of,
    without_labels,
)
from regraft.training.rdrop.labels import infer_task
from regraft.training.rdrop.layer import Call, Forward, arm, armed
from regraft.training.rdrop.options import Key, RDropOptions
from regraft.training.rdrop.rdrop_loss import RDropTerms, divergence, rdrop_terms

_CHECK_EVERY = 100
"""Steps after which the model's own loss is compared with the plain one again: one forward of 600."""


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
        label_smoothing: of a plain cross-entropy. Trainer's own `label_smoothing_factor` takes the labels
            away from the model.
        ignore_index: positions with this label count in neither term.
        class_axis: of one pass, see `regraft.rdrop_loss`.
        consistency: "all" lets positions without a label count in the KL.
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
    options = RDropOptions(
        alpha=alpha,
        passes=passes,
        criterion=criterion,
        logits=logits,
        loss=loss,
        labels=labels,
        task=task,
        ce=ce,
        reduction=reduction,
        shift=shift,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        class_axis=class_axis,
        consistency=consistency,
        strategy=strategy,
        chunk=chunk,
        fork=fork,
    )
    return graft_rdrop(model, options, inputs)


@one_at_a_time
def graft_rdrop(model: nn.Module, options: RDropOptions, inputs: Any = None) -> nn.Module:
    """What `rdrop` does, with its options as one value."""
    root, _ = inner_model(model)
    if options.criterion is None:
        options = _with_named_labels(root, options)
    state = RDrop(options)
    warn_of_no_noise(model, options.alpha, inputs)
    arm(root, state, options.fork)
    if isinstance(inputs, Mapping) and options.criterion is None and inputs.get(state.labels[0]) is not None:
        _learn_from(root, inputs)
    return model


class RDropOutput(NamedTuple):
    """What a model with a criterion returns when it is called with labels."""

    loss: Tensor
    logits: Any


class RDrop:
    """The passes of `regraft.rdrop`, and what its steps have shown.

    Attributes:
        options: as given.
        labels: names of the arguments that hold labels.
        own: what the model's own loss is; None before the first step, and with a criterion.
        terms: the task's loss and the KL of the last step, for a log.
        counted: whether that step was given a count of items.
        reached: see `Passes`.
    """

    def __init__(self, options: RDropOptions) -> None:
        if options.reduction == "none":
            raise LossError('a model trains on one number: reduction is "batchmean" or "sum"')
        self.options = self.resolved = options
        self.labels = tuple(map(str, _each(options.labels)))
        self.reading: Reading | None = None
        if options.criterion is not None and options.alpha:
            self.reading = read_criterion(options.criterion, options)
        self.own: OwnLoss | None = None
        self.terms: RDropTerms | None = None
        self.counted = False
        self.reached = False
        self.learning = False
        self.steps = 0

    def before_tracing(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn what the model's loss is outside the compiler."""
        if self.options.criterion is None and self.own is None:
            _learn_outside(model, args, kwargs)

    def forward(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """R-Drop's forward in training with gradients, else the model's own."""
        self.reached = True
        if self.options.criterion is not None:
            return self._with_criterion(model, forward, call)
        if not model.training or not (self.learning or torch.is_grad_enabled()):
            return forward(*call[0], **call[1])
        call = self._named(forward, call)
        if any(call[1].get(name) is None for name in self.labels):
            raise _no_labels(model, self.labels)
        self.counted = call[1].get("num_items_in_batch") is not None
        self._look_at_loss(model, forward, call)
        if self.learning:
            return forward(*call[0], **call[1])
        plain = self.own is not None and self.own.plain
        return (self._by_logits if plain else self._by_own_loss)(model, forward, call)

    def _named(self, forward: Forward, call: Call) -> Call:
        if call[1].get("fused_lm_head"):
            raise ModelError(
                "TRL's trainers compute the loss from a fused head, without logits to compare",
                where="SFTTrainer.compute_loss",
                remedy="SFTTrainer(compute_loss_func=regraft.rdrop_criterion(model, ...)) instead of rdrop",
            )
        return named_call(forward, call)

    def _look_at_loss(self, model: nn.Module, forward: Forward, call: Call) -> None:
        """Find out what the model's own loss is; every so often, whether it still is."""
        if torch.compiler.is_compiling():
            if self.own is None:
                raise LossError(
                    "what the model's own loss is has to be known before it is compiled",
                    remedy="regraft.rdrop(model, inputs=batch), with a batch that has labels",
                )
            return
        self.steps += 1
        unseen = self.own is not None and self.own.items is None and "num_items_in_batch" in call[1]
        if self.own is None or unseen:
            if isinstance(self.options.logits, tuple):
                self.own = OwnLoss(False, False, False, "there are several outputs")
            else:
                self.own = infer_loss(model, forward, call, self.options)
            shift = None if self.own is None else self.own.shift
            task = self.options.task or problem_of(model)
            self.resolved = replace(self.options, shift=shift, task=task)
        elif self.own.plain and self.steps % _CHECK_EVERY == 0 and not self.options.label_smoothing:
            differs = disagreement(model, forward, call, self.options, self.own)
            if differs is not None:
                raise LossError(
                    f"{type(model).__name__}'s own loss is no longer the plain loss of its logits: {differs}",
                    where=f"step {self.steps}",
                    remedy="regraft.rdrop(model, loss='loss') uses the model's own from the first step on",
                )

    def _outputs(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        return passes_of(model, forward, call, self.options)

    def _items(self, kwargs: dict[str, Any]) -> Any:
        """What the terms are divided by, where the model's own loss is too."""
        return kwargs.get("num_items_in_batch") if self.own is None or self.own.items else None

    def _finish(self, task: Tensor, kl: Tensor) -> Tensor:
        self.terms = RDropTerms(task.detach(), kl.detach())
        return self.options.loss_of(task, kl)

    def _by_logits(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """The plain loss: the model computes none, and every strategy will do."""
        args, kwargs = call
        options, name = self.resolved, self.labels[0]
        outputs = self._outputs(model, forward, (args, without_labels(model, kwargs, name)))
        assert not isinstance(options.logits, tuple)
        logits = logits_in(outputs, options.logits, labelled=False, where=type(model).__name__)
        labels = kwargs[name].to(logits.device)
        terms = rdrop_terms(logits, labels, options, items=self._items(kwargs))
        return with_loss(pass_of(outputs, 0), self._finish(*terms), options.loss, labelled=False)

    def _by_own_loss(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """The model's own loss of each pass, and the KL of its logits."""
        options, kwargs = self.resolved, call[1]
        outputs = self._outputs(model, forward, call)
        own = loss_in(outputs, options.loss, dims=1)
        if own is None:
            raise LossError(
                f"{type(model).__name__} was given labels and returned no loss",
                remedy="name the output: loss=1 or loss='name'",
            )
        task = options.ce_weight * own.mean()
        kl = torch.zeros_like(task)
        if options.alpha:
            keys = options.logits if isinstance(options.logits, tuple) else (options.logits,)
            names = self.labels if len(self.labels) == len(keys) else self.labels * len(keys)
            parts = [
                self._divergence(model, logits_in(outputs, key, labelled=True), kwargs, name)
                for key, name in zip(keys, names, strict=True)
            ]
            kl = torch.stack(parts).mean()
        return with_loss(pass_of(outputs, 0), self._finish(task, kl), options.loss, labelled=True)

    def _divergence(self, model: nn.Module, logits: Tensor, kwargs: dict[str, Any], name: str) -> Tensor:
        options, labels = self.resolved, kwargs[name].to(logits.device)
        task = options.task or problem_of(model) or infer_task(logits, labels, options.ignore_index)
        if isinstance(options.logits, tuple):
            # Positions beyond the end are how question answering marks an answer that was cut off.
            labels = labels.where(labels < logits.shape[-1], options.ignore_index)
        axis = -1 if options.class_axis is None else options.class_axis
        reading = Reading(task, axis, options.ignore_index)
        logits, compared = compared_positions(logits, labels, reading, options)
        mask = kwargs.get("attention_mask")
        if options.consistency == "all" and isinstance(mask, Tensor) and mask.shape == compared.shape:
            compared = mask.bool()
        return divergence(logits, compared, options, task, self._items(kwargs))

    def _with_criterion(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        args, kwargs = call
        rest = {name: value for name, value in kwargs.items() if name != self.labels[0]}
        labels = kwargs.get(self.labels[0])
        criterion: Any = self.options.criterion
        trains = model.training and torch.is_grad_enabled()
        if labels is None:
            if trains:
                raise _no_labels(model, self.labels, criterion=True)
            return forward(*args, **rest)
        if not trains:
            outputs = forward(*args, **rest)
            return RDropOutput(criterion(outputs, labels), outputs)
        outputs = self._outputs(model, forward, (args, rest))
        each = [criterion(pass_of(outputs, i), labels) for i in range(self.options.passes)]
        task = mean_loss(each, self.options)
        kl = torch.zeros_like(task)
        if self.reading is not None:
            key = self.options.logits
            assert not isinstance(key, tuple)
            logits = logits_in(outputs, key, labelled=False, where=type(model).__name__)
            kl = criterion_divergence(logits, labels, self.reading, self.options)
        return RDropOutput(self._finish(task, kl), pass_of(outputs, 0))


def passes_of(model: nn.Module, forward: Forward, call: Call, options: RDropOptions) -> Any:
    """The outputs of all passes, stacked."""
    chunk = options.passes if options.chunk is None else options.chunk
    settings: dict[str, Any] = {"strategy": options.strategy, "chunk": chunk, "fork": options.fork}
    return run_passes(model, forward, options.passes, call, **settings)


def mean_loss(losses: list[Any], options: RDropOptions) -> Tensor:
    """The first term, of the criterion's loss of each pass."""
    if any(not isinstance(loss, Tensor) or loss.dim() for loss in losses):
        raise LossError("the criterion gives no single number", remedy="reduce it: reduction='mean'")
    return options.ce_weight * torch.stack(losses).mean()


def criterion_divergence(
    logits: Tensor, labels: Any, reading: Reading, options: RDropOptions, items: Any = None
) -> Tensor:
    """The KL term of what a criterion compares."""
    logits, compared = compared_positions(logits, labels, reading, options)
    return divergence(logits, compared, options, reading.task, items)


def _no_labels(model: nn.Module, names: tuple[str, ...], *, criterion: bool = False) -> LossError:
    name, given = type(model).__name__, ", ".join(f"{name}=y" for name in names)
    return LossError(
        f"{name} is grafted with R-Drop, and this training forward was given no {' and '.join(names)}",
        where="labels are given by name"
        if criterion
        else "Trainer's label_smoothing_factor and compute_loss_func take the labels away from the model",
        remedy=f"{'loss, logits = ' if criterion else ''}model(x, {given}); "
        + ("" if criterion else "smoothing is regraft.rdrop(model, label_smoothing=...); ")
        + "for a loss outside the model (compute_loss_func) regraft.rdrop_criterion(model, criterion)",
    )


def _each(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _learn_from(root: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Learn what the model's own loss is from one batch, as in training."""
    flags = [(module, module.training) for module in root.modules()]
    root.train()
    try:
        _learn_outside(root, (), dict(inputs))
    finally:
        for module, training in flags:
            module.training = training


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _learn_outside(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward that looks at the model's loss and trains nothing.

    Called while a compiler records a training step, it breaks the graph, once: the next step is recorded
    whole. With `fullgraph=True` give `regraft.rdrop` a batch as `inputs`.
    """
    state: RDrop = armed(model)
    state.learning = True
    try:
        with torch.no_grad(), random_state_kept(), buffers_kept(list(model.modules())):
            model(*args, **kwargs)
    finally:
        state.learning = False


def state_of(model: nn.Module) -> RDrop | None:
    """What `rdrop` put on a model, with the terms of its last step; None without it."""
    state = armed(inner_model(model)[0])
    return state if isinstance(state, RDrop) else None


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
        names = tuple(argument_name(model.forward, key) for key in _each(options.labels))
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

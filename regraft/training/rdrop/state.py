"""What `rdrop` and `rdrop_criterion` put on a model: the passes of a training step, and their loss."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regraft.errors import LossError, ModelError
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.find.walk import inner_model
from regraft.training.passes.api import run_passes
from regraft.training.passes.nested import pass_of
from regraft.training.rdrop.criterion import RDropCriterion, Reading, divergence_of, read_criterion
from regraft.training.rdrop.fields import logits_in, loss_in, named_call, with_loss
from regraft.training.rdrop.infer_loss import (
    OwnLoss,
    disagreement,
    infer_loss,
    problem_of,
    without_labels,
)
from regraft.training.rdrop.labels import infer_task
from regraft.training.rdrop.layer import Call, Forward, armed
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.own_loss import OwnCrossEntropies, is_large
from regraft.training.rdrop.rdrop_loss import RDropTerms, rdrop_terms

_CHECK_EVERY = 100
"""Steps after which the model's own loss is compared with the plain one again: one forward of 600."""


class RDropOutput(NamedTuple):
    """What a model with a criterion returns when it is called with labels."""

    loss: Tensor
    logits: Any


class RDrop:
    """The passes of a training step and their loss, and what the steps so far have shown.

    Attributes:
        options: as given.
        labels: names of the arguments that hold labels.
        outside: the loss is computed outside the model, by an `RDropCriterion`.
        reading: what a criterion compares; None where it is not needed.
        own: what the model's own loss is; None before the first step, and with a criterion.
        terms: the task's loss and the KL of the last step, for a log.
        counted: whether that step was given a count of items.
        reached: whether a forward came to it.
        large: whether the model's logits are, as far as is known.
        kept: the first pass and all passes of a forward whose loss is not computed yet.
    """

    def __init__(self, options: RDropOptions) -> None:
        if options.reduction == "none":
            raise LossError('a model trains on one number: reduction is "batchmean" or "sum"')
        self.options = self.resolved = options
        self.labels = tuple(map(str, options.label_keys))
        self.outside = options.outside
        self.reading: Reading | None = None
        if options.criterion is not None and options.alpha:
            self.reading = read_criterion(options.criterion, options)
        self.own: OwnLoss | None = None
        self.terms: RDropTerms | None = None
        self.counted = self.reached = self.learning = False
        self.large = True
        self.steps = 0
        self.kept: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # graphs can be neither copied nor pickled

    def before_tracing(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn what the model's loss is outside the compiler."""
        if self.options.criterion is None and self.own is None:
            _learn_outside(model, args, kwargs)

    def forward(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """R-Drop's forward in training with gradients, else the model's own."""
        self.reached = True
        trains = model.training and (self.learning or torch.is_grad_enabled())
        if self.options.criterion is not None and not self.outside:
            return self._with_criterion(model, forward, call, trains)
        if not trains:
            return forward(*call[0], **call[1])
        if not self.outside:
            call = named_call(forward, call)
            if call[1].get("fused_lm_head"):
                raise ModelError(
                    "TRL's trainers compute the loss from a fused head, without logits to compare",
                    where="SFTTrainer.compute_loss",
                    remedy="SFTTrainer(..., callbacks=[RDropCallback()]) instead of rdrop, or "
                    "compute_loss_func=regraft.rdrop_criterion(model, ...)",
                )
            if any(call[1].get(name) is None for name in self.labels):
                compiling = torch.compiler.is_compiling()
                if compiling or not self.take_over(model, *_loss_of_trainer()):
                    raise _no_labels(model, self.labels)
        if self.outside:
            return self._first_pass(model, forward, call)
        self.counted = call[1].get("num_items_in_batch") is not None
        self._look_at_loss(model, forward, call)
        if self.learning:
            return forward(*call[0], **call[1])
        plain = self.own is not None and self.own.plain
        return (self._by_logits if plain else self._by_own_loss)(model, forward, call)

    def take_over(self, model: nn.Module, trainer: Any, name: str) -> bool:
        """Whether the loss that this Trainer computes from the outputs is R-Drop's from now on."""
        criterion = getattr(trainer, name, None)
        if criterion is None or self.options.label_smoothing:
            return False
        if isinstance(criterion, RDropCriterion):
            criterion = criterion.criterion
        self.reading = read_criterion(criterion, self.options) if self.options.alpha else None
        setattr(trainer, name, RDropCriterion(model, criterion, strict=False))
        self.outside = True
        return True

    def _first_pass(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """The first pass; all are kept for the criterion."""
        if getattr(model, "_is_replica", False):
            raise data_parallel()
        if self.kept is not None:
            self.kept = None
            raise LossError(
                "the passes of the training forward before were never fetched: it would have trained plain",
                where=f"{type(model).__name__} grafted by regraft.rdrop_criterion",
                remedy="compute the loss with the criterion that rdrop_criterion returned, once after each "
                "forward; forwards that train nothing go under torch.no_grad()",
            )
        stacked = self._outputs(model, forward, call)
        self.kept = pass_of(stacked, 0), stacked
        return self.kept[0]

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
        """The outputs of all passes, stacked."""
        of, n = self.options, self.options.passes
        return run_passes(model, forward, n, call, strategy=of.strategy, chunk=of.chunk or n, fork=of.fork)

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
        several, passes = isinstance(options.logits, tuple), None
        if self.large and options.alpha and not several and not torch.compiler.is_compiling():
            passes = OwnCrossEntropies()
            forward = passes.around(forward, options.logits)  # type: ignore[arg-type]
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
            logits = [logits_in(outputs, key, labelled=True) for key in keys]
            self.large = any(map(is_large, logits))
            in_common = passes is not None and options.class_axis is None and passes.hold_the_outputs()
            by = passes.divergence if passes is not None and in_common else None
            parts = [self._divergence(x, kwargs, name, by) for x, name in zip(logits, names, strict=True)]
            kl = torch.stack(parts).mean()
        return with_loss(pass_of(outputs, 0), self._finish(task, kl), options.loss, labelled=True)

    def _divergence(self, logits: Tensor, kwargs: dict[str, Any], name: str, by: Any) -> Tensor:
        options, labels = self.resolved, kwargs[name].to(logits.device)
        task = options.task or infer_task(logits, labels, options.ignore_index)
        if isinstance(options.logits, tuple):
            # Positions beyond the end are how question answering marks an answer that was cut off.
            labels = labels.where(labels < logits.shape[-1], options.ignore_index)
        axis = -1 if options.class_axis is None else options.class_axis
        reading = Reading(task, axis, options.ignore_index)
        mask = kwargs.get("attention_mask")
        by = by if task == "classification" else None
        return divergence_of(logits, labels, reading, options, self._items(kwargs), mask, by)

    def _with_criterion(self, model: nn.Module, forward: Forward, call: Call, trains: bool) -> Any:
        args, kwargs = call
        rest = {name: value for name, value in kwargs.items() if name != self.labels[0]}
        labels = kwargs.get(self.labels[0])
        criterion: Any = self.options.criterion
        if not trains:
            outputs = forward(*args, **rest)
            return outputs if labels is None else RDropOutput(criterion(outputs, labels), outputs)
        if labels is None:
            raise _no_labels(model, self.labels, criterion=True)
        stacked = self._outputs(model, forward, (args, rest))
        first = pass_of(stacked, 0)
        return RDropOutput(self.loss_of(criterion, first, stacked, (labels,), {}), first)

    def loss_of(
        self, criterion: Callable[..., Any], first: Any, stacked: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """The loss of what a criterion is given of the first pass, and of all passes."""
        options = self.options
        others = [pass_of(stacked, i) for i in range(1, options.passes)]
        losses = [criterion(outputs, *args, **kwargs) for outputs in (first, *others)]
        if any(not isinstance(loss, Tensor) or loss.dim() for loss in losses):
            raise LossError("the criterion gives no single number", remedy="reduce it: reduction='mean'")
        task = options.ce_weight * torch.stack(losses).mean()
        kl = torch.zeros_like(task)
        items = kwargs.get("num_items_in_batch")
        self.counted = items is not None
        if self.reading is not None:
            key = None if isinstance(stacked, Tensor) else options.logits
            assert not isinstance(key, tuple)
            labels = args[0] if args else kwargs.get("labels")
            shift = kwargs.get("shift_labels", options.shift)  # as Trainer's label smoothing is told
            logits = logits_in(stacked, key, labelled=False)
            kl = divergence_of(logits, labels, self.reading, replace(options, shift=shift), items)
        return self._finish(task, kl)


def state_of(model: nn.Module) -> RDrop | None:
    """What `rdrop` or `rdrop_criterion` put on a model, with the terms of its last step; None without it."""
    state: RDrop | None = armed(inner_model(model)[0])
    return state


def use_logits(model: nn.Module) -> None:
    """Let a TRL trainer that calls this compute its loss from logits, by R-Drop."""
    root, state = inner_model(model)[0], state_of(model)
    if state is not None:
        state.take_over(root, *_fused_trainer(root))


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


def data_parallel() -> ModelError:
    """The error that copies of the model in threads are refused."""
    return ModelError(
        "nn.DataParallel runs copies of the model in threads, whose passes no criterion could fetch",
        where="nn.DataParallel",
        remedy="use DistributedDataParallel",
    )


def learn_from(root: nn.Module, inputs: Mapping[str, Any]) -> None:
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


def _loss_of_trainer() -> tuple[Any, str]:
    """The Trainer whose `compute_loss` runs, and which of its attributes computes the loss; None without.

    A subclass with a `compute_loss` of its own may have read the attribute already, as TRL's has.
    """
    module = sys.modules.get("transformers.trainer")
    code = None if module is None else inspect.unwrap(module.Trainer.compute_loss).__code__
    return next(((caller, _loss(caller)) for caller, running in _callers() if running is code), (None, ""))


def _fused_trainer(model: nn.Module) -> tuple[Any, str]:
    """The same of the TRL trainer that calls this, which computes its loss from logits from now on.

    It puts a forward with a fused head on the model, which gives no logits to compare. With a label
    smoothing of 0 it computes the same loss from logits, where its `loss_type` is "nll".
    """
    forwards = [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]
    codes = [getattr(getattr(forward, "__func__", forward), "__code__", None) for forward in forwards]
    if not any(code is not None and "fused_lm_head" in code.co_varnames for code in codes):
        return None, ""
    trainer = next(caller for caller, _ in _callers() if hasattr(caller, "label_smoother"))
    if trainer.label_smoother is None:
        from transformers.trainer_pt_utils import LabelSmoother

        trainer.label_smoother = LabelSmoother(epsilon=0.0)
    return trainer, _loss(trainer)


def _loss(trainer: Any) -> str:
    return "label_smoother" if trainer.compute_loss_func is None else "compute_loss_func"


def _callers() -> Iterator[tuple[Any, Any]]:
    """Objects whose methods are running, the innermost first, and the methods' code."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals["self"], frame.f_code
        frame = frame.f_back

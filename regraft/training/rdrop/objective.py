"""What a model grafted with R-Drop computes in training: its passes, the loss over them, its outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regraft.training.passes.api import run_passes
from regraft.training.passes.outputs import logits_of, loss_of, pass_of, with_loss
from regraft.training.rdrop.infer_loss import Call, learn, problem_of, with_named_labels, without_labels
from regraft.training.rdrop.rdrop_loss import RDropTerms, rdrop_terms

Forward = Callable[..., Any]
_TASK_OF_NAME = {
    "binarycross": "multilabel",
    "bce": "multilabel",
    "binary_cross": "multilabel",
    "cross_entropy": "classification",
    "crossentropy": "classification",
    "mse": "regression",
    "l1": "regression",
    "huber": "regression",
}


class RDropOutput(NamedTuple):
    """What a model with a criterion returns when it is called with labels."""

    loss: Tensor
    logits: Any


@dataclass
class Objective:
    """The options of one graft, and what its steps learnt.

    Attributes:
        own_loss: whether the model's own loss is another than the plain one of its task, and so is used;
            None before the first step.
        terms: the task's loss and the KL of the last step, for a log.
        told: whether it was said that labels are missing.
    """

    alpha: float
    passes: int
    criterion: Callable[..., Any] | None
    task: str | None
    ce: str
    reduction: str
    shift: bool | None
    label_smoothing: float
    ignore_index: int
    strategy: str
    chunk: int
    own_loss: bool | None = None
    terms: RDropTerms | None = None
    told: bool = False

    def outputs(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """The outputs of all passes, stacked."""
        return run_passes(model, forward, self.passes, call, strategy=self.strategy, chunk=self.chunk)

    def plain_terms(self, logits: Tensor, labels: Tensor, task: str | None, items: Any = None) -> RDropTerms:
        """R-Drop's terms of nothing but logits and labels."""
        return rdrop_terms(
            logits,
            labels.to(logits.device),
            self.alpha,
            task=self.task or task,
            ce=self.ce,
            reduction=self.reduction,
            shift=bool(self.shift),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            num_items_in_batch=items,
        )

    def total(self, task: Tensor, kl: Tensor) -> Tensor:
        """The loss; its terms are kept for a log."""
        self.terms = RDropTerms(task.detach(), kl.detach())
        return task + self.alpha * kl if self.alpha else task

    def tell(self, model: nn.Module) -> None:
        """Say once that a step in training had no labels."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"{type(model).__name__} is trained without labels, so without R-Drop: what takes the "
                "labels away (label smoothing) is to be an option of regraft.rdrop",
                stacklevel=2,
            )


def rdrop_forward(model: nn.Module, forward: Forward, objective: Objective, call: Call) -> Any:
    """One forward of a grafted model: R-Drop's in training with labels, else the model's own."""
    if objective.criterion is not None:
        return _with_criterion(model, forward, objective, call)
    args, kwargs = call = with_named_labels(forward, call) if model.training else call
    if not model.training:
        return forward(*args, **kwargs)
    if kwargs.get("labels") is None:
        objective.tell(model)
        return forward(*args, **kwargs)
    if objective.own_loss is None:
        _learn(model, forward, objective, call)
    way = _by_own_loss if objective.own_loss else _by_logits
    return way(model, forward, objective, call)


def _learn(model: nn.Module, forward: Forward, objective: Objective, call: Call) -> None:
    own, shift = learn(model, forward, call, task=objective.task, ignore_index=objective.ignore_index)
    # Smoothing is of the plain loss, whatever the model's own may be.
    objective.own_loss = own and not objective.label_smoothing
    if objective.shift is None:
        objective.shift = shift


def _by_logits(model: nn.Module, forward: Forward, objective: Objective, call: Call) -> Any:
    """The plain loss of the task: the model computes none, and every strategy will do."""
    args, kwargs = call
    outputs = objective.outputs(model, forward, (args, without_labels(model, kwargs)))
    logits = logits_of(outputs, labelled=False, where=type(model).__name__)
    items = kwargs.get("num_items_in_batch")
    terms = objective.plain_terms(logits, kwargs["labels"], problem_of(model), items)
    return with_loss(pass_of(outputs, 0), objective.total(*terms), labelled=False)


def _by_own_loss(model: nn.Module, forward: Forward, objective: Objective, call: Call) -> Any:
    """The model's own loss of each pass, and the KL of its logits."""
    _, kwargs = call
    outputs = objective.outputs(model, forward, call)
    own = loss_of(outputs)
    assert own is not None
    task = (2 if objective.ce == "sum" else 1) * own.mean()
    kl = torch.zeros_like(task)
    if objective.alpha:
        logits = logits_of(outputs, labelled=True, where=type(model).__name__)
        items = kwargs.get("num_items_in_batch")
        kl = objective.plain_terms(logits, kwargs["labels"], problem_of(model), items).kl
    return with_loss(pass_of(outputs, 0), objective.total(task, kl), labelled=True)


def _with_criterion(model: nn.Module, forward: Forward, objective: Objective, call: Call) -> Any:
    args, kwargs = call
    rest = {name: value for name, value in kwargs.items() if name != "labels"}
    labels = kwargs.get("labels")
    criterion: Any = objective.criterion
    if labels is None:
        if model.training:
            objective.tell(model)
        return forward(*args, **rest)
    if not model.training:
        outputs = forward(*args, **rest)
        return RDropOutput(criterion(outputs, labels), outputs)
    outputs = objective.outputs(model, forward, (args, rest))
    each = [criterion(pass_of(outputs, i), labels) for i in range(objective.passes)]
    task = (2 if objective.ce == "sum" else 1) * torch.stack(each).mean()
    kl = torch.zeros_like(task)
    if objective.alpha:
        logits = _classes_last(logits_of(outputs, labelled=False, where=type(model).__name__), labels)
        kl = objective.plain_terms(logits, labels, _task_of(criterion)).kl
    return RDropOutput(objective.total(task, kl), pass_of(outputs, 0))


def _task_of(criterion: Any) -> str | None:
    name = getattr(criterion, "__name__", type(criterion).__name__).lower()
    return next((task for part, task in _TASK_OF_NAME.items() if part in name), None)


def _classes_last(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of dense classification, (passes, batch, classes, ...), as the loss wants them."""
    dense = logits.dim() > 3 and labels.shape == (*logits.shape[1:2], *logits.shape[3:])
    return logits.movedim(2, -1) if dense and labels.shape != logits.shape[1:-1] else logits

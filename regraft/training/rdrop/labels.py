"""Whether labels fit logits: which task they mean, and every way in which they can be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regraft.errors import LossError, RateError, nearest

TASKS = ("classification", "multilabel", "regression")
REDUCTIONS = ("batchmean", "sum", "none")
_CE = ("sum", "mean")


def fitted(
    logits: Tensor,
    labels: Tensor,
    *,
    task: str | None,
    shift: bool,
    ignore_index: int,
    label_smoothing: float,
    weight: Tensor | None,
) -> tuple[str, Tensor, Tensor]:
    """The task, and logits and labels in the shapes its terms want, or LossError."""
    if shift:
        logits, labels = _shifted(logits, labels)
    task = task_of(task, logits, labels)
    check = {"classification": _classes, "multilabel": _label_columns, "regression": _values}[task]
    logits, labels = check(logits, labels, ignore_index)
    if task != "classification" and label_smoothing:
        raise LossError(f"label_smoothing is for classification, this is {task}", remedy="leave it at 0")
    if task == "regression" and weight is not None:
        raise LossError("weight has no meaning for regression", remedy="leave it out")
    if weight is not None and weight.shape != logits.shape[-1:]:
        raise LossError(f"weight of shape {tuple(weight.shape)}, for {logits.shape[-1]} {_COLUMNS[task]}")
    return task, logits, labels


_COLUMNS = {"classification": "classes", "multilabel": "labels"}


def check_options(alpha: float, ce: str, reduction: str, label_smoothing: float) -> None:
    """Raise for what no logits could make right."""
    if not isinstance(alpha, (int, float)) or not (alpha >= 0 and math.isfinite(alpha)):
        raise RateError(f"alpha={alpha!r} is not a number of 0 or more")
    if not 0 <= label_smoothing < 1:
        raise RateError(f"label_smoothing={label_smoothing!r} is not in [0, 1)")
    for name, value, known in (("ce", ce, _CE), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            listed = " or ".join(map(repr, known))
            raise LossError(f"{name}={value!r} is not {listed}", remedy=nearest(str(value), known))


def check_passes(logits: Tensor, labels: Tensor, alpha: float) -> None:
    if isinstance(logits, (tuple, list)):
        raise LossError(
            f"logits is a {type(logits).__name__} of {len(logits)}, not one tensor",
            remedy="stack the passes of one output: torch.stack([first, second]); for a model with several "
            "outputs add the rdrop_loss of each",
        )
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            remedy = "give its .logits" if hasattr(value, "logits") else "give a tensor"
            raise LossError(f"{name} is no tensor but a {type(value).__name__}", remedy=remedy)
    if not logits.is_floating_point():
        raise LossError(f"logits are {logits.dtype}, not floating point")
    if logits.dim() < 2 or len(logits) < (2 if alpha else 1):
        raise LossError(
            f"logits of shape {tuple(logits.shape)} hold no two passes",
            remedy="logits are (passes, batch, ..., classes): regraft.stochastic_passes(model, 2, ...) or "
            "torch.stack([first, second])",
        )


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.dim() < 4 or labels.dim() < 2:
        raise LossError(
            f"shift=True needs a time axis: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}",
            remedy="logits are (passes, batch, time, classes), labels (batch, time)",
        )
    return logits[..., :-1, :], labels[..., 1:]


def task_of(task: str | None, logits: Tensor, labels: Tensor) -> str:
    if task is not None:
        if task not in TASKS:
            listed = ", ".join(map(repr, TASKS))
            raise LossError(f"task={task!r} is not one of {listed}", remedy=nearest(str(task), TASKS))
        return task
    alike = labels.shape == logits.shape[1:] and logits.dim() > 2 and logits.shape[-1] > 1
    if labels.is_floating_point() or (labels.dtype == torch.bool and alike):
        return "multilabel" if alike else "regression"
    return "classification"


def _classes(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    soft = labels.is_floating_point()
    classes = logits.shape[-1]
    wanted = logits.shape[1:] if soft else logits.shape[1:-1]
    if labels.shape != wanted or logits.dim() < 3:
        raise LossError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}",
            where=f"classification of {classes} classes: labels {tuple(wanted)}",
            remedy=_reshape_remedy(logits, labels),
        )
    if classes == 1:
        raise LossError(
            "there is one class, whose loss is always 0",
            remedy='with labels.float(): for regression task="regression", for yes or no task="multilabel"',
        )
    if not soft and readable(labels):
        labelled = labels[labels != ignore_index]
        if labelled.numel() and not (labelled.min() >= 0 and labelled.max() < classes):
            raise LossError(
                f"labels from {labelled.min().item()} to {labelled.max().item()}, for {classes} classes",
                remedy=f"classes are 0 to {classes - 1}, positions to ignore {ignore_index}",
            )
    return logits, labels if soft else labels.long()


def _reshape_remedy(logits: Tensor, labels: Tensor) -> str:
    if labels.shape == logits.shape[1:]:
        return 'for several labels at once labels.float() (task="multilabel"); for classes labels.argmax(-1)'
    if labels.dim() > 1 and labels.shape == (*logits.shape[1:2], *logits.shape[3:]):
        return "the classes are the last axis: logits.movedim(2, -1)"
    return "logits are (passes, batch, ..., classes), labels (batch, ...)"


def _label_columns(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check_alike(logits, labels, "multilabel")
    if readable(labels):
        given = labels[labels != ignore_index]
        if given.numel() and not (given.min() >= 0 and given.max() <= 1):
            raise LossError(
                f"labels from {given.min().item():g} to {given.max().item():g}, for multi-label",
                remedy='labels are 0 or 1; for several values at once task="regression"',
            )
    return logits, labels


def _values(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    del ignore_index  # any number is a value here
    if logits.shape[-1] == 1 and logits.dim() == labels.dim() + 2:
        logits = logits.squeeze(-1)
    elif labels.dim() == logits.dim() and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    _check_alike(logits, labels, "regression")
    return logits, labels


def _check_alike(logits: Tensor, labels: Tensor, task: str) -> None:
    if labels.shape != logits.shape[1:]:
        raise LossError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}",
            where=f"{task}, for the labels are {labels.dtype}: they would be {tuple(logits.shape[1:])}",
            remedy="reshape them (a broadcast would compare every sample with every other); class "
            "indices are integers: labels.long()",
        )


def readable(tensor: Tensor) -> bool:
    """Whether looking at a value costs nothing: no GPU to wait for, no graph being recorded."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

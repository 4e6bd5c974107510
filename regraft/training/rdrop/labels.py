"""Whether labels fit logits: which task they mean, and every way in which they can be wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.errors import LossError
from regraft.training.rdrop.options import RDropOptions


def validate(
    logits: Tensor, labels: Tensor, options: RDropOptions, weight: Tensor | None = None
) -> tuple[str, Tensor, Tensor]:
    """The task, and logits and labels in the shapes that its terms take."""
    _check_tensors(logits, labels, options.alpha)
    axis = options.class_axis
    if axis is not None and options.task not in ("multilabel", "regression"):
        if not -logits.dim() < axis < logits.dim() - 1:
            raise LossError(f"class_axis={axis}, and a pass has {logits.dim() - 1} axes")
        logits = classes_last(logits, axis)
    if options.shift:
        labels = _shifted(logits, labels, options.ignore_index)
    task = options.task or infer_task(logits, labels, options.ignore_index)
    if task == "classification":
        labels = _check_classes(logits, labels, options.ignore_index)
    else:
        logits, labels = _check_values(logits, labels, options.ignore_index, task)
    if task != "classification" and options.label_smoothing:
        raise LossError(f"label_smoothing is for classification, this is {task}", remedy="leave it at 0")
    if task == "regression" and weight is not None:
        raise LossError("weight has no meaning for regression", remedy="leave it out")
    if weight is not None and weight.shape != logits.shape[-1:]:
        columns = "classes" if task == "classification" else "labels"
        raise LossError(f"weight of shape {tuple(weight.shape)}, for {logits.shape[-1]} {columns}")
    return task, logits, labels


def classes_last(logits: Tensor, axis: int) -> Tensor:
    """Logits of all passes with the classes, on this axis of one pass, behind the others."""
    return logits.movedim(axis + 1 if axis >= 0 else axis, -1)


def _check_tensors(logits: Tensor, labels: Tensor, alpha: float) -> None:
    if isinstance(logits, (tuple, list)):
        raise LossError(
            f"logits is a {type(logits).__name__} of {len(logits)}, not one tensor",
            remedy="stack the passes of one output: torch.stack([first, second]); for a model with several "
            "outputs add the rdrop_loss of each",
        )
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            remedy = "give its .logits" if hasattr(value, "logits") else "give a tensor"
            raise LossError(f"{name} is a {type(value).__name__}, not a tensor", remedy=remedy)
    if not logits.is_floating_point():
        raise LossError(f"logits are {logits.dtype}, not floating point")
    if logits.dim() < 2 or len(logits) < (2 if alpha else 1):
        raise LossError(
            f"logits of shape {tuple(logits.shape)} do not hold two passes",
            remedy="logits are (passes, batch, ..., classes): regraft.stochastic_passes(model, 2, ...) or "
            "torch.stack([first, second])",
        )


def _shifted(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    # The labels move and the logits stay, which for a language model are the largest tensor there is.
    if logits.dim() < 4 or labels.dim() < 2 or labels.is_floating_point():
        raise LossError(
            f"shift=True needs a time axis: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}",
            remedy="logits are (passes, batch, time, classes), labels (batch, time)",
        )
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def infer_task(logits: Tensor, labels: Tensor, ignore_index: int) -> str:
    """The task that the labels mean; a `LossError` if they can mean several."""
    alike = labels.shape == logits.shape[1:] and logits.dim() > 2 and logits.shape[-1] > 1
    if labels.dtype == torch.bool and alike:
        return "multilabel"
    if not labels.is_floating_point():
        return "classification"
    if not alike:
        return "regression"
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(labels):
        raise _ambiguous("floating labels of the logits' shape, which a compiled loss does not look into")
    # Reading the values waits for the device; `task=` spares that.
    values = labels.detach().float()
    whole = ((values == 0) | (values == 1) | (values == ignore_index)).all()
    in_range = ((values >= 0) & (values <= 1)).all()
    sums_to_1 = (values.sum(-1) - 1).abs().le(1e-3).all()
    if whole and not sums_to_1:
        return "multilabel"
    if in_range and sums_to_1 and not whole:
        return "classification"
    if whole:
        raise _ambiguous("every row of the labels has a single 1: classes, or one of several labels")
    raise _ambiguous("the labels are neither 0 and 1 nor rows that sum to 1")


def _ambiguous(what: str) -> LossError:
    return LossError(
        what,
        where="labels of the logits' shape",
        remedy='say task="classification" (soft or one-hot classes), task="multilabel" or task="regression"',
    )


def _check_classes(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    soft = labels.is_floating_point()
    classes = logits.shape[-1]
    wanted = logits.shape[1:] if soft else logits.shape[1:-1]
    if labels.shape != wanted or logits.dim() < 3:
        remedy = "logits are (passes, batch, ..., classes), labels (batch, ...)"
        if labels.shape == logits.shape[1:]:
            remedy = 'for several labels at once labels.float() (task="multilabel"); for classes '
            remedy += "labels.argmax(-1)"
        elif labels.dim() > 1 and labels.shape == (*logits.shape[1:2], *logits.shape[3:]):
            remedy = "the classes are on axis 1: class_axis=1"
        raise LossError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}",
            where=f"classification of {classes} classes: labels {tuple(wanted)}",
            remedy=remedy,
        )
    if classes == 1:
        raise LossError(
            "there is one class, whose loss is always 0",
            remedy='with labels.float(): for regression task="regression", for yes or no task="multilabel"',
        )
    if soft:
        return labels
    low, high = _range(labels, ignore_index)
    if low < 0 or high >= classes:
        raise LossError(
            f"labels from {low:g} to {high:g}, for {classes} classes",
            remedy=f"classes are 0 to {classes - 1}, positions to ignore {ignore_index}",
        )
    return labels.long()


def _check_values(logits: Tensor, labels: Tensor, ignore_index: int, task: str) -> tuple[Tensor, Tensor]:
    """Several labels, or values; a single column on one side and none on the other is the same thing."""
    if logits.shape[-1] == 1 and logits.dim() == labels.dim() + 2:
        logits = logits.squeeze(-1)
    elif labels.dim() == logits.dim() and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if labels.shape != logits.shape[1:]:
        raise LossError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}",
            where=f"{task}, for the labels are {labels.dtype}: they would be {tuple(logits.shape[1:])}",
            remedy="reshape them (a broadcast would compare every sample with every other); class "
            "indices are integers: labels.long()",
        )
    low, high = _range(labels, ignore_index) if task == "multilabel" else (0, 1)
    if low < 0 or high > 1:
        raise LossError(
            f"labels from {low:g} to {high:g}, for multi-label",
            remedy='labels are 0 or 1; for several values at once task="regression"',
        )
    return logits, labels


def _range(labels: Tensor, ignore_index: int) -> tuple[float, float]:
    """The least and the largest label; (0, 0) where to look costs a wait, or a graph is being recorded."""
    if torch.compiler.is_compiling() or type(labels) is not Tensor or labels.device.type != "cpu":
        return 0, 0
    if torch._C._functorch.is_functorch_wrapped_tensor(labels):
        return 0, 0
    given = labels[labels != ignore_index]
    return (given.min().item(), given.max().item()) if given.numel() else (0, 0)

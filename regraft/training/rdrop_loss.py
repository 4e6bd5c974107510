"""R-Drop's loss (Liang et al. 2021): the task's loss of every pass, and how far the passes disagree."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regraft.errors import LossError, RateError, nearest
from regraft.training.terms import Terms, multi_label, regression, single_label

TASKS = ("classification", "multilabel", "regression")
REDUCTIONS = ("batchmean", "sum", "none")
_CE = ("sum", "mean")


class RDropTerms(NamedTuple):
    """What `rdrop_loss` adds up: `loss = task + alpha * kl`."""

    task: Tensor
    kl: Tensor


def rdrop_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    *,
    task: str | None = None,
    ce: str = "sum",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """CE_1 + CE_2 + alpha * (KL(1||2) + KL(2||1)) / 2, and its like for n passes and other tasks.

    For n passes it is 2 * mean_i CE_i + alpha * the mean over pairs of (KL_ij + KL_ji) / 2. Computed
    from the log-softmax in single precision (double stays double), finite for masked classes (-inf).

    Args:
        logits: of all passes, stacked on the first axis; what `stochastic_passes` returns.
        labels: class indices, or class probabilities with `task="classification"`; for "multilabel"
            0 and 1 for each label; for "regression" the values.
        alpha: weight of the KL. With 0 it is not computed.
        task: "classification", "multilabel" or "regression". By default integer labels mean
            classification, floating labels multi-label where they have the logits' shape and more than one
            column, else regression.
        ce: "sum" adds 2 * the mean over passes of the task's loss, as the paper does; "mean" the mean.
        reduction: of the KL: "batchmean" divides by the number of labelled positions (multi-label: of
            labels, regression: of values), "sum" does not; "none" leaves the whole loss per position.
        shift: position t predicts label t + 1, as in causal language models, which shift by themselves.
        ignore_index: positions (multi-label: entries) with this label count in neither term.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        weight: of each class (multi-label: of each label), for the task's loss alone.
        num_items_in_batch: divide both terms by this instead of what this batch holds: the count over
            all steps of a gradient accumulation, as Trainer passes it.

    Shape:
        logits (passes, batch, ..., classes), labels (batch, ...). Multi-label: (passes, batch, labels)
        and (batch, labels). Regression: both alike behind the passes, or the logits with one column more.

    Raises:
        LossError: shapes, types or labels that fit no task (also a ValueError).
        RateError: alpha or label_smoothing outside its range (also a ValueError).

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", equations 2 to 4.

    Differs: the published code averages the two CE and sums the KL over the batch, so that alpha means
        something else at every batch size; `ce="mean", reduction="sum"` is that.

    Example:
        >>> import regraft, torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> regraft.rdrop_loss(logits, torch.tensor([0]), alpha=0.5)
        tensor(3.0154)
    """
    terms = rdrop_terms(
        logits,
        labels,
        alpha,
        task=task,
        ce=ce,
        reduction=reduction,
        shift=shift,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weight=weight,
        num_items_in_batch=num_items_in_batch,
    )
    return terms.task + alpha * terms.kl if alpha else terms.task


def rdrop_terms(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    *,
    task: str | None = None,
    ce: str = "sum",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> RDropTerms:
    """The two terms of `rdrop_loss` apart, for a log; at alpha 0 the KL is 0 and is not computed."""
    check_options(alpha, ce, reduction, label_smoothing)
    _check_passes(logits, labels, alpha)
    if shift:
        logits, labels = _shifted(logits, labels)
    task = _task(task, logits, labels)
    check = {"classification": _classes, "multilabel": _label_columns, "regression": _values}[task]
    logits, labels = check(logits, labels, ignore_index)
    if task != "classification" and label_smoothing:
        raise LossError(f"label_smoothing is for classification, this is {task}", remedy="leave it at 0")
    if task == "regression" and weight is not None:
        raise LossError("weight has no meaning for regression", remedy="leave it out")
    options: dict[str, Any] = {"disagreement": alpha != 0}
    if task == "regression":
        terms = regression(logits, labels, **options)
    elif task == "multilabel":
        terms = multi_label(logits, labels, ignore_index=ignore_index, weight=weight, **options)
    else:
        _check_weight(weight, logits)
        options |= {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "weight": weight}
        terms = single_label(logits, labels, **options)
    return _reduced(terms, 2 if ce == "sum" else 1, reduction, num_items_in_batch)


def _reduced(terms: Terms, times: int, reduction: str, items: Tensor | float | None) -> RDropTerms:
    kl = torch.zeros_like(terms.task) if terms.disagreement is None else terms.disagreement
    if reduction == "none":
        return RDropTerms(times * terms.task, kl)
    # A batch without one label is worth 0, not 0 / 0.
    count = terms.kept.sum().clamp(min=1) if items is None else _on(items, kl)
    divisor = count
    if items is None and terms.weight is not None:
        total = terms.weight.sum()
        divisor = total.where(total > 0, 1)
    task = times * (terms.task.sum() / divisor)
    return RDropTerms(task, kl.sum() if reduction == "sum" else kl.sum() / count)


def _on(items: Tensor | float, like: Tensor) -> Tensor | float:
    return items.to(like.device) if isinstance(items, Tensor) else items


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


def _check_passes(logits: Tensor, labels: Tensor, alpha: float) -> None:
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


def _task(task: str | None, logits: Tensor, labels: Tensor) -> str:
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
            remedy='for regression task="regression", for one yes or no task="multilabel", with labels.float()',
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
        classes = " (class indices are integers: labels.long())" if labels.is_floating_point() else ""
        raise LossError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}{classes}",
            where=f"{task}: labels {tuple(logits.shape[1:])}",
            remedy="reshape them; a broadcast would compare every sample with every other",
        )


def _check_weight(weight: Tensor | None, logits: Tensor) -> None:
    if weight is not None and weight.shape != logits.shape[-1:]:
        raise LossError(f"weight of shape {tuple(weight.shape)}, for {logits.shape[-1]} classes")


def readable(tensor: Tensor) -> bool:
    """Whether looking at a value costs nothing: no GPU to wait for, no graph being recorded."""
    ordinary = type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return ordinary and tensor.device.type == "cpu" and not torch.compiler.is_compiling()

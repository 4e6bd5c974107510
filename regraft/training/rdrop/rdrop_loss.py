"""R-Drop's loss (Liang et al. 2021): the task's loss of every pass, and how far the passes disagree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regraft.training.rdrop.labels import check_options, check_passes, fitted
from regraft.training.rdrop.terms import Terms, multi_label, regression, single_label


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
        tensor(3.0155)
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
    check_passes(logits, labels, alpha)
    task, logits, labels = fitted(
        logits,
        labels,
        task=task,
        shift=shift,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weight=weight,
    )
    options: dict[str, Any] = {"disagreement": alpha != 0}
    if task == "regression":
        terms = regression(logits, labels, **options)
    elif task == "multilabel":
        terms = multi_label(logits, labels, ignore_index=ignore_index, weight=weight, **options)
    else:
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

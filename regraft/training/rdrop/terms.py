"""The two terms of R-Drop at each position: the task's loss, and how far the passes disagree.

Everything is written for logits of shape (passes, batch, ...), in single precision or better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Terms:
    """Both terms at each position, before they are reduced.

    Attributes:
        task: mean over the passes of the task's loss, 0 where `kept` is not.
        disagreement: mean over the pairs of passes of their symmetric divergence; None if not asked for.
        kept: which positions count.
        weight: what the task's loss is divided by, where that is not the number of kept positions.
    """

    task: Tensor
    disagreement: Tensor | None
    kept: Tensor
    weight: Tensor | None = None


def over_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the pairs (i, j) of passes of (a_i - a_j)(b_i - b_j), with one product per pass."""
    if len(a) == 2:
        return (a[1] - a[0]) * (b[1] - b[0])
    # Measured from pass 0 first: passes that are equal then give exactly 0, whatever their mean rounds to.
    a, b = a - a[:1], b - b[:1]
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) * (2 / (len(a) - 1))


def single_label(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    weight: Tensor | None,
    disagreement: bool,
) -> Terms:
    """Cross-entropy and KL over the last axis; labels are class indices, or probabilities of classes."""
    soft = labels.is_floating_point()
    kept = torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device)
    if not soft:
        kept = labels != ignore_index
        # A position that is ignored may hold anything, NaN included, and must not reach the gradient.
        logits = logits.masked_fill(~kept.unsqueeze(-1), 0)
    log_p = F.log_softmax(wide(logits), dim=-1)
    # A class at -inf in any pass is masked: (0 - 0) * (-inf + inf) would be NaN, so it counts as equal.
    seen = log_p.masked_fill(torch.isneginf(log_p).any(0), 0)
    target = labels.to(log_p.dtype) if soft else labels.where(kept, 0)
    score = _soft_loss if soft else _index_loss
    task, divisor = score(log_p, seen, target, label_smoothing, weight)
    apart = None
    if disagreement:
        # KL(i||j) + KL(j||i) is the sum over the classes of (p_i - p_j)(log p_i - log p_j): no term is
        # below 0, and there is nothing to cancel.
        apart = over_pairs(log_p.exp(), seen).sum(-1).div(2).where(kept, 0)
    return Terms(task.where(kept, 0), apart, kept, None if divisor is None else divisor.where(kept, 0))


def _index_loss(
    log_p: Tensor, seen: Tensor, target: Tensor, smoothing: float, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    index = target.unsqueeze(-1).expand(*log_p.shape[:-1], 1)
    loss = -log_p.gather(-1, index).squeeze(-1)
    of_label = None
    if weight is not None:
        weight = weight.to(log_p)
        of_label = weight[target]
        loss = loss * of_label
    if smoothing:
        spread = seen if weight is None else seen * weight
        loss = (1 - smoothing) * loss - spread.sum(-1) * (smoothing / log_p.shape[-1])
    return loss.mean(0), of_label


def _soft_loss(
    log_p: Tensor, seen: Tensor, target: Tensor, smoothing: float, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    del log_p
    if smoothing:
        target = target * (1 - smoothing) + smoothing / target.shape[-1]
    if weight is not None:
        target = target * weight.to(target)
    return -(seen * target).sum(-1).mean(0), None


def multi_label(
    logits: Tensor, labels: Tensor, *, ignore_index: int, weight: Tensor | None, disagreement: bool
) -> Terms:
    """Binary cross-entropy and Bernoulli KL for each label."""
    kept = (labels != ignore_index) & ~torch.isneginf(logits).any(0)
    x = wide(logits.masked_fill(~kept, 0))
    target = labels.to(x.dtype).where(kept, 0)
    task = F.binary_cross_entropy_with_logits(x, target.expand_as(x), reduction="none").mean(0)
    if weight is not None:
        task = task * weight.to(task)
    # Both directions of the KL of two Bernoullis sum to the difference of rates times that of logits.
    apart = over_pairs(x.sigmoid(), x).div(2) if disagreement else None
    return Terms(task.where(kept, 0), apart, kept)


def regression(outputs: Tensor, targets: Tensor, *, disagreement: bool) -> Terms:
    """Mean squared error, and the mean squared difference of the passes."""
    x = wide(outputs)
    task = (x - targets.to(x.dtype)).square().mean(0)
    kept = torch.ones_like(task, dtype=torch.bool)
    return Terms(task, over_pairs(x, x) if disagreement else None, kept)


def wide(x: Tensor) -> Tensor:
    """`x` in single precision, unless it is in double precision already."""
    return x if x.dtype == torch.float64 else x.float()

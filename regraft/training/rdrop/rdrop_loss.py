"""R-Drop's loss (Liang et al. 2021): the task's loss of every pass, and how far the passes disagree.

Everything is written for logits of shape (passes, batch, ...), in single precision or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.training.rdrop.labels import validate
from regraft.training.rdrop.options import RDropOptions

CHUNK_ELEMENTS = 2**22
"""Larger logits are taken so many elements at a time, so that no copy of all of them is made in float32."""
_PARTS = 64
"""Or in so many parts: the intermediate results of a chunk together are to be small beside the logits."""


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
    ce: str = "mean",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_axis: int | None = None,
    consistency: str = "labelled",
    weight: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """The mean of the passes' losses + alpha * (KL(1||2) + KL(2||1)) / 2, for two passes or more.

    For n passes the KL is the mean over the pairs. At alpha 0 it is the loss of plain training. Computed
    from the log-softmax in single precision (double stays double), finite for masked classes (-inf); large
    logits are taken in chunks, without a copy of them in single precision.

    Args:
        logits: of all passes, stacked on the first axis; what `stochastic_passes` returns.
        labels: class indices, or class probabilities; for "multilabel" 0 and 1 for each label; for
            "regression" the values.
        alpha: weight of the KL. With 0 it is not computed.
        task: "classification", "multilabel" or "regression". By default integer labels mean
            classification. Floating labels of the logits' shape are looked into: rows that sum to 1 are
            probabilities of classes, rows of 0 and 1 several labels; what can be both is asked for. Any
            other floating labels mean regression.
        ce: "mean" or "sum" (2 * the mean) of the passes' losses; the paper's formula has the sum.
        reduction: of the KL: "batchmean" divides by the number of positions that count (multi-label: of
            labels, regression: of values), "sum" does not; "none" leaves the whole loss per position.
        shift: position t predicts label t + 1, as in causal language models, which shift by themselves.
        ignore_index: positions (multi-label: entries) with this label count in neither term.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        class_axis: of one pass; 1 for (batch, classes, height, width). By default the last.
        consistency: "all" lets positions without a label count in the KL (semi-supervised training).
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

    Differs: the paper adds the losses of the passes (`ce="sum"`), so its alpha is twice ours. Some of the
        authors' code sums the KL over the batch, so that its alpha means something else at every batch
        size (`reduction="sum"`). docs/rdrop.md translates.

    Example:
        >>> import regraft, torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> regraft.rdrop_loss(logits, torch.tensor([0]), alpha=0.5)
        tensor(1.8885)
    """
    options = RDropOptions(
        alpha=alpha,
        task=task,
        ce=ce,
        reduction=reduction,
        shift=shift,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_axis=class_axis,
        consistency=consistency,
    )
    return options.loss_of(*rdrop_terms(logits, labels, options, weight=weight, items=num_items_in_batch))


def rdrop_terms(
    logits: Tensor,
    labels: Tensor,
    options: RDropOptions,
    *,
    weight: Tensor | None = None,
    items: Tensor | float | None = None,
) -> RDropTerms:
    """The two terms of `rdrop_loss` apart; at alpha 0 the KL is 0 and is not computed."""
    task, logits, labels = validate(logits, labels, options, weight)
    target = _target(task, logits, labels, options, weight)
    losses, apart = _per_position(logits, target)
    losses = options.ce_weight * losses
    if options.reduction == "none":
        return RDropTerms(losses, apart)
    # A batch without one label is worth 0, not 0 / 0.
    count: Any = target.kept.sum().clamp(min=1)
    divisor = count if target.weights is None else target.weights.sum()
    if items is not None:
        count = divisor = items.to(losses.device) if isinstance(items, Tensor) else items
    elif target.weights is not None:
        divisor = divisor.where(divisor > 0, 1)
    if options.consistency == "all" and target.compared is not None:
        count = target.compared.sum().clamp(min=1)
    return RDropTerms(
        losses.sum() / divisor, apart.sum() if options.reduction == "sum" else apart.sum() / count
    )


def divergence(
    logits: Tensor,
    compared: Tensor,
    options: RDropOptions,
    task: str,
    items: Tensor | float | None = None,
    by: Callable[[Apart], Tensor] | None = None,
) -> Tensor:
    """The KL term alone, over the positions that `compared` marks; `by` computes it for classes."""
    target = _Target(task, compared, compared)
    if by is None:
        _, apart = _per_position(logits, target)
    else:
        flat = target.each(torch.flatten)
        apart = by(lambda x, rows: _classes(x, flat.each(lambda values: values[rows]))[1])
    if options.reduction == "sum":
        return apart.sum()
    if items is None or options.consistency == "all":
        items = compared.sum().clamp(min=1)
    return apart.sum() / (items.to(apart.device) if isinstance(items, Tensor) else items)


@dataclass(frozen=True)
class _Target:
    """What the logits are compared with.

    Attributes:
        task: of the logits.
        kept: positions that have a label.
        compared: positions that count in the KL, those that are kept among them; None without a KL.
        labels: class indices, class probabilities, 0 and 1, or values; None for the KL alone.
        weights: of each position's label, which the sum of the losses is divided by.
        weight: of each class or label.
        smoothing: of the labels.
    """

    task: str
    kept: Tensor
    compared: Tensor | None
    labels: Tensor | None = None
    weights: Tensor | None = None
    weight: Tensor | None = None
    smoothing: float = 0.0

    @property
    def counts(self) -> Tensor:
        """Positions that count in either term."""
        return self.kept if self.compared is None else self.compared

    def each(self, change: Callable[[Tensor], Tensor]) -> _Target:
        """The same with its values at each position changed."""
        tensors = {name: getattr(self, name) for name in ("kept", "compared", "labels", "weights")}
        changed: Any = {name: change(x) for name, x in tensors.items() if x is not None}
        return replace(self, **changed)


def _target(
    task: str, logits: Tensor, labels: Tensor, options: RDropOptions, weight: Tensor | None
) -> _Target:
    places = logits.shape[1:-1] if task == "classification" else logits.shape[1:]
    every = kept = torch.ones(places, dtype=torch.bool, device=logits.device)
    indices = task == "classification" and not labels.is_floating_point()
    if indices or task == "multilabel":
        kept = labels != options.ignore_index
        labels = labels.where(kept, 0)
    if task == "multilabel":
        kept = kept & ~torch.isneginf(logits).any(0)
    compared = every if options.consistency == "all" else kept
    weights = None
    if weight is not None:
        weight = weight.to(logits.device)
        weights = weight[labels].where(kept, 0) if indices else None
    return _Target(
        task, kept, compared if options.alpha else None, labels, weights, weight, options.label_smoothing
    )


Apart = Callable[[Tensor, slice], Tensor]
"""The divergence at each of these positions, of the logits of all passes there."""
Positions = tuple[Tensor, Tensor]
"""At each position: the mean of the passes' losses, and the mean divergence of the pairs of passes."""


def _per_position(logits: Tensor, target: _Target) -> Positions:
    terms = {"classification": _classes, "multilabel": _columns, "regression": _values}[target.task]
    large = target.task == "classification" and logits.numel() > 2 * CHUNK_ELEMENTS
    if not large or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(logits):
        return terms(logits, target)
    passes, *places, classes = logits.shape
    flat = target.each(lambda x: x.flatten(0, len(places) - 1))

    def compute(x: Tensor, rows: slice) -> Positions:
        return terms(x, flat.each(lambda values: values[rows]))

    both = _InChunks.apply(logits.reshape(passes, -1, classes), compute)
    return both[0].view(places), both[1].view(places)


class _InChunks(torch.autograd.Function):
    """Terms of rows of logits, some rows at a time; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, compute: Callable[[Tensor, slice], Positions]) -> Positions:
        ctx.save_for_backward(logits)
        ctx.compute = compute
        parts = [compute(logits[:, rows], rows) for rows in chunks(logits[0], len(logits))]
        first, second = zip(*parts, strict=True)
        return torch.cat(first), torch.cat(second)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in chunks(logits[0], len(logits)):
            x = logits[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                values = ctx.compute(x, rows)
            used = [(v, slope[rows]) for v, slope in zip(values, slopes, strict=True) if v.requires_grad]
            outputs, inside = zip(*used, strict=True)
            (gradient[:, rows],) = torch.autograd.grad(outputs, x, inside)
        return gradient, None


def chunks(logits: Tensor, passes: int) -> list[slice]:
    """Some positions at a time, of logits (positions, classes) of so many passes."""
    positions, classes = logits.shape
    size = max(1, min(CHUNK_ELEMENTS, passes * logits.numel() // _PARTS) // (passes * classes))
    return [slice(start, start + size) for start in range(0, positions, size)]


def over_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the pairs (i, j) of passes of (a_i - a_j)(b_i - b_j), with one product per pass."""
    if len(a) == 2:
        return (a[1] - a[0]) * (b[1] - b[0])
    # Measured from pass 0 first: passes that are equal then give exactly 0, whatever their mean rounds to.
    a, b = a - a[:1], b - b[:1]
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) * (2 / (len(a) - 1))


def _classes(logits: Tensor, target: _Target) -> Positions:
    """Cross-entropy and KL over the last axis; labels are class indices, or probabilities of classes."""
    # A position that is ignored may hold anything, NaN included, and must not reach the gradient.
    logits = logits.masked_fill(~target.counts.unsqueeze(-1), 0)
    log_p = F.log_softmax(wide(logits), dim=-1)
    # A class at -inf in any pass is masked: (0 - 0) * (-inf + inf) would be NaN, so it counts as equal.
    seen = log_p.masked_fill(torch.isneginf(log_p).any(0), 0)
    losses = apart = torch.zeros(logits.shape[1:-1], dtype=log_p.dtype, device=log_p.device)
    if target.labels is not None:
        score = _soft_loss if target.labels.is_floating_point() else _index_loss
        losses = score(log_p, seen, target, target.labels).where(target.kept, 0)
    if target.compared is not None:
        # KL(i||j) + KL(j||i) is the sum over the classes of (p_i - p_j)(log p_i - log p_j): no term is
        # below 0, and there is nothing to cancel.
        apart = over_pairs(log_p.exp(), seen).sum(-1).div(2).where(target.compared, 0)
    return losses, apart


def _index_loss(log_p: Tensor, seen: Tensor, target: _Target, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(-1).expand(*log_p.shape[:-1], 1)
    loss = -log_p.gather(-1, index).squeeze(-1)
    if target.weights is not None:
        loss = loss * target.weights.to(loss)
    if target.smoothing:
        spread = seen if target.weight is None else seen * target.weight.to(seen)
        loss = (1 - target.smoothing) * loss - spread.sum(-1) * (target.smoothing / log_p.shape[-1])
    return loss.mean(0)


def _soft_loss(_: Tensor, seen: Tensor, target: _Target, labels: Tensor) -> Tensor:
    labels = labels.to(seen.dtype)
    if target.smoothing:
        labels = labels * (1 - target.smoothing) + target.smoothing / labels.shape[-1]
    if target.weight is not None:
        labels = labels * target.weight.to(labels)
    return -(seen * labels).sum(-1).mean(0)


def _columns(logits: Tensor, target: _Target) -> Positions:
    """Binary cross-entropy and Bernoulli KL for each label."""
    masked = torch.isneginf(logits).any(0)
    x = wide(logits.masked_fill(~target.counts | masked, 0))
    losses = apart = torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
    if target.labels is not None:
        labels = target.labels.to(x.dtype).expand_as(x)
        losses = F.binary_cross_entropy_with_logits(x, labels, reduction="none").mean(0)
        if target.weight is not None:
            losses = losses * target.weight.to(losses)
        losses = losses.where(target.kept, 0)
    if target.compared is not None:
        # Both directions of the KL of two Bernoullis sum to the difference of rates times that of logits.
        apart = over_pairs(x.sigmoid(), x).div(2).where(target.compared, 0)
    return losses, apart


def _values(outputs: Tensor, target: _Target) -> Positions:
    """Squared error, and the squared difference of the passes."""
    x = wide(outputs)
    losses = apart = torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
    if target.labels is not None:
        losses = (x - target.labels.to(x.dtype)).square().mean(0)
    if target.compared is not None:
        apart = over_pairs(x, x).where(target.compared, 0)
    return losses, apart


def wide(x: Tensor) -> Tensor:
    """`x` in single precision, unless it is in double precision already."""
    return x if x.dtype == torch.float64 else x.float()

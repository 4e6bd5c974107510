"""The gate of standout: a probability to keep for each element, and the mask drawn from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regraft.variants.draws import HALVES
from regraft.variants.module import check_rate


def gate_shift(x: Tensor, p: float, beta: float | None) -> float | Tensor | None:
    """beta, or logit(1 - p); None where everything is kept."""
    p = check_rate(p)
    if beta is not None:
        return beta
    if p == 0:
        return None
    if torch.compiler.is_compiling():
        # A scheduled rate is then an input of the graph; math.log would make each a constant.
        return torch.full((), (1 - p) / p, dtype=torch.float32, device=x.device).log()
    return math.log((1 - p) / p)


def stand_out(
    x: Tensor,
    gated: Tensor | None,
    training: bool,
    *,
    alpha: float,
    shift: float | Tensor,
    rescale: bool,
    min_keep: float,
) -> Tensor:
    """X times its mask in training, times its probability otherwise; `gated` is the gate's output."""
    if gated is not None or not training:
        logits = (x if gated is None else gated).to(x.dtype if x.dtype not in HALVES else torch.float32)
        keep = (logits * alpha + shift).sigmoid().clamp(min=min_keep)
        return _with_slopes(x, keep, rescale) if training else x * keep.to(x.dtype)
    # In place throughout, on tensors made here: each pass over memory counts beside the draw.
    logits = x.detach().float() if x.dtype in HALVES else x.detach()
    keep = (logits * alpha).add_(shift).sigmoid_().clamp(min=min_keep)
    # A uniform draw less the probability lies in [-1, 0) where it is kept, so its floor is -1 or 0.
    mask = torch.rand_like(keep).sub_(keep).floor_().neg_()
    if rescale:
        mask.div_(keep)
    del keep  # before the product: two tensors of x's size at a time are enough
    return x * mask.to(x.dtype)


def _with_slopes(x: Tensor, keep: Tensor, rescale: bool) -> Tensor:
    fixed = keep.detach()
    # Straight through: the drawn mask forwards, the slope of its probability backwards.
    mask = (torch.rand_like(fixed) < fixed) + (keep - fixed)
    return x * (mask / fixed if rescale else mask).to(x.dtype)

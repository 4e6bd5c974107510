"""Attention written out, for variants with a noise of their own: softmax, variant, matmul."""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.variants.draws import keep_mask

Drop = Callable[[Tensor], "Tensor | None"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    drop: Drop,
) -> Tensor:
    """`scaled_dot_product_attention` with `drop` in the place of its dropout.

    Shape: query (..., L, E), key (..., S, E), value (..., S, Ev); mask broadcastable to (..., L, S), bool
    (True takes part) or added to the scores. A row that may attend to nothing gives 0, like torch's, and
    finite gradients.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    weights = _softmax(scores, attn_mask)
    dropped = drop(weights)
    weights = weights if dropped is None else dropped
    return weights.to(value.dtype) @ value


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    # Half precision is too coarse to sum many exponentials in; the fused kernels use float32 as well.
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if mask is None:
        return wide.softmax(-1).to(scores.dtype)
    if mask.dtype == torch.bool:
        wide = wide.masked_fill(~mask, -math.inf)
    else:
        wide = wide + mask.to(wide.dtype)
    # A row without any key is all -inf: its softmax and the gradient of it would be NaN.
    empty = (wide == -math.inf).all(-1, keepdim=True)
    return wide.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(scores.dtype)


def with_dropped_keys(call: dict[str, Any], p: float) -> dict[str, Any]:
    """The call of `scaled_dot_product_attention` with each key masked with probability p, for all queries.

    The mask is a row for each head, (..., 1, S), so that the kernel stays fused; causal attention and masks
    that differ by query need (..., L, S). A query without any key left keeps those that it had.
    """
    query, key = call["query"], call["key"]
    size = key.shape[-2]
    keep = keep_mask(query, [*query.shape[:-2], 1, size], p, torch.bool)
    before: Tensor | None = call.get("attn_mask")
    if call.get("is_causal"):
        before = torch.ones((query.shape[-2], size), dtype=torch.bool, device=query.device).tril()
    if before is None:
        mask = keep | ~keep.any(-1, keepdim=True)
    elif before.dtype == torch.bool:
        both = before & keep
        mask = torch.where(both.any(-1, keepdim=True), both, before)
    else:
        # Masks of floats hide a key by -inf, or by the lowest number.
        seen = (before > torch.finfo(before.dtype).min / 2) & keep
        mask = torch.where(seen.any(-1, keepdim=True), before.masked_fill(~keep, -math.inf), before)
    return {**call, "attn_mask": mask, "is_causal": False}


def multi_head_attention(drop: Drop, **call: Any) -> Any:
    """`F.multi_head_attention_forward` with `drop` in the place of its dropout."""
    _running.drops.append(drop)
    try:
        return _multi_head_attention(**call)
    finally:
        _running.drops.pop()


class _Running(threading.local):
    """What takes the place of dropout in the calls that are running in this thread, the innermost last."""

    def __init__(self) -> None:
        self.drops: list[Drop] = []


_running = _Running()


def _dropout(weights: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    made = _running.drops[-1](weights)
    return weights if made is None else made


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, is_causal: bool) -> Tensor:
    return attend(q, k, v, mask, is_causal, drop=_running.drops[-1])


def _rebind() -> Callable[..., Any]:
    """Torch's own function, with three of the names it looks up bound to ours.

    Its many options need not be written again. Made once, on import: a compiler cannot trace the making.
    """
    original = F.multi_head_attention_forward
    names = {
        **original.__globals__,
        "dropout": _dropout,
        "scaled_dot_product_attention": _attention,
        "has_torch_function": lambda *_: False,
    }
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


_multi_head_attention = _rebind()

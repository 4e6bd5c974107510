"""The functions that drop: what each call of one says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

ATTENTION = "scaled_dot_product_attention"
MULTI_HEAD = "multi_head_attention_forward"


@dataclass(frozen=True)
class Parsed:
    """A call of a function that drops, read."""

    op: str
    x: Tensor
    p: float
    training: bool
    score_bytes: int = 0


def _reader(op: str) -> Callable[..., Parsed]:
    def read(input: Tensor, p: float = 0.5, training: bool = True, *_: Any, **kwargs: Any) -> Parsed:
        return Parsed(op, input, p, bool(kwargs.get("train", training)))

    return read


def _read_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> Parsed:
    # It has no `training`: a rate above 0 is all there is to say that it drops.
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.element_size()
    return Parsed(ATTENTION, query, dropout_p, dropout_p > 0, scores)


def _read_mha(*args: Any, **kwargs: Any) -> Parsed:
    query = kwargs.get("query", args[0] if args else None)
    p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
    training = kwargs.get("training", args[13] if len(args) > 13 else True)
    return Parsed(MULTI_HEAD, cast("Tensor", query), p, bool(training))


OPS: dict[Callable[..., Any], str] = {
    F.dropout: "dropout",
    torch.dropout: "dropout",
    torch.dropout_: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    torch.feature_dropout: "dropout2d",
    F.alpha_dropout: "alpha_dropout",
    torch.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    torch.feature_alpha_dropout: "feature_alpha_dropout",
    F.scaled_dot_product_attention: ATTENTION,
    F.multi_head_attention_forward: MULTI_HEAD,
}
"""Function -> operation."""
_READERS = {ATTENTION: _read_attention, MULTI_HEAD: _read_mha}
FUNCTIONS: dict[Callable[..., Any], Callable[..., Parsed]] = {
    function: _READERS.get(op) or _reader(op) for function, op in OPS.items()
}
"""Function -> what reads its arguments."""

DROP_PATH = "DropPath"
DRAWS: tuple[Callable[..., Any], ...] = (torch.rand, torch.bernoulli, Tensor.bernoulli_, Tensor.uniform_)
"""Draws of which a DropPath that is no module is made."""


def draws_rows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is this the draw of one number for each example, of which a DropPath makes its mask?"""
    if func is torch.rand:
        given = args or (kwargs.get("size", ()),)
        shape = given[0] if isinstance(given[0], (tuple, list)) else given
    else:
        shape = args[0].shape if args else ()
    return len(shape) > 1 and shape[0] > 1 and all(size == 1 for size in shape[1:])

"""Draws under `vmap`: the operations that would share their noise between passes, or raise, taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.training.outside import attention, pass_by_pass

_UNINITIALIZED = {torch.empty, torch.empty_like, Tensor.new_empty}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_IN_PLACE = {
    F.dropout: 3,
    F.dropout1d: 3,
    F.dropout2d: 3,
    F.dropout3d: 3,
    F.alpha_dropout: 3,
    F.feature_alpha_dropout: 3,
}
"""Function -> position of its `inplace`."""


class DrawsPerPass(TorchFunctionMode):
    """While a vmapped forward runs, gives every draw an axis of passes.

    vmap refuses to draw in place on a tensor that has no such axis yet, which is how DropPath and the
    dropout inside fused attention draw; and RNNs draw between their layers behind its back.

    Args:
        axis: zeros with nothing but the axis of passes.
        replaced: called with every tensor that was to change in place and did not.
    """

    def __init__(self, axis: Tensor, replaced: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.replaced = replaced

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _UNINITIALIZED:
            return self._per_pass(func(*args, **kwargs))
        if func is F.scaled_dot_product_attention:
            return attention(self.axis, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        if func in _RECURRENT:
            return pass_by_pass(self.axis, func, args, draws=_draws(args))
        if func in _IN_PLACE:
            args, kwargs = self._out_of_place(_IN_PLACE[func], args, kwargs)
        return func(*args, **kwargs)

    def _per_pass(self, empty: Tensor) -> Tensor:
        # Memory that is made to be filled, by a draw as like as not: with an axis of passes from the start.
        if empty.is_floating_point() or empty.dtype == torch.bool:
            return empty.zero_() + self.axis.to(empty)
        return empty

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        rate = args[10] if len(args) > 10 else given["dropout_p"]
        training = args[13] if len(args) > 13 else given.get("training", True)
        if not (rate and training):
            return F.multi_head_attention_forward(*args, **kwargs)
        # A query with an axis of passes is enough for the attention inside to draw for each of them. The
        # projection is packed where query, key and value are one object, so they stay one.
        query = given["query"]
        forked = query + self.axis.to(query)
        first = [given.pop(name) for name in ("query", "key", "value")]
        first = [forked if one is query else one for one in first]
        return F.multi_head_attention_forward(*first, *args[3:], **given)

    def _out_of_place(
        self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("inplace") or (len(args) > position and args[position]):
            if self.replaced is not None:
                self.replaced(args[0] if args else kwargs["input"])
            args = (*args[:position], False, *args[position + 1 :]) if len(args) > position else args
            kwargs = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
        return args, kwargs


def _draws(args: tuple[Any, ...]) -> bool:
    """Whether an RNN called like this draws: (..., weights, has biases, layers, dropout, train, ...)."""
    at = next(i for i, one in enumerate(args) if isinstance(one, list))
    layers, rate, training = args[at + 2 : at + 5]
    return bool(training and rate and layers > 1)

"""Draws under `vmap`: the operations that would share their noise between passes, or raise, taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

_UNINITIALIZED = {torch.empty, torch.empty_like, Tensor.new_empty}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class DrawsPerPass(TorchFunctionMode):
    """While a vmapped forward runs, gives every draw an axis of passes.

    vmap refuses to draw in place on a tensor that has no such axis yet, which is how DropPath and the
    dropout inside fused attention draw.
    """

    def __init__(self, axis: Tensor) -> None:
        super().__init__()
        self.axis = axis

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _UNINITIALIZED:
            return self._per_pass(func(*args, **kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(self.axis, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        if func in _RECURRENT and _draws(args):
            return _recurrent(self.axis, func, args)
        return func(*args, **kwargs)

    def _per_pass(self, empty: Tensor) -> Tensor:
        # Memory that is made to be filled, by a draw as like as not: with an axis of passes from the start.
        return empty.zero_() + self.axis.to(empty) if empty.is_floating_point() else empty

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A query with an axis of passes is enough for the attention inside to draw for each of them.
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query = given["query"]
        forked = query + self.axis.to(query)
        rest = args[3:]
        for name in ("key", "value"):
            # The projection is packed where all three are one object, so they stay one.
            given[name] = forked if given[name] is query else given[name]
        given["query"] = forked
        first = [given.pop(name) for name in ("query", "key", "value")]
        return F.multi_head_attention_forward(*first, *rest, **given)


class _Outside(torch.autograd.Function):
    """One call made outside vmap: `call` gets the number of passes and the tensors as they really are.

    A tensor with passes comes with them on its first axis; the result has them there too. Autograd
    records what the call does, as it would without vmap.
    """

    @staticmethod
    def forward(call: Any, *tensors: Any) -> Any:
        raise AssertionError("only called under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("only called under vmap")

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, axis: Tensor, *tensors: Any) -> Any:
        forked = [dim is not None for dim in in_dims[2:]]
        moved = [
            tensor.movedim(dim, 0) if isinstance(tensor, Tensor) and dim is not None else tensor
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return call(info.batch_size, moved, forked)


def _attention(
    axis: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """Fused attention with the passes as part of its batch, so that its kernel draws for each."""

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        attend = F.scaled_dot_product_attention
        options_ = {"dropout_p": dropout_p, "is_causal": is_causal, **options}
        if not any(forked) and not dropout_p:
            return attend(*tensors[:3], attn_mask=tensors[3], **options_), None
        every = [_with_passes(tensor, n, there) for tensor, there in zip(tensors, forked, strict=True)]
        alike = len({(one.dim(), one.shape[1]) for one in every[:3]}) == 1
        batch = every[0].shape[1]
        if alike and every[0].dim() == 5 and _mask_folds(every[3], batch):
            folded = [None if one is None else _folded(one, n, batch) for one in every]
            result = attend(*folded[:3], attn_mask=folded[3], **options_)
            return result.unflatten(0, (n, batch)), 0
        mask = every[3]
        if mask is not None:
            mask = mask.reshape(n, *[1] * (every[0].dim() - mask.dim()), *mask.shape[1:])
        return attend(*every[:3], attn_mask=mask, **options_), 0

    return _Outside.apply(call, axis, query, key, value, attn_mask)


def _with_passes(tensor: Tensor | None, n: int, forked: bool) -> Any:
    return tensor if tensor is None or forked else tensor.expand(n, *tensor.shape)


def _mask_folds(mask: Tensor | None, batch: int) -> bool:
    return mask is None or (mask.dim() == 5 and mask.shape[1] in (1, batch))


def _folded(tensor: Tensor, n: int, batch: int) -> Tensor:
    return tensor.expand(n, batch, *tensor.shape[2:]).reshape(n * batch, *tensor.shape[2:])

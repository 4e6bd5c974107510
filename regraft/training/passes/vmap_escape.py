"""Calls made outside `vmap` from inside it, with the passes as an axis like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.training.passes.nested import CONSTANTS, filled, mapped, tensors_in

_attend: Callable[..., Tensor] = F.scaled_dot_product_attention


class Outside(torch.autograd.Function):
    """`Outside.apply(call, axis, *tensors)`: one call made outside vmap, `call(n, tensors, forked)`.

    A forked tensor begins with the passes. The result has the passes on its first axis, or on none. Autograd
    records what the call does as it would without vmap.
    """

    # Only ever called under vmap; torch asks for both.
    @staticmethod
    def forward(*_: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(*_: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, _: Tensor, *tensors: Any) -> Any:
        moved = [
            tensor if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return call(info.batch_size, moved, [dim is not None for dim in in_dims[2:]])


def attention(
    axis: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """Fused attention with the passes as part of its batch, so that its kernel draws for each of them."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, **options}

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        if not any(forked) and not dropout_p:
            return _attend(*tensors, **options), None
        *first, mask = [
            one if there or one is None else one.expand(n, *one.shape)
            for one, there in zip(tensors, forked, strict=True)
        ]
        batch = first[0].shape[1]
        if all(one.dim() == 5 and one.shape[1] == batch for one in first):
            if mask is not None:
                shared = not forked[3] and (tensors[3].dim() < 4 or len(tensors[3]) == 1)
                mask = tensors[3] if shared else _folded(_ranked(mask, 5), n, batch)
            result = _attend(*(_folded(one, n, batch) for one in first), mask, **options)
            return result.reshape(n, batch, *result.shape[1:]), 0
        return _attend(*first, None if mask is None else _ranked(mask, first[0].dim()), **options), 0

    return Outside.apply(call, axis, query, key, value, attn_mask)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """A mask that begins with the passes, with axes of 1 behind them up to `rank`."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


def _folded(tensor: Tensor, n: int, batch: int) -> Tensor:
    return tensor.expand(n, batch, *tensor.shape[2:]).reshape(n * batch, *tensor.shape[2:])


def pass_by_pass(
    axis: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, draws: bool
) -> Any:
    """A function that vmap cannot run, once for each pass; once for all if nothing tells them apart."""
    outputs: Any = None

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        nonlocal outputs
        before = _versions(tensors)

        def run(i: int) -> Any:
            own = (one[i] if there else one for one, there in zip(tensors, forked, strict=True))
            given, named = filled((args, kwargs), own)
            return func(*given, **named)

        alike = not any(forked) and not draws
        outputs = run(0) if alike else mapped(_stacked, "", *map(run, range(n)))
        if _versions(tensors) != before:
            # A tensor without an axis of passes is one for them all; of one with it, the count of writes is.
            raise RuntimeError("behind the first random operation it changes its arguments in place")
        results = tensors_in(outputs)
        # Something has to come out, or torch has nothing to wrap.
        return (torch.zeros(()), *results), (None, *[None if alike else 0] * len(results))

    results = Outside.apply(call, axis, *tensors_in((args, kwargs)))[1:]
    return filled(outputs, results)


def _versions(tensors: list[Any]) -> list[int]:
    """Which writes in place there were; inference tensors count none."""
    return [-1 if one.is_inference() else one._version for one in tensors]


def _stacked(name: str, first: Any, *others: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.stack((first, *others))
    if any(other is not first and not (isinstance(first, CONSTANTS) and other == first) for other in others):
        raise RuntimeError(f"{name or 'a value'} differs between the passes")
    return first

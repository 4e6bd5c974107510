"""Calls made outside `vmap` from inside it, with the passes as an axis like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.training.passes.nested import CONSTANTS, emptied, filled, mapped
from regraft.training.passes.scalar_draws import LAST

_attend: Callable[..., Tensor] = F.scaled_dot_product_attention


class _Outside(torch.autograd.Function):
    """One call made outside vmap: `call(n, tensors, forked)`, where a forked tensor begins with the passes.

    The result has the passes on its first axis, or on none. Autograd records what the call does as it
    would without vmap.
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
        forked = [dim is not None for dim in in_dims[2:]]
        moved = [
            tensor.movedim(dim, 0) if dim is not None else tensor
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return call(info.batch_size, moved, forked)


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
        every = [
            one if there or one is None else one.expand(n, *one.shape)
            for one, there in zip(tensors, forked, strict=True)
        ]
        batch = every[0].shape[1]
        if all(one.dim() == 5 and one.shape[1] == batch for one in every[:3]):
            mask = tensors[3]
            if mask is not None and (forked[3] or (mask.dim() == 4 and mask.shape[0] > 1)):
                mask = _folded(_ranked(every[3], 5), n, batch)
            folded = [_folded(one, n, batch) for one in every[:3]]
            result = _attend(*folded, mask, **options)
            return result.reshape(n, batch, *result.shape[1:]), 0
        mask = None if every[3] is None else _ranked(every[3], every[0].dim())
        return _attend(*every[:3], mask, **options), 0

    return _Outside.apply(call, axis, query, key, value, attn_mask)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """A mask that begins with the passes, with axes of 1 behind them up to `rank`."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


def _folded(tensor: Tensor, n: int, batch: int) -> Tensor:
    return tensor.expand(n, batch, *tensor.shape[2:]).reshape(n * batch, *tensor.shape[2:])


def linear(axis: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer, whose axes in front are all alike to it; with weights of each pass, pass by pass."""

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        if not any(forked[1:]):
            return F.linear(*tensors), 0 if forked[0] else None
        each = [
            F.linear(*(one[i] if there else one for one, there in zip(tensors, forked, strict=True)))
            for i in range(n)
        ]
        return torch.stack(each), 0

    return _Outside.apply(call, axis, input, weight, bias)


def ends(axis: Tensor, shape: tuple[int, ...]) -> Any:
    """A number from [0, 1) for each pass: 0 for the first, the greatest for the last."""

    def call(n: int, *_: Any) -> Any:
        return torch.linspace(0, LAST, n).view(n, *shape).to(axis.device), 0

    return _Outside.apply(call, axis)


def pass_by_pass(
    axis: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, draws: bool
) -> Any:
    """A function that vmap cannot run, once for each pass; once for all if nothing tells them apart."""
    slots, inputs = emptied((args, kwargs))
    tree: Any = None

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        nonlocal tree
        before = _versions(tensors)

        def run(i: int) -> Any:
            given = [one[i] if there else one for one, there in zip(tensors, forked, strict=True)]
            args, kwargs = filled(slots, given)
            return func(*args, **kwargs)

        alike = not any(forked) and not draws
        outputs = run(0) if alike else mapped(_stacked, "", *(run(i) for i in range(n)))
        if _versions(tensors) != before:
            # A tensor without an axis of passes is one for them all; of one with it, the count of writes is.
            raise RuntimeError("behind the first random operation it changes its arguments in place")
        tree, found = emptied(outputs)
        # Something has to come out, or torch has nothing to wrap.
        return (torch.zeros(()), *found), (None, *[None if alike else 0] * len(found))

    found: tuple[Any, ...] = _Outside.apply(call, axis, *inputs)[1:]
    return filled(tree, found)


def _versions(tensors: list[Any]) -> list[int]:
    """Which writes in place there were; inference tensors count none."""
    return [-1 if one.is_inference() else one._version for one in tensors]


def _stacked(name: str, first: Any, *others: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.stack((first, *others))
    if any(other is not first and not (isinstance(first, CONSTANTS) and other == first) for other in others):
        raise RuntimeError(f"{name or 'a value'} differs between the passes")
    return first

"""Caches of keys and values, which a forward writes into: every pass gets one of its own."""

from __future__ import annotations

import copy
import enum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regraft.training.passes.nested import CONSTANTS, leaves, mapped

Call = tuple[tuple[Any, ...], dict[str, Any]]


_UNWRITTEN = (slice, range, enum.Enum, torch.Generator)
"""Objects that hold nothing of a pass."""


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, as Transformers has them."""
    return hasattr(value, "reorder_cache") and hasattr(value, "get_seq_length")


def own_caches(call: Call) -> Call:
    """The same arguments with copies of their caches."""
    args, kwargs = call
    if not any(is_cache(value) for value in (*args, *kwargs.values())):
        return call
    return cast("Call", mapped(lambda _, leaf: copied(leaf) if is_cache(leaf) else leaf, "", call))


def without_caches(outputs: Any, kwargs: dict[str, Any]) -> Any:
    """Outputs with None for a cache that was not asked for: it would have no meaning across passes.

    Many forwards fill one by default, and not all of them have an argument `use_cache` to say otherwise.
    """
    if kwargs.get("use_cache") or not any(is_cache(leaf) for _, leaf in leaves("", outputs)):
        return outputs
    return mapped(lambda _, leaf: None if is_cache(leaf) else leaf, "", outputs)


def stateless(call: Call, *, given: bool) -> Call:
    """Arguments for a module that each pass calls by itself: nothing that one of them might leave a mark on.

    A cache of keys and values that the forward made for itself is left out: it has no meaning across passes.

    Args:
        call: the arguments.
        given: whether the forward was given a cache, which then has to count.

    Raises:
        RuntimeError: an object that may be written into.
    """

    def own(_: str, leaf: Any) -> Any:
        if is_cache(leaf) and not given:
            return None
        if isinstance(leaf, (Tensor, nn.Module, *CONSTANTS, *_UNWRITTEN)) or callable(leaf):
            return leaf
        raise RuntimeError(f"a module that runs once for each pass might write into a {type(leaf).__name__}")

    return cast("Call", mapped(own, "", call))


def copied(cache: Any) -> Any:
    """A copy that a forward may write into."""
    with _Clones():
        return copy.deepcopy(cache)


def with_rows(cache: Any, rows: Tensor) -> Any:
    """A copy for a batch of these rows."""
    cache = copied(cache)
    if cache.get_seq_length():
        cache.reorder_cache(rows)
    return cache


class _Clones(TorchFunctionMode):
    """Clones where a deep copy is asked for: a tensor with a history has no deep copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))

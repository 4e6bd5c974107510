"""Scalar random draws used for control flow (LayerDrop). The analysis replays each at its two ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from regraft.training.passes.measure import Meter

LAST = 1 - 2**-24
"""The greatest number that `torch.rand` gives; the smallest is 0."""


class Decided(TorchFunctionMode):
    """Gives every scalar drawn for control flow this value, and tells the observer."""

    def __init__(self, number: float, observer: Meter) -> None:
        super().__init__()
        self.number = number
        self.observer = observer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sizes = sizes_of_decision(args, kwargs) if func is torch.rand else None
        if sizes is None:
            return func(*args, **kwargs)
        self.observer.decided()
        return torch.full(sizes, self.number, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def sizes_of_decision(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The sizes of a `torch.rand` of one number, or None."""
    sizes = tuple(args[0] if args and isinstance(args[0], (list, tuple)) else args)
    return sizes if sizes in ((), (1,)) and "size" not in kwargs else None

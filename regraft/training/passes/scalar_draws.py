"""Numbers drawn to decide what runs, as LayerDrop's: a look gives them both ends of what they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LAST = 1 - 2**-24
"""The greatest number that `torch.rand` gives; the smallest is 0."""


class Look(Protocol):
    """What a look at the passes of a model has to know."""

    def forked(self) -> None:
        """The passes part here."""

    def replaced(self, tensor: Tensor) -> None:
        """`tensor` was to change in place, and a new one took its place."""

    def decided(self) -> None:
        """A module that each pass runs by itself drew a number, to decide something by it."""


class Decided(TorchFunctionMode):
    """Gives every number that is drawn to decide something this value, and tells the look of it."""

    def __init__(self, number: float, look: Look) -> None:
        super().__init__()
        self.number = number
        self.look = look

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sizes = sizes_of_decision(args, kwargs) if func is torch.rand else None
        if sizes is None:
            return func(*args, **kwargs)
        self.look.decided()
        return torch.full(sizes, self.number, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def sizes_of_decision(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The sizes of a `torch.rand` of one number, or None."""
    sizes = tuple(args[0] if args and isinstance(args[0], (list, tuple)) else args)
    return sizes if sizes in ((), (1,)) and "size" not in kwargs else None

"""Strategy "shared": what comes before the first random operation runs once, by `torch.func.vmap`.

The passes are the axis of a vmap over a value that the forward never sees. A tensor gets an axis of
passes when something random touches it, and everything before that is computed once.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.errors import InputsError
from regraft.training.draws import DrawsPerPass
from regraft.training.tree import mapped

if TYPE_CHECKING:
    from collections.abc import Callable

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Place:
    """Where in the outputs the tensor of this number belongs."""

    index: int


def shared_forward(
    forward: Callable[..., Any],
    n: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    draws: bool = True,
) -> Any:
    """All passes in one forward that forks at the first random operation.

    With `draws`, operations whose noise vmap cannot draw for each pass are taken over; without it they
    raise, and every operation is a few microseconds faster.

    Raises:
        RuntimeError: an operation after the fork that vmap cannot run, in torch's words.
        InputsError: no tensor in the outputs, or an object that the passes cannot share.
    """
    tree: Any = None

    def one_pass(axis: Tensor) -> tuple[Tensor, ...]:
        nonlocal tree
        with DrawsPerPass(axis) if draws else nullcontext():
            outputs = forward(*args, **kwargs)
        tensors: list[Tensor] = []

        def place(name: str, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                return _Place(len(tensors) - 1)
            if isinstance(leaf, _CONSTANTS):
                return leaf
            raise InputsError(
                f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
                where=name,
                remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
            )

        tree = mapped(place, "", outputs)
        if not tensors:
            raise InputsError("the forward gives no tensor, so there is nothing to stack")
        return tuple(tensors)

    with warnings.catch_warnings():
        # vmap warns of each operation that it runs pass by pass: slower there, and still right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        stacked = torch.func.vmap(one_pass, randomness="different")(torch.zeros(n))
    return mapped(lambda _, leaf: stacked[leaf.index] if isinstance(leaf, _Place) else leaf, "", tree)

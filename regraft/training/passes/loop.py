"""Strategy "loop": one forward after the other, and their outputs stacked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from regraft.errors import ModelError
from regraft.training.passes.caches import Call, own_caches, without_caches
from regraft.training.passes.fork import Parting
from regraft.training.passes.nested import mapped


def single_forward(forward: Callable[..., Any], call: Call, parting: Parting | None = None) -> Any:
    """One pass, with a new first axis of 1; `parting` is a context around it."""
    args, kwargs = own_caches(call)
    with nullcontext() if parting is None else parting(lambda: None):
        outputs = without_caches(forward(*args, **kwargs), kwargs)
    return mapped(lambda _, leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, "", outputs)


def joined(parts: list[Any]) -> Any:
    """Passes from several forwards, along their first axis.

    Raises:
        ModelError: the passes differ in shape.
    """
    return parts[0] if len(parts) == 1 else mapped(_joined, "", *parts)


def _joined(name: str, first: Any, *others: Any) -> Any:
    every = (first, *others)
    if not isinstance(first, Tensor):
        return first if all(other is first or other == first for other in others) else every
    shapes = sorted({tuple(x.shape[1:]) for x in every})
    if len(shapes) > 1:
        raise ModelError(
            f"the passes differ in shape, {' and '.join(map(str, shapes))}, and cannot be stacked",
            where=f"output {name or 'of the model'}",
            remedy="its length is drawn at random: call the model once for each pass",
        )
    return torch.cat(every)

"""n stochastic passes over one input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError, RateError, nearest
from regraft.training.repeated import ScalarOutputError, repeated_forward
from regraft.training.tree import mapped

if TYPE_CHECKING:
    from collections.abc import Collection

STRATEGIES = ("auto", "batch", "loop")


def stochastic_passes(
    model: nn.Module,
    n: int,
    *args: Any,
    strategy: str = "auto",
    unbatched: Collection[str] = (),
    **kwargs: Any,
) -> Any:
    """Several passes over one input, each with noise of its own.

    Args:
        model: as it is, in training or in eval; it is not switched.
        n: how many passes.
        args: for the model's forward.
        strategy: "batch" repeats the inputs n times along their first axis, in one forward; "loop" runs
            the passes one after the other; "auto" is "batch" where that has an answer, else "loop".
        unbatched: names of keyword arguments that "batch" must not repeat, although their first axis is
            as long as the batch.
        kwargs: for the model's forward.

    Returns:
        The model's own output type (tensor, tuple, dict, ModelOutput), every tensor with a new first
        axis of n.

    Raises:
        InputsError: an input that cannot be repeated, or an output without a value for each pass.
        RateError: n below 1.

    Example:
        >>> import regraft, torch
        >>> model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 3))
        >>> regraft.stochastic_passes(model, 2, torch.ones(5, 4)).shape
        torch.Size([2, 5, 3])
    """
    if strategy not in STRATEGIES:
        listed = ", ".join(map(repr, STRATEGIES))
        raise InputsError(
            f"strategy={strategy!r} is not one of {listed}", remedy=nearest(strategy, STRATEGIES)
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RateError(f"n={n!r} is not a number of passes", remedy="give 1 or more")
    if strategy == "loop":
        return looped(model, n, args, kwargs)
    main = getattr(model, "main_input_name", None)
    try:
        return repeated_forward(model, n, args, kwargs, main=main, unbatched=unbatched)
    except ScalarOutputError:
        if strategy == "batch":
            raise
        return looped(model, n, args, kwargs)


def looped(model: nn.Module, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The passes one after the other."""
    outputs = [model(*args, **kwargs) for _ in range(n)]
    return mapped(_stacked, "", *outputs)


def _stacked(name: str, first: Any, *others: Any) -> Any:
    del name
    every = (first, *others)
    if isinstance(first, Tensor):
        return torch.stack(every)
    return first if all(one is first or one == first for one in others) else every

"""Strategy "shared": what comes before the first random operation runs once, by `torch.func.vmap`.

The passes are the axis of a vmap over a value that the forward never sees. A tensor gets an axis of
passes when something random touches it, and everything before that is computed once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError
from regraft.training.passes.caches import is_cache, without_caches
from regraft.training.passes.draws import DrawsPerPass
from regraft.training.passes.intercept import Interception
from regraft.training.passes.nested import CONSTANTS, emptied, filled, leaves
from regraft.training.passes.per_pass_modules import held_apart
from regraft.training.passes.scalar_draws import Look

SLOWER = "There is a performance drop"


def shared_forward(
    forward: Callable[..., Any],
    n: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    draws: bool = True,
    apart: Mapping[nn.Module, bool] | None = None,
    look: Look | None = None,
    quiet: bool = True,
) -> Any:
    """All passes in one forward that forks at the first random operation.

    Args:
        forward: the model, or a forward of it.
        n: the number of passes.
        args: for the forward.
        kwargs: for the forward.
        draws: take over the operations whose noise vmap cannot draw for each pass. Without it they
            raise, and every operation is a few microseconds faster.
        apart: modules that run outside vmap, once for each pass, and whether they do so even where nothing
            tells their arguments apart. They need `draws`.
        look: see `DrawsPerPass`.
        quiet: leave out vmap's warnings.

    Raises:
        RuntimeError: an operation after the fork that vmap cannot run, in torch's words.
        InputsError: no tensor in the outputs, or an object that the passes cannot share.
    """
    tree: Any = None
    cached = any(is_cache(leaf) for _, leaf in leaves("", (args, kwargs)))

    def one_pass(axis: Tensor) -> tuple[Tensor, ...]:
        nonlocal tree
        with ExitStack() as stack:
            if draws:
                mode = stack.enter_context(DrawsPerPass(axis, look, cached=cached))
                stack.enter_context(mode.interception.active())
                runs = {module: mode.run_of(always=always) for module, always in (apart or {}).items()}
                stack.enter_context(held_apart(runs))
            else:
                stack.enter_context(Interception(None).active())
            outputs = without_caches(forward(*args, **kwargs), kwargs)
        _check(outputs)
        tree, tensors = emptied(outputs)
        if not tensors:
            raise InputsError("the forward gives no tensor, so there is nothing to stack")
        return tuple(tensors)

    with warnings.catch_warnings():
        if quiet:
            # vmap warns of each operation that it runs pass by pass: slower there, and still right.
            warnings.filterwarnings("ignore", message=SLOWER)
        stacked = torch.func.vmap(one_pass, randomness="different")(torch.zeros(n))
    return filled(tree, stacked)


def _check(outputs: Any) -> None:
    for name, leaf in leaves("", outputs):
        if not isinstance(leaf, (Tensor, *CONSTANTS)):
            raise InputsError(
                f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
                where=name,
                remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
            )

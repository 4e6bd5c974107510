"""Strategy "shared": what comes before the passes part is computed once, the rest under `vmap`.

The passes are the axis of a vmap over a value that the forward never sees. A tensor gets an axis of passes
when something random touches it, and everything before that is computed once. With a fork the vmap begins
there, in the middle of the forward, so what is in front of it, draws and checkpoints and all, is an
ordinary forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.vmap import vmap_increment_nesting

from regraft.errors import InputsError
from regraft.training.passes.caches import Call, is_cache, own_caches, without_caches
from regraft.training.passes.draws import DrawsPerPass
from regraft.training.passes.fork import Parting
from regraft.training.passes.intercept import Interception
from regraft.training.passes.measure import Meter
from regraft.training.passes.nested import CONSTANTS, leaves, mapped
from regraft.training.passes.per_pass_modules import run_per_pass

SLOWER = "There is a performance drop"


def shared_forward(
    forward: Callable[..., Any],
    n: int,
    call: Call,
    *,
    draws: bool = True,
    per_pass: Mapping[nn.Module, bool] | None = None,
    parting: Parting | None = None,
    observer: Meter | None = None,
    quiet: bool = True,
) -> Any:
    """All passes in one forward.

    Args:
        forward: the model, or a forward of it.
        n: the number of passes.
        call: the arguments of the forward.
        draws: take over the operations whose noise vmap cannot draw for each pass. Without it they
            raise, and every operation is a few microseconds faster.
        per_pass: modules that run outside vmap, once for each pass, and whether they do so even where nothing
            tells their arguments apart. They need `draws`.
        parting: a context that calls a function where the passes part, see `Fork`; by default they do from
            the
            first random operation on.
        observer: see `DrawsPerPass`.
        quiet: leave out vmap's warnings.

    Raises:
        RuntimeError: an operation after the fork that vmap cannot run, in torch's words.
        InputsError: no tensor in the outputs, or an object that the passes cannot share.
    """
    args, kwargs = own_caches(call)
    level = 0
    with ExitStack() as stack, warnings.catch_warnings():
        if quiet:
            # vmap warns of each operation that it runs pass by pass: slower there, and still right.
            warnings.filterwarnings("ignore", message=SLOWER)

        def begin() -> None:
            nonlocal level
            level = stack.enter_context(vmap_increment_nesting(n, "different"))
            if mode is not None:
                mode.axis = torch._C._functorch._add_batch_dim(torch.zeros(n), 0, level)
            if observer is not None:
                observer.forked()

        # Entered before the forward: modes of its own may be entered before the fork and left behind it.
        mode = None
        if draws:
            cached = any(is_cache(leaf) for _, leaf in leaves("", (args, kwargs)))
            mode = stack.enter_context(DrawsPerPass(observer, cached=cached))
            runs = {module: mode.run_of(always=always) for module, always in (per_pass or {}).items()}
            stack.enter_context(run_per_pass(runs))
        stack.enter_context((mode.interception if mode is not None else Interception(None)).active())
        if parting is None:
            begin()
            outputs = forward(*args, **kwargs)
        else:
            with parting(begin):
                outputs = forward(*args, **kwargs)
        return _stacked(without_caches(outputs, kwargs), n, level)


def _stacked(outputs: Any, n: int, level: int) -> Any:
    """Outputs with the axis of passes in front, on every tensor."""
    count = 0

    def stack(name: str, leaf: Any) -> Any:
        nonlocal count
        if isinstance(leaf, Tensor):
            count += 1
            return torch._C._functorch._remove_batch_dim(leaf, level, n, 0)
        if isinstance(leaf, CONSTANTS):
            return leaf
        raise InputsError(
            f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
            where=name,
            remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
        )

    stacked = mapped(stack, "", outputs)
    if not count:
        raise InputsError("the forward gives no tensor, so there is nothing to stack")
    return stacked

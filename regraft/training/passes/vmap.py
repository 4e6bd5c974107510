"""Strategy "shared": what comes before the passes part is computed once, the rest under `vmap`.

The passes are the axis of a vmap over a value that the forward never sees. A tensor gets an axis of passes
when something random touches it, and everything before that is computed once. With a fork the vmap begins
there, in the middle of the forward, so what is in front of it, draws and checkpoints and all, is an
ordinary forward. A model in `torch.compile` is compiled with the vmap around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._functorch.vmap import vmap_increment_nesting

from regraft.errors import InputsError
from regraft.training.passes.draws import DrawsPerPass
from regraft.training.passes.fork import Fork
from regraft.training.passes.intercept import Interception
from regraft.training.passes.measure import Meter
from regraft.training.passes.nested import (
    Call,
    check_output,
    filled,
    is_cache,
    leaves,
    mapped,
    own_caches,
    tensors_in,
    without_caches,
)

_compiled: WeakKeyDictionary[nn.Module, Callable[..., tuple[Tensor, ...]]] = WeakKeyDictionary()


def shared_forward(
    forward: Callable[..., Any],
    n: int,
    call: Call,
    *,
    draws: bool = True,
    per_pass: Mapping[nn.Module, bool] | None = None,
    fork: Fork | None = None,
    observer: Meter | None = None,
) -> Any:
    """All passes in one forward.

    Args:
        forward: the model, or a forward of it.
        n: the number of passes.
        call: the arguments of the forward.
        draws: take over the operations whose noise vmap cannot draw for each pass. Without it they
            raise, and every operation is a few microseconds faster.
        per_pass: see `DrawsPerPass`; they need `draws`.
        fork: where the passes part; by default they do from the first random operation on.
        observer: see `DrawsPerPass`.

    Raises:
        RuntimeError: an operation after the fork that vmap cannot run, in torch's words.
        InputsError: no tensor in the outputs, or an object that the passes cannot share.
    """
    args, kwargs = own_caches(call)
    level = 0
    mode = None

    def begin() -> None:
        nonlocal level
        level = stack.enter_context(vmap_increment_nesting(n, "different"))
        if mode is not None:
            mode.axis = torch._C._functorch._add_batch_dim(torch.zeros(n), 0, level)
        if observer is not None:
            observer.forked()

    with ExitStack() as stack, warnings.catch_warnings():
        # vmap warns of each operation that it runs pass by pass: slower there, and still right.
        refused = observer is not None and not draws
        warnings.filterwarnings("error" if refused else "ignore", message="There is a performance drop")
        # Entered before the forward: modes of its own may be entered before the fork and left behind it.
        if draws:
            cached = any(is_cache(leaf) for _, leaf in leaves("", call))
            mode = stack.enter_context(DrawsPerPass(per_pass or {}, observer, cached=cached))
        interception = Interception() if mode is None else mode.interception
        stack.enter_context(interception.active())
        if fork is None:
            begin()
        with nullcontext() if fork is None else fork.reached(begin):
            outputs = without_caches(forward(*args, **kwargs), kwargs)

        def stacked(name: str, leaf: Any) -> Any:
            check_output(name, leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            return torch._C._functorch._remove_batch_dim(leaf, level, n, 0)

        if not tensors_in(outputs):
            raise InputsError("the forward gives no tensor, so there is nothing to stack")
        return mapped(stacked, "", outputs)


def is_compiled(model: nn.Module) -> bool:
    """Whether it is what `torch.compile(model)` returned."""
    return hasattr(model, "dynamo_ctx") and hasattr(model, "_orig_mod")


def compiled_forward(model: nn.Module, n: int, call: Call, template: Any) -> Any:
    """All passes in one compiled forward; `template` is the outputs of a forward, whatever its tensors."""
    compiled: Any = model
    inner = compiled._orig_mod

    def passes(axis: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        def one_pass(_: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors_in(inner(*args, **kwargs)))

        return torch.func.vmap(one_pass, randomness="different")(axis)

    if model not in _compiled:
        _compiled[model] = compiled.dynamo_ctx(passes)
    return filled(template, _compiled[model](torch.zeros(n), *call))

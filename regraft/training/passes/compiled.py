"""Strategy "shared" of a model in `torch.compile`: all passes are one function, compiled as the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.training.passes.caches import Call
from regraft.training.passes.nested import filled, leaves

_functions: WeakKeyDictionary[nn.Module, Callable[..., tuple[Tensor, ...]]] = WeakKeyDictionary()


def is_compiled(model: nn.Module) -> bool:
    """Whether it is what `torch.compile(model)` returned."""
    return hasattr(model, "dynamo_ctx") and hasattr(model, "_orig_mod")


def compiled_forward(model: nn.Module, n: int, call: Call, template: Any) -> Any:
    """All passes in one compiled forward, which vmap has to be able to run with nothing taken over.

    Args:
        model: what `torch.compile` returned.
        n: the number of passes.
        call: the arguments of the forward.
        template: the outputs of a forward, with slots for their tensors.
    """
    if model not in _functions:
        compiled: Any = model
        _functions[model] = compiled.dynamo_ctx(_function(compiled._orig_mod))
    return filled(template, _functions[model](torch.zeros(n), *call))


def _function(inner: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    def passes(axis: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        def one_pass(_: Tensor) -> tuple[Tensor, ...]:
            outputs = inner(*args, **kwargs)
            return tuple(leaf for _, leaf in leaves("", outputs) if isinstance(leaf, Tensor))

        return torch.func.vmap(one_pass, randomness="different")(axis)

    return passes

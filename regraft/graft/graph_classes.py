"""What a generated class needs above an `fx.GraphModule`.

Each graph module has a class of its own, which holds the forward that torch.fx makes from the graph, and
makes again whenever the graph changes: on the class of the moment, and without end if that is derived from
the one that has it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from regraft.record import RECORD, rebind_instance_forward

Class = type[nn.Module]

_COMPILED = "_wrapped_call"
"""What torch.fx puts on the class that it compiles a graph into."""


def compile_graph(owner: fx.GraphModule) -> Any:
    """Make the code of a graph module anew, on the class that has it; classes made above it stay."""
    cls = type(owner)
    holder: Any = next((one for one in cls.__mro__ if _COMPILED in vars(one)), cls)
    owner.__class__ = holder
    try:
        code = holder.recompile(owner)
    finally:
        owner.__class__ = cls
    rebind_instance_forward(owner)
    return code


def stable_base(base: type[nn.Module]) -> type[nn.Module]:
    """A stand-in for `base` whose forward stays the same object while the graph is compiled again."""
    if not issubclass(base, fx.GraphModule) or _COMPILED not in vars(base):
        return base

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def graph_methods(base: type[nn.Module], layered_like: Callable[[Class, Class], Class]) -> dict[str, Any]:
    """Methods of a class generated above `base`, if that is a graph module's: what compiles and copies it.

    `layered_like(cls, other)` is `cls` with the layers of `other` on top.
    """
    if not issubclass(base, fx.GraphModule):
        return {}

    def recompile(self: fx.GraphModule) -> Any:
        return compile_graph(self)

    def deepcopy(self: fx.GraphModule, memo: dict[int, Any]) -> Any:
        # A copy is built from the graph, which knows nothing of classes above it, nor of grafts.
        cls = type(self)
        holder: Any = next(one for one in cls.__mro__ if _COMPILED in vars(one))
        self.__class__ = holder
        try:
            copied = holder.__deepcopy__(self, memo)
        finally:
            self.__class__ = cls
        for name in (RECORD, *_written(self)):
            copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        copied.__class__ = layered_like(type(copied), cls)
        return copied

    return {"recompile": recompile, "__deepcopy__": deepcopy}


def _written(module: nn.Module) -> list[str]:
    grafts = module.__dict__[RECORD].values()
    return [name for graft in grafts for name in graft.written if name in module.__dict__]

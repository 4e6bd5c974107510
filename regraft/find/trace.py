"""`regraft.trace`: a model as a graph of nodes, with the modules that can be grafted kept whole."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from regraft.errors import ModelError
from regraft.find.frames import own_line
from regraft.find.graph_calls import standing_in
from regraft.find.probe.example_inputs import made_inputs
from regraft.find.recognize import op_of
from regraft.find.walk import inner_model
from regraft.record import grafts_of


def trace(model: nn.Module, concrete_args: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """A model traced by torch.fx: a `GraphModule` with the same weights, whose nodes are sites.

    Dropouts, drop-paths and variants that are modules stay modules, and so does what timm and torchvision
    say cannot be traced. A functional dropout becomes a node with the training flag that the model has
    now: apply `{"Dropout": "dropout"}`, and it follows `.training` again.

    Args:
        model: any module whose forward does not branch on tensors; it is left as it is, and shares its
            modules with the traced one.
        concrete_args: arguments of the forward to fix, by name, as in `torch.fx.Tracer.trace`.

    Raises:
        ModelError: why torch.fx cannot trace it, and where (also a TypeError).

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> traced = regraft.trace(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1)))
        >>> [site.written for site in regraft.inspect(traced).sites]
        ['Linear(4, 8)', 'Dropout(p=0.1)']
    """
    root, _ = inner_model(model)
    if grafts_of(root):
        raise ModelError(
            "the model's own forward is grafted, and tracing would keep what the grafts did in one call",
            where=type(root).__name__,
            remedy="regraft.revert(model), trace, then apply the rules to the traced model",
        )
    tracer = _Tracer()
    try:
        graph = tracer.trace(root, None if concrete_args is None else dict(concrete_args))
    except Exception as error:
        raise _explained(root, tracer, error) from error
    graph._tracer_cls = fx.Tracer  # so that a pickle of it does not ask for this one
    traced = fx.GraphModule(root, graph, type(root).__name__)
    _like(traced, root)
    return traced


class _Tracer(fx.Tracer):
    """torch.fx's tracer with more leaves, which keeps the lines of the source."""

    record_stack_traces = True

    def __init__(self) -> None:
        modules, functions = _left_whole()
        super().__init__(autowrap_modules=_wrapped_modules(), autowrap_functions=functions)
        self.leaves = modules
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.leaves) or op_of(m) is not None or standing_in(m) is not None:
            return True
        if type(m).__module__.startswith("regraft.") or any(one.edit for one in grafts_of(m).values()):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.path_of_module(m)
            raise


def _left_whole() -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """Classes and functions that timm registers as not to be traced into, where timm is in use."""
    if "timm" not in sys.modules:
        return (), ()
    from timm import layers

    modules: list[type[nn.Module]] = getattr(layers, "get_notrace_modules", list)()
    functions: list[Any] = getattr(layers, "get_notrace_functions", list)()
    return tuple(modules), tuple(one for one in functions if callable(one))


def _wrapped_modules() -> tuple[Any, ...]:
    """Modules of Python whose functions become nodes: torchvision traces its own models with these two."""
    if "torchvision" not in sys.modules:
        return (math,)
    import torchvision

    return math, torchvision.ops


def _like(traced: fx.GraphModule, root: nn.Module) -> None:
    """Give what tracing made anew the training flag of the model, and what the probe makes inputs from."""
    kept = {id(module) for module in root.modules()}
    for module in traced.modules():
        if id(module) not in kept:
            module.training = root.training
    if getattr(root, "pretrained_cfg", None) is not None:
        inputs = next(made_inputs(root), None)
        if inputs is not None:
            settings: Any = traced
            settings.pretrained_cfg = {"input_size": tuple(inputs.args[0].shape[1:])}


def _explained(root: nn.Module, tracer: _Tracer, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
    name = type(root).__name__
    inside = f"{name}.{tracer.failed_in}" if tracer.failed_in else name
    return ModelError(
        f"torch.fx cannot trace {inside}: {reason}",
        where=own_line(traceback.extract_tb(error.__traceback__)),
        remedy="regraft.apply needs no tracing: give it the model itself",
    )

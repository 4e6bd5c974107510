"""Graph nodes: what each node of an `fx.GraphModule` calls, also where a graft put a module in its place.

A graft keeps a node, its name and its arguments, and changes only what it calls: a module that takes the
same arguments. What the node called before is the record on that module, so that a deep copy, a pickle
or a graph that another tool rewrote can still be read, and reverted.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from regraft.find.probe.copied import original
from regraft.ops import ATTENTION, DROP_PATH, LINEAR, OPS

NODE = "_regraft_node"
"""The attribute of a module that stands in a function's place: what the node called before."""
WRAPPED = "is_wrapped"
"""torch.fx's own mark on a node: its function is to be declared as wrapped in the code."""

_OPERATIONS: dict[Any, str] = {F.linear: LINEAR, **OPS}
_DROP_PATHS = re.compile(r"(drop_path|stochastic_depth)$")
RATES = ("p", "dropout_p", "drop_prob", "drop_rate")
_FLAGS = ("training", "train")
_BUILT_IN: dict[str, dict[str, Any]] = {
    # Functions in C do not tell their parameters.
    ATTENTION: {"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0},
    LINEAR: {"input": None, "weight": None, "bias": None},
}
_PRODUCTS = (operator.mul, torch.mul)
_ASSIGNED = re.compile(r"\s*(\w+)\b[^=(]*=")


@dataclass(frozen=True)
class Replaced:
    """What a node called, before a graft put a module in the function's place.

    Attributes:
        name: the node's name.
        function: what it called.
        op: the operation, "" for a function that drops somewhere inside.
        switch: the argument that says whether it drops, by position or name, where tracing fixed it.
        p: the rate, or None where there is none, or where the graph computes it.
        wrapped: is it a Python function that tracing is not to enter? A pickle is read by tracing again.
    """

    name: str
    function: Callable[..., Any]
    op: str
    switch: int | str | None = None
    p: float | None = None
    wrapped: bool = False


@dataclass(frozen=True)
class GraphNode:
    """A node that calls a function: as it is, or as it was before a graft.

    Attributes:
        called: the function, and what it means.
        baked: the training flag, where tracing fixed it.
        module: what a graft put in the function's place.
    """

    node: fx.Node
    called: Replaced
    baked: bool | None = None
    module: nn.Module | None = None


def graph_nodes(owner: nn.Module) -> Iterator[GraphNode]:
    """The nodes of a `GraphModule` that call functions; of any other module none."""
    if isinstance(owner, fx.GraphModule):
        for node in owner.graph.nodes:
            found = _read(owner, node)
            if found is not None:
                yield found


def graph_node(owner: nn.Module, name: str) -> GraphNode | None:
    """The node of that name, if it calls a function."""
    if isinstance(owner, fx.GraphModule):
        for node in owner.graph.nodes:
            if node.op == "call_module" or node.name == name:
                found = _read(owner, node)
                if found is not None and found.called.name == name:
                    return found
    return None


def standing_in(module: nn.Module) -> Replaced | None:
    """What a node called before a graft put `module` there; None for any other module."""
    return module.__dict__.get(NODE)


def _read(owner: fx.GraphModule, node: fx.Node) -> GraphNode | None:
    module: nn.Module | None = None
    if node.op == "call_module":
        module = _submodule(owner, str(node.target))
        record = standing_in(module) if module is not None else None
        if record is None:
            return None
        name, function, wrapped = record.name, record.function, record.wrapped
    elif node.op == "call_function" and callable(node.target):
        name, function, wrapped = node.name, node.target, bool(node.meta.get(WRAPPED))
    else:
        return None
    if function in _PRODUCTS and (rate := _inline_rate(node)) is not None:
        return GraphNode(node, Replaced(name, function, DROP_PATH, p=rate), baked=True, module=module)
    op = _operation(function)
    parameters = _parameters(function, op)
    found = _argument(node, parameters, RATES)[1] if op not in ("", LINEAR) else None
    p = float(found) if isinstance(found, (int, float)) else None
    where, flag = _argument(node, parameters, _FLAGS)
    if op == ATTENTION and p:
        # It has no training flag: a rate above 0 is all there is to say that it drops.
        where, flag = _argument(node, parameters, RATES)[0], True
    if not isinstance(flag, (bool, int)):
        where, flag = None, None  # the graph computes it: there is nothing to mend
    baked = None if flag is None else bool(flag)
    return GraphNode(node, Replaced(name, function, op, where, p, wrapped), baked, module)


def _inline_rate(node: fx.Node) -> float | None:
    """The rate of a drop-path written out, at its last node; None for any other product.

    `x * mask`, where the mask is `x.new_empty(...).bernoulli_(keep)`, divided in place by `keep`.
    """
    args: Any = node.args
    if len(args) != 2 or not isinstance(args[1], fx.Node):
        return None
    x, mask = args
    if (mask.op, mask.target, len(mask.args)) != ("call_method", "bernoulli_", 2):
        return None
    mask_args: Any = mask.args
    empty, keep = mask_args
    made = isinstance(empty, fx.Node) and (empty.op, empty.target) == ("call_method", "new_empty")
    scaled = any((user.target, user.args) == ("div_", (mask, keep)) for user in mask.users)
    if not made or not scaled or not isinstance(keep, float) or empty.args[0] is not x:
        return None
    return round(1 - keep, 12)


def _submodule(owner: nn.Module, target: str) -> nn.Module | None:
    try:
        return owner.get_submodule(target)
    except AttributeError:
        return None


@functools.lru_cache(maxsize=1024)
def _operation(function: Callable[..., Any]) -> str:
    if function in _OPERATIONS:
        return _OPERATIONS[function]
    name = getattr(function, "__name__", "")
    if inspect.isfunction(function) and _DROP_PATHS.search(name):
        return DROP_PATH if set(RATES) & set(_parameters(function, "")) else ""
    return ""


@functools.lru_cache(maxsize=1024)
def _parameters(function: Callable[..., Any], op: str) -> dict[str, Any]:
    """The parameters in their order, with their defaults."""
    if op in _BUILT_IN:
        return _BUILT_IN[op]
    if not inspect.isfunction(function):
        return {"input": None, "p": None, "train": None} if op else {}
    return {one.name: one.default for one in inspect.signature(function).parameters.values()}


def _argument(
    node: fx.Node, parameters: dict[str, Any], names: tuple[str, ...]
) -> tuple[int | str | None, Any]:
    """Where a node passes one of the parameters `names`, and what; the default where it passes none."""
    for position, name in enumerate(parameters):
        if name in names:
            if name in node.kwargs:
                return name, node.kwargs[name]
            return (position, node.args[position]) if position < len(node.args) else (name, parameters[name])
    return None, None


def running_node(owners: list[nn.Module], frames: list[FrameType]) -> tuple[nn.Module, str]:
    """Of the module that is running, the last of `owners`: the module whose graph it is, and the node.

    The node's name is "" for a module that is no graph.
    """
    owner = owners[-1]
    record = standing_in(owner)
    if record is not None and len(owners) > 1:
        return owners[-2], record.name
    if isinstance(owner, fx.GraphModule):
        for frame in frames:
            if frame.f_code.co_name == "forward" and original(frame.f_locals.get("self")) is owner:
                # The generated code has one line for each node, which assigns to the node's name.
                line = _ASSIGNED.match(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
                return owner, line[1] if line else ""
    return owner, ""

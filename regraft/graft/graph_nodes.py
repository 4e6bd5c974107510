"""The graft of a graph node: a module takes the place of the function that it calls.

The node stays, with its name, its arguments and its users; only what it calls changes. So the way back is
to call the function again, whatever has become of the graph since. The module follows `.training`, also
where tracing had fixed the flag, and has no parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import fx, nn

from regraft.errors import MisfitError
from regraft.find.graph_calls import NODE, WRAPPED, GraphNode, Replaced, graph_node, graph_nodes
from regraft.find.graph_nodes import node_path
from regraft.find.walk import Named
from regraft.graft.calls import call_graft
from regraft.graft.classes import compile_graph
from regraft.graft.handlers import call_rate
from regraft.graft.slots import set_graft
from regraft.interrupts import HeldInterrupts
from regraft.ops import ATTENTION, DROP_PATH, LINEAR
from regraft.planning.plan import Edit
from regraft.record import RECORD, Graft, Slot, grafts_of
from regraft.variants.registry import spec

Change = tuple[nn.Module, Slot, Graft | None, dict[str, Graft]]
"""A module, a slot, what was in it before, and all that the module had then."""


class NodeFunction(nn.Module):
    """A function that a graph node called, as a module that follows `.training` and can be grafted."""

    def __init__(self, called: Replaced) -> None:
        super().__init__()
        self.__dict__[NODE] = called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        called: Replaced = self.__dict__[NODE]
        # What is inserted before and after it is around this, in a layer of its own.
        grafts = [graft for graft in grafts_of(self).values() if graft.slot.kind != "insert"]
        if not grafts:
            return called.function(*args, **kwargs)  # for a look at the model as it was
        if called.op in (LINEAR, DROP_PATH):
            # No functions of torch that drop, which a mode would see: the variant is called here.
            return _DIRECTLY[called.op](called, grafts[0], self.training, args, kwargs)
        if called.switch is not None:
            args, kwargs = _switched(called, args, kwargs, self.training)
        return called.function(*args, **kwargs)

    def extra_repr(self) -> str:
        called: Replaced = self.__dict__[NODE]
        name = getattr(called.function, "__name__", "function")
        return ", ".join([name, *(graft.edit["after"] for graft in grafts_of(self).values())])


def _switched(
    called: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the training flag, or the rate of attention, as it is in this mode."""
    where = called.switch
    if called.op == ATTENTION and training:
        return args, kwargs
    value = 0.0 if called.op == ATTENTION else training
    if isinstance(where, int):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    return args, {**kwargs, str(where): value}


def _linear(called: Replaced, graft: Graft, training: bool, args: Any, kwargs: Any) -> Any:
    if not training and not graft.in_eval:
        return called.function(*args, **kwargs)
    call = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    function = spec(graft.variant).function_for("Linear")
    return function(
        call["input"], call["weight"], call.get("bias"), graft.rate or 0.0, training, **graft.options
    )


def _drop_path(called: Replaced, graft: Graft, training: bool, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else next(iter(kwargs.values()))
    if not training and not graft.in_eval:
        return x
    function = spec(graft.variant).function
    return function(x, call_rate(graft, called.p or 0.0), training, **graft.options)


_DIRECTLY = {LINEAR: _linear, DROP_PATH: _drop_path}


def node_graft(edit: Edit) -> Graft:
    """The graft that makes the node of `edit` do what it says."""
    graft = call_graft(edit)
    return replace(graft, layer=None) if edit.op in _DIRECTLY else graft


def set_slot(module: nn.Module, slot: Slot, graft: Graft | None) -> Graft | None:
    """Put `graft` into a slot of a module, or of a node of its graph, or empty it; returns what was there."""
    if not slot.node:
        return set_graft(module, slot, graft)
    name, inside = slot.node, replace(slot, node="")
    found = graph_node(module, name)
    if found is None and graft is None:
        return None  # somebody erased the node, and the graft with it
    if found is None or not isinstance(module, fx.GraphModule):
        raise MisfitError(f"the graph has no node {name!r} that can be grafted", where=type(module).__name__)
    if found.module is None:
        if graft is not None:
            made = NodeFunction(found.called).train(module.training)
            set_graft(made, inside, graft)
            _put_in(module, found.node, made)
        return None
    previous = set_graft(found.module, inside, graft)
    if not grafts_of(found.module):
        _take_out(module, found)
    return previous


def grafts_at(module: nn.Module, node: str = "") -> dict[str, Graft]:
    """The grafts on a module, or on a node of its graph, by the text of their slots without the node."""
    found = graph_node(module, node) if node else None
    if not node:
        return grafts_of(module)
    return {} if found is None or found.module is None else grafts_of(found.module)


def graft_at(module: nn.Module, slot: Slot) -> Graft | None:
    """What is in a slot of a module, or of a node of its graph."""
    return grafts_at(module, slot.node).get(str(replace(slot, node="") if slot.node else slot))


def placed_grafts(modules: list[Named]) -> Iterator[tuple[Named, Slot, Graft]]:
    """Every graft, with the module and the slot by which it is set, and the paths of its site."""
    nodes = {id(named.module): [one for one in graph_nodes(named.module) if one.module] for named in modules}
    inside = {id(one.module) for found in nodes.values() for one in found}
    for named in modules:
        if id(named.module) not in inside:
            for graft in grafts_of(named.module).values():
                yield named, graft.slot, graft
        for one in nodes[id(named.module)]:
            assert one.module is not None
            paths = [node_path(path, one.called.name) for path in named.paths]
            for graft in grafts_of(one.module).values():
                yield Named(named.module, paths), replace(graft.slot, node=one.called.name), graft


def _put_in(owner: fx.GraphModule, node: fx.Node, module: NodeFunction) -> None:
    name, number = node.name, 0
    while hasattr(owner, name):
        number += 1
        name = f"{node.name}_{number}"
    owner.add_module(name, module)
    node.op, node.target = "call_module", name
    _compile(owner)


def _take_out(owner: fx.GraphModule, found: GraphNode) -> None:
    target = str(found.node.target)
    for node in owner.graph.nodes:
        if (node.op, node.target) == ("call_module", target):
            node.op, node.target = "call_function", found.called.function
            if found.called.wrapped:
                node.meta[WRAPPED] = True  # a pickle has lost it
    path, _, name = target.rpartition(".")
    del owner.get_submodule(path)._modules[name]
    _compile(owner)


class Changes:
    """Changes of slots that are made together, each with what was there before."""

    def __init__(self, held: HeldInterrupts) -> None:
        self.held = held
        self.made: list[Change] = []

    def set(self, module: nn.Module, slot: Slot, graft: Graft | None) -> Graft | None:
        """As `set_slot`."""
        self.made.append((module, slot, graft_at(module, slot), grafts_of(module)))
        return set_slot(module, slot, graft)


@contextmanager
def all_or_nothing() -> Iterator[Changes]:
    """An exception in the block undoes the changes made in it; a Ctrl-C waits for its end, and does too."""
    changes: list[Change] = []
    try:
        with HeldInterrupts() as held:
            together = Changes(held)
            changes = together.made
            yield together
    except BaseException:
        with HeldInterrupts(), compiled_once():
            finish(_undo, reversed(changes))
        raise


def _undo(module: nn.Module, slot: Slot, graft: Graft | None, grafts: dict[str, Graft]) -> None:
    """Put a slot back, and the grafts into the order that they had."""
    set_slot(module, slot, graft)
    if grafts_of(module).keys() == grafts.keys() and grafts:
        module.__dict__[RECORD] = grafts


def finish(function: Callable[..., object], items: Iterable[tuple[Any, ...]]) -> None:
    """Call `function` with each of the items; the first exception goes on when all of them are done."""
    first: BaseException | None = None
    for item in items:
        try:
            try:
                function(*item)
            except (KeyboardInterrupt, MemoryError, RecursionError):
                function(*item)  # whatever it was may be over
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


class _Waiting(threading.local):
    """The graphs that are to be compiled when all of their nodes are done."""

    owners: dict[int, fx.GraphModule] | None = None


_waiting = _Waiting()


@contextmanager
def compiled_once() -> Iterator[None]:
    """On leaving, the code of each graph that was changed inside is made anew: once, not for every node."""
    if _waiting.owners is not None:
        yield
        return
    changed: dict[int, fx.GraphModule] = {}
    _waiting.owners = changed
    try:
        yield
    finally:
        _waiting.owners = None
        finish(_compile, [(owner,) for owner in changed.values()])


def _compile(owner: fx.GraphModule) -> None:
    if _waiting.owners is not None:
        _waiting.owners[id(owner)] = owner
        return
    compile_graph(owner)

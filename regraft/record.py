"""What a module was before any graft: the record that a graft leaves on it, and how to see past it.

It stands here, below the code that grafts, because finding must show a grafted model as it was: a rule
is always read against the original.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from regraft.errors import ModelError
from regraft.libraries import library_class

RECORD = "_regraft"
"""The attribute of a grafted module that holds its grafts, by the text of their slots."""
BASE = "_regraft_base"
"""On a generated class: the class it was generated from."""
LAYER = "_regraft_layer"
"""On a generated class: the `Layer` it adds."""
MISSING = "<missing>"
"""Stands for an attribute that was not there before the graft; a string, so that it survives pickling."""


@dataclass(frozen=True)
class Slot:
    """Where a graft sits on a module: one graft fits in each.

    Its text, `calls:dropout` or `insert:after:gaussian`, is the key in a module's record and what a pickle
    holds; `read_slot` reads it.

    Attributes:
        kind: "rate", "variant", "calls", "lend", "insert" or "passes".
        op: of calls the operation, of an insertion "before" or "after".
        variant: of an insertion, for two variants may stand at one place.
        field: of an insertion, the argument or the part of the output; "" for the first tensor.
        node: of a node in the module's graph, its name.
    """

    kind: str
    op: str = ""
    variant: str = ""
    field: str = ""
    node: str = ""

    def __str__(self) -> str:
        text = ":".join([self.kind, *filter(None, (self.op, self.variant, self.field))])
        return f"node:{self.node}:{text}" if self.node else text

    def __reduce__(self) -> tuple[object, ...]:
        return read_slot, (str(self),)


def read_slot(text: str) -> Slot:
    """The slot that a text stands for."""
    node = ""
    if text.startswith("node:"):
        _, node, text = text.split(":", 2)
    kind, op, variant, part = [*text.split(":", 3), "", "", ""][:4]
    return Slot(kind, op, variant, part, node)


@dataclass(frozen=True)
class Layer:
    """What one generated class adds to the class below it.

    Attributes:
        build: a function of a module's top level, which a pickle refers to by name; of the class below and
            `args` it makes the namespace of the class above.
        args: what the builder has to know.
    """

    build: Callable[..., dict[str, Any]]
    args: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return read_layer, (f"{self.build.__module__}:{self.build.__name__}", self.args)


def read_layer(build: str, args: tuple[str, ...]) -> Layer:
    """The layer that a pickle names: only builders of regraft's own are looked up.

    Raises:
        ModelError: it names anything else.
    """
    module, _, name = build.partition(":")
    if not module.startswith("regraft.") or not name.endswith("_layer"):
        raise ModelError(f"{build!r} builds no layer of regraft's", remedy="do not load this file")
    return Layer(getattr(importlib.import_module(module), name), args)


@dataclass
class Graft:
    """One graft on one module."""

    slot: Slot
    layer: Layer | None = None
    variant: str = ""
    """The variant's name; "" of a graft that puts none there, such as the boundary around a mode."""
    rate: float | str | None = None
    """A number, or a factor of the rate that each call carries ("x2"); None where the call's own stays."""
    options: dict[str, Any] = field(default_factory=dict)
    """The variant's other options, all of them."""
    edit: dict[str, Any] = field(default_factory=dict)
    """The edit that the graft carries out, as plain values: for reports and saved plans, for no forward."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Attributes the graft wrote, as they were."""
    written: dict[str, Any] = field(default_factory=dict)
    """The same attributes, as the graft wrote them."""
    in_eval: bool = False
    """Does it act in eval too?"""
    fixes_eval: bool = False
    """Does it keep a call from dropping in eval?"""
    state: dict[str, Any] = field(default_factory=dict)
    """Parameters and buffers that the graft adds, by name: their values while the graft is not in place."""
    transient: tuple[str, ...] = ()
    """Names of the buffers among them that stay out of the state dict."""
    awaited: tuple[str, ...] = ()
    """Names of the state that a saved plan says was trained, and that no checkpoint has brought yet."""
    covered: dict[str, Graft] = field(default_factory=dict)
    """Of a temporary graft: the grafts whose places it took, by slot; they come back when it goes."""
    holders: int = 0
    """How many blocks have it in place for their time; 0 of a graft that stays."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Of a graft whose rate a schedule sets: its `owner`, the `rate` and `base` outside the schedule, and
    whether it is `temporary`, put in place for the schedule alone."""
    settings: str = ""
    """Of a graft of calls: what it does, as text by which a compiled version of a method is found."""


def grafts_of(module: nn.Module) -> dict[str, Graft]:
    """The grafts on `module` by the text of their slots; empty if there are none."""
    return module.__dict__.get(RECORD) or {}


def is_generated(cls: type) -> bool:
    return BASE in cls.__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class as the user wrote it: without grafts, and without the classes that torch generates.

    `parametrize` and `fully_shard` put a class of their own above the user's; what the module *is* for a
    selector stands below both.
    """
    cls = type(module)
    while True:
        if is_generated(cls):
            cls = cls.__dict__[BASE]
        elif is_foreign(cls):
            cls = foreign_base(cls)
        else:
            return cls


def is_foreign(cls: type) -> bool:
    """Is `cls` generated by `parametrize` or by FSDP2?"""
    state = cls.__dict__.get("__getstate__")  # parametrize's own, which says that it cannot be pickled
    if getattr(state, "__globals__", None) is vars(parametrize):
        return True
    sharded = library_class("torch.distributed.fsdp", "FSDPModule")
    return len(cls.__bases__) == 2 and cls.__bases__[0] is sharded


def foreign_base(cls: type) -> type[nn.Module]:
    """The class that a generated class of torch was made from."""
    base: type[nn.Module] = cls.__bases__[-1]
    return base


@contextmanager
def temporarily_ungrafted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules as they were before any graft, while the block runs."""
    kept: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    try:
        for module in modules:
            grafts, cls = grafts_of(module), type(module)
            if grafts and not is_foreign(cls):
                kept.append((module, cls, dict(module.__dict__)))
                _ungraft(module, grafts)
        yield
    finally:
        for module, cls, attributes in kept:
            grafts = attributes[RECORD]
            names = [RECORD, "_old_forward", *(name for graft in grafts.values() for name in graft.saved)]
            module.__dict__.update({name: attributes[name] for name in names if name in attributes})
            module.__class__ = cls


def _ungraft(module: nn.Module, grafts: dict[str, Graft]) -> None:
    module.__class__ = original_class(module)
    for graft in grafts.values():
        for name, value in graft.saved.items():
            if module.__dict__.get(name) == graft.written.get(name):
                module.__dict__[name] = value
                if isinstance(value, str) and value == MISSING:
                    del module.__dict__[name]
    del module.__dict__[RECORD]
    rebind_instance_forward(module)


def rebind_instance_forward(module: nn.Module) -> None:
    """Accelerate keeps the bound forward of the class it found, and would call the old one for ever."""
    old: Any = module.__dict__.get("_old_forward")
    if old is not None and getattr(old, "__self__", None) is module:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def original_attribute(module: nn.Module, name: str) -> Any:
    """The attribute as it was before regraft wrote it; None if there was none.

    A value that somebody set after the graft counts as the original's.
    """
    for graft in grafts_of(module).values():
        if name in graft.saved and module.__dict__.get(name) == graft.written.get(name):
            value = graft.saved[name]
            return None if value is MISSING or value == MISSING else value
    return getattr(module, name, None)

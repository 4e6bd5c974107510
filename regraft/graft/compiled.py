"""Methods of grafted modules for a compiler: their calls of functions that drop lead elsewhere, with no mode.

A compiler refuses a mode that is entered inside a checkpoint. So for compiled code a method is made anew from
its own code, with the global names that it looks up, and those of the functions it calls, bound to what takes
the place of each function that drops: once for each setting of its module's grafts, when a graft is put in
place, since a compiler cannot trace the making of a function.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regraft.find.bytecode_scan import DEEPEST, is_torchs, named_by
from regraft.graft.handlers import HANDLERS, CallGrafts, routes
from regraft.ops import OPS
from regraft.record import Graft, grafts_of

COMPILED = "_regraft_compiled"
"""The attribute of a wrapped method that holds its `CompiledVariants`."""
Replacements = Mapping[Callable[..., Any], Callable[..., Any]]
"""Function that drops -> what takes its place."""
_NAMESPACES = (torch, nn, F)


class CompiledVariants:
    """A method, and what it is made into for compiled code, by `variant_key`."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.made: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class _Mode:
    """Stands for a module that trains, or does not."""

    training: bool


def variant_key(grafts: Sequence[Graft], training: bool) -> str:
    """What two modules have in common that share a compiled variant of a method."""
    return "&".join([graft.settings for graft in grafts]) + ("+" if training else "-")


def _settings(graft: Graft) -> str:
    """The settings of one graft, as text."""
    return json.dumps([str(graft.slot), graft.variant, graft.rate, graft.options], default=str)


def compile_variants(module: nn.Module) -> None:
    """Make the compiled variants of the wrapped methods of `module`, for its grafts as they are now."""
    grafts = [graft for graft in grafts_of(module).values() if graft.slot.kind == "calls"]
    acting = [graft for graft in grafts if graft.slot.op != "boundary"]
    if not grafts or any(graft.fixes_eval for graft in acting):
        return
    for graft in grafts:
        graft.settings = _settings(graft)
    for name in dict.fromkeys(name for graft in grafts if graft.layer for name in graft.layer.args):
        variants: CompiledVariants | None = getattr(getattr(type(module), name, None), COMPILED, None)
        if variants is None:
            continue
        for training in (True, False):
            key = variant_key(grafts, training)
            if key not in variants.made and (made := _variant(variants.method, name, acting, training)):
                variants.made[key] = made


def _variant(
    method: Callable[..., Any], name: str, acting: Sequence[Graft], training: bool
) -> Callable[..., Any] | None:
    """The method with all of `acting` in place; None if some call in it cannot be bound to anything else."""
    if not training and not any(graft.in_eval for graft in acting):
        return method  # in eval nothing is to be done
    variant = method
    for graft in acting:
        # A copy: the module's own may be changed, and this one serves other modules too.
        grafts = CallGrafts(_Mode(training), [replace(graft, options=dict(graft.options))])
        replacements = {
            function: _replacement(grafts, function) for function, op in OPS.items() if op in routes(graft)
        }
        rebound = rebind_calls(variant, replacements)
        if rebound is None and not _is_in_another(graft, name):
            return None
        variant = rebound or variant
    return variant


def _replacement(grafts: CallGrafts, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return HANDLERS[function](grafts, function, args, kwargs)

    return call


def _is_in_another(graft: Graft, name: str) -> bool:
    """Does another method run the call, one that `name` calls?"""
    return any(other != name for other in graft.edit["methods"])


def rebind_calls(method: Callable[..., Any], replacements: Replacements) -> Callable[..., Any] | None:
    """`method` with `replacements` in the place of what it calls, itself or in functions that it calls.

    None where it names none of them: methods of the module that it calls are not followed.
    """
    return _Rebinding(replacements).function(method, 0)


class _Rebinding:
    """One method with all the functions below it, so that each of them is made once."""

    def __init__(self, replacements: Replacements) -> None:
        self.replacements = replacements
        self._made: dict[int, Callable[..., Any] | None] = {}

    def function(self, function: Any, depth: int) -> Callable[..., Any] | None:
        if not isinstance(function, FunctionType) or depth > DEEPEST:
            return None
        if id(function) not in self._made:
            self._made[id(function)] = None  # while it is made: it may call itself
            self._made[id(function)] = self._rebuilt(function, depth)
        return self._made[id(function)]

    def _rebuilt(self, function: FunctionType, depth: int) -> Callable[..., Any] | None:
        names = {}
        for name in _global_names(function.__code__):
            value = function.__globals__.get(name)
            new = self._value(value, depth)
            if new is not None:
                names[name] = new
        if self._reaches(function.__code__, function.__globals__):
            spaces = self._namespaces
            for name in _global_names(function.__code__):
                value = function.__globals__.get(name)
                names.update((name, copy) for space, copy in spaces if value is space)
        cells = [self._cell(cell, depth) for cell in function.__closure__ or ()]
        if not names and not any(cells):
            return None
        closure = tuple(new or old for new, old in zip(cells, function.__closure__ or (), strict=True))
        made = FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            function.__name__,
            function.__defaults__,
            closure,
        )
        made.__kwdefaults__ = function.__kwdefaults__
        # A name in these globals is not what it is in the module: the compiler of torch 2.6 would look there.
        made.__globals__.pop("__name__", None)
        return made

    def _value(self, value: Any, depth: int) -> Any:
        """What a name stands for now; None if it stands for what it did."""
        if isinstance(value, (FunctionType, BuiltinFunctionType)) and value in self.replacements:
            return self.replacements[value]
        if isinstance(value, FunctionType) and not is_torchs(value):
            return self.function(value, depth + 1)
        if isinstance(value, Mapping):
            return self._registry(value, depth)
        return None

    def _registry(self, registry: Mapping[Any, Any], depth: int) -> Any:
        """A registry of functions, such as Transformers' attentions, with those in it made anew."""
        made = {key: self._value(one, depth) for key, one in registry.items() if callable(one)}
        made = {key: one for key, one in made.items() if one is not None}
        if not made:
            return None
        try:
            again: Any = type(registry)()
            for key, one in {**registry, **made}.items():
                again[key] = one
        except Exception:  # a registry that is made or filled in another way stays as it is
            return None
        return again

    def _cell(self, cell: CellType, depth: int) -> CellType | None:
        # A decorator keeps the function that it wraps in a cell.
        try:
            new = self._value(cell.cell_contents, depth)
        except ValueError:  # empty
            return None
        return None if new is None else CellType(new)

    def _reaches(self, code: CodeType, names: Mapping[str, Any]) -> bool:
        inside = [one for one in code.co_consts if isinstance(one, CodeType)]
        found = any(_is_function(one) and one in self.replacements for one in named_by(code, names))
        return found or any(self._reaches(one, names) for one in inside)

    @functools.cached_property
    def _namespaces(self) -> list[tuple[ModuleType, ModuleType]]:
        """`torch`, `torch.nn` and `torch.nn.functional` as they are, but for what is taken over."""
        copies = {}
        for space in _NAMESPACES:
            copy = ModuleType(space.__name__)
            copy.__dict__.update(space.__dict__)
            for name, value in space.__dict__.items():
                if _is_function(value) and value in self.replacements:
                    copy.__dict__[name] = self.replacements[value]
            copies[space] = copy
        copies[torch].__dict__["nn"] = copies[nn]
        copies[nn].__dict__["functional"] = copies[F]
        return list(copies.items())


def _is_function(value: Any) -> bool:
    return isinstance(value, (FunctionType, BuiltinFunctionType))


def _global_names(code: CodeType) -> set[str]:
    """The names that the code may look up in its globals, that of functions inside it too."""
    inside = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*(_global_names(one) for one in inside))

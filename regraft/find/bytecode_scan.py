"""Calls of functional dropout that a class's code names: what can be said of a module that never ran."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from regraft.ops import OPS

DEEPEST = 3
"""Functions that functions call: attention is often two away from the forward."""


def written_calls(cls: type[nn.Module]) -> dict[str, frozenset[str]]:
    """The operations that drop which `cls` names in its forward, or in what that calls, and the methods.

    A name in the code is no call that runs: which of two branches a config chooses is not seen here.
    """
    if cls.__module__.split(".")[0] == "torch":
        return {}
    if cls not in _known:
        scan = _Scan(cls)
        scan.method("forward", 0)
        _known[cls] = {op: frozenset(methods) for op, methods in scan.found.items()}
    return _known[cls]


_known: WeakKeyDictionary[type[nn.Module], dict[str, frozenset[str]]] = WeakKeyDictionary()


class _Scan:
    """One look through the code of a class."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.found: dict[str, set[str]] = {}
        self._seen: set[CodeType] = set()
        self._methods: list[str] = []

    def method(self, name: str, depth: int) -> None:
        """Scan a method of the class, if the class or a base of the user's own defines it."""
        function = inspect.unwrap(getattr(self.cls, name, None) or _nothing)
        self._methods.append(name)
        self._function(function, depth)
        self._methods.pop()

    def _function(self, function: Any, depth: int) -> None:
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or is_torchs(function) or depth > DEEPEST:
            return
        self._code(function.__code__, function.__globals__, depth)

    def _code(self, code: CodeType, names: Mapping[str, Any], depth: int) -> None:
        if code in self._seen:
            return
        self._seen.add(code)
        for named in named_by(code, names):
            if isinstance(named, str):
                self.method(named, depth + 1)
            elif isinstance(named, Mapping):  # a registry of functions, such as Transformers' attentions
                for function in named.values():
                    self._function(function, depth + 1)
            elif isinstance(named, (FunctionType, BuiltinFunctionType)):
                self._call(named, depth)
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self._code(inner, names, depth)

    def _call(self, function: Any, depth: int) -> None:
        if function in OPS:
            self.found.setdefault(OPS[function], set()).update(self._methods)
        else:
            self._function(function, depth + 1)


def _nothing() -> None:
    """Stands for a method that is not there."""


def is_torchs(function: FunctionType) -> bool:
    """Is it a function of torch itself?"""
    return (function.__module__ or "").split(".")[0] == "torch"


def named_by(code: CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    """What the code refers to: objects by their global name and attributes, methods of self by name."""
    value: Any = None
    on_self = False
    for instruction in dis.get_instructions(code):
        name, argument = instruction.opname, instruction.argval
        if name == "LOAD_GLOBAL":
            value, on_self = names.get(argument), False
            yield value
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            if on_self:
                yield argument
            inside = isinstance(value, ModuleType)
            value, on_self = getattr(value, argument, None) if inside else None, False
            if inside:
                yield value
        elif name.startswith("LOAD_FAST"):
            last = argument[-1] if isinstance(argument, tuple) else argument
            value, on_self = None, last == "self"
        elif name not in ("PUSH_NULL", "PRECALL", "CACHE", "EXTENDED_ARG"):
            value, on_self = None, False

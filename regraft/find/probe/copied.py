"""The structure of a model, copied: modules of their own on tensors of their own, to run in its place.

What a forward does to modules it does to the copies, so a model that is used in another thread is left alone.
Only the modules and the containers in them are copied; weights, configs and all else are shared.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.libraries import is_fsdp

_ORIGINAL = "_regraft_original"
"""The attribute of a copy that holds the module it was made from."""


class NotCopiedError(Exception):
    """A forward of the copy has reached a module of the original, through a closure or another object."""


def original(module: Any) -> Any:
    """The module that a copy was made from; anything else as it is."""
    return module.__dict__.get(_ORIGINAL, module) if isinstance(module, nn.Module) else module


def copied(modules: list[nn.Module], tensors: Mapping[int, Tensor]) -> list[nn.Module]:
    """Copies of modules that refer to one another, and to other tensors: `tensors` by the ids of theirs.

    Raises:
        NotCopiedError: one of them cannot be copied attribute by attribute.
    """
    memo: dict[int, Any] = dict(tensors)
    for module in modules:
        cls = type(module)
        if (
            is_fsdp(module)  # which keeps the modules in a state of its own
            or isinstance(module, torch.jit.ScriptModule)
            or hasattr(cls, "__del__")
            or _has_slots(cls)
        ):
            raise NotCopiedError(cls.__name__)
        memo[id(module)] = object.__new__(cls)
    for module in modules:
        attributes = {name: _translate(value, memo) for name, value in module.__dict__.items()}
        if "_compiled_call_impl" in attributes:  # compiled code calls the original's method
            attributes["_compiled_call_impl"] = None
        memo[id(module)].__dict__.update(attributes, **{_ORIGINAL: module})
    return [memo[id(module)] for module in modules]


def _has_slots(cls: type) -> bool:
    return any(base.__dict__.get("__slots__") for base in cls.__mro__)


def _translate(value: Any, memo: dict[int, Any]) -> Any:
    """A value as the copies see it: modules by their copies, also inside containers and methods."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        owner = _translate(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        args, keywords = _translate(value.args, memo), _translate(value.keywords, memo)
        partial = functools.partial(_translate(value.func, memo), *args, **keywords)
        partial.__dict__.update(value.__dict__)
        return partial
    if type(value) is weakref.ref:
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if type(value) in (dict, OrderedDict):
        memo[id(value)] = mapping = type(value)()
        mapping.update((key, _translate(entry, memo)) for key, entry in value.items())
        return mapping
    if type(value) is list:
        entries: list[Any] = []
        memo[id(value)] = entries
        entries.extend(_translate(entry, memo) for entry in value)
        return entries
    if type(value) is tuple:
        return tuple(_translate(entry, memo) for entry in value)
    if type(value) is set:
        return {_translate(entry, memo) for entry in value}
    return value

"""Settings of a module: what its forward goes by beside its class and its tensors, as values that compare."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.record import RECORD, grafts_of, original_attribute, original_class

_OWN = frozenset(vars(nn.Module())) | {RECORD}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_NUMBERS = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = (*_NUMBERS, enum.Enum, torch.dtype, torch.device, torch.layout)
_ORIGINS = frozenset({"_name_or_path", "name_or_path", "transformers_version"})
"""Of a model or a configuration: where it comes from, which no forward goes by."""
_DEEPEST = 8
"""How far into containers values are compared."""


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A value of which nothing tells the content: equal to itself alone. A tensor is equal by value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque):
            return False
        one, two = self.value, other.value
        if one is two or not (isinstance(one, Tensor) and isinstance(two, Tensor)):
            return one is two
        return not (one.is_meta or two.is_meta) and one.device == two.device and torch.equal(one, two)

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__}>"


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The settings of a module by name, as they are beneath any graft.

    Its class, its attributes, hooks and flags: `negative_slope`, `stride`, `num_heads`, a configuration.
    """
    cls = original_class(module)
    settings: dict[str, Any] = {"class": f"{cls.__module__}.{cls.__qualname__}", "training": module.training}
    written = {name for graft in grafts_of(module).values() for name in graft.written}
    for name, value in vars(module).items():
        if name not in _OWN | _ORIGINS and not isinstance(value, Tensor):
            settings[name] = comparable(original_attribute(module, name) if name in written else value)
    for name in _HOOKS:
        hooks = getattr(module, name, None)
        if hooks:
            settings[name.strip("_")] = tuple(map(comparable, hooks.values()))
    frozen = [name for name, p in module.named_parameters(recurse=False) if not p.requires_grad]
    if frozen:
        settings["frozen"] = tuple(frozen)
    for slot, graft in grafts_of(module).items():
        if slot == "passes":
            settings["passes"] = comparable(graft.options)
    return settings


def tensors_of(root: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers (those outside the state dict, too) and tensors in plain attributes, by name."""
    tensors = {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers())}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[f"{path}.{name}".lstrip(".")] = value
    return {**root.state_dict(), **tensors}


def comparable(value: Any, depth: int = 0) -> Any:
    """The value, functions by their code and objects by their content; `Opaque` where neither is known."""

    def inner(item: Any) -> Any:
        return comparable(item, depth + 1)

    if isinstance(value, _PLAIN):
        return value
    if depth > _DEEPEST:
        return Opaque(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(inner, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(inner, value))
    if isinstance(value, Mapping):
        return tuple((inner(key), inner(item)) for key, item in value.items())
    if isinstance(value, weakref.ref):
        return inner(value())
    if isinstance(value, functools.partial):
        return inner((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return inner(value.__func__)
    if isinstance(value, types.FunctionType):
        code, held = value.__code__, inspect.getclosurevars(value).nonlocals
        return value.__qualname__, code.co_code, repr(code.co_consts), inner(held)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(getattr(value, "to_dict", None)):
        entries = {key: item for key, item in value.to_dict().items() if key not in _ORIGINS}
        return type(value).__qualname__, inner(entries)
    if dataclasses.is_dataclass(value):
        return type(value).__qualname__, inner(vars(value))
    return Opaque(value)


def is_opaque(value: Any) -> bool:
    """Is there anything in it that only itself is equal to?"""
    return isinstance(value, Opaque) or (isinstance(value, (tuple, frozenset)) and any(map(is_opaque, value)))

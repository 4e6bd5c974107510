"""What a model is, to the identity of each object, and how two looks at it differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Class, attributes and entries of every module, and every tensor's version and place."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"{name}:class"] = type(module)
        for key, value in module.__dict__.items():
            seen[f"{name}.{key}"] = value
            if isinstance(value, _CONTAINERS):
                seen[f"{name}.{key}:entries"] = value.copy()
                seen[f"{name}.{key}:order"] = list(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"{name}:version"] = (tensor._version, tensor.dtype, tensor.device, tensor.requires_grad)
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of everything that is not the same object, or not the same entries, as before."""
    names = [*before, *(name for name in after if name not in before)]
    return [name for name in names if not _same(before.get(name, _GONE), after.get(name, _GONE))]


_GONE = object()


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(a is b or a == b for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and isinstance(one, (int, float, str, tuple, set)) and one == other


def assert_same(before: dict[str, Any], model: nn.Module) -> None:
    """The model is what it was when the snapshot was taken."""
    assert differences(before, snapshot(model)) == []


def same_in_eval(model: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether two models' first outputs in eval are equal bit for bit; their modes are put back."""
    outputs = []
    for one in (model, other):
        flags = [(module, module.training) for module in one.modules()]
        one.eval()
        with torch.no_grad():
            made = one(*args, **kwargs)
        outputs.append(made if isinstance(made, torch.Tensor) else made[0])
        for module, flag in flags:
            module.training = flag
    return torch.equal(*outputs)

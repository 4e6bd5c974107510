"""Values inside values: what a forward takes and gives back, walked with a name for every leaf."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputsError

Change = Callable[..., Any]
"""`change(name, leaf, *the same leaf of the other trees)` gives the new leaf."""

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Slot:
    """Stands in a tree for the tensor of this number."""

    def __init__(self, number: int) -> None:
        self.number = number


def emptied(tree: Any) -> tuple[Any, list[Tensor]]:
    """`tree` with a slot for every tensor, and the tensors."""
    tensors: list[Tensor] = []

    def empty(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    return mapped(empty, "", tree), tensors


def filled(tree: Any, tensors: Sequence[Any]) -> Any:
    """The tree again, with these tensors in its slots."""
    return mapped(lambda _, leaf: tensors[leaf.number] if isinstance(leaf, Slot) else leaf, "", tree)


def mapped(change: Change, name: str, first: Any, *others: Any) -> Any:
    """`first` with every leaf changed; containers keep their type (ModelOutput, dict, tuple, dataclass).

    Raises:
        InputsError: the trees are not built alike.
    """
    parts = _parts(first)
    if parts is None:
        return change(name, first, *others)
    if any(type(other) is not type(first) for other in others):
        raise _unlike(name)
    other_parts = [_parts(other) or {} for other in others]
    if any(other.keys() != parts.keys() for other in other_parts):
        raise _unlike(name)
    new = {
        key: mapped(change, _joined(name, key), part, *(other[key] for other in other_parts))
        for key, part in parts.items()
    }
    return _rebuilt(first, new)


def pass_of(outputs: Any, number: int) -> Any:
    """What one of the passes gave, of outputs of several."""
    return mapped(lambda _, leaf: leaf[number] if isinstance(leaf, Tensor) else leaf, "", outputs)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf with its name, in order."""
    parts = _parts(value)
    if parts is None:
        yield name, value
        return
    for key, part in parts.items():
        yield from leaves(_joined(name, key), part)


def _parts(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return None


def _rebuilt(old: Any, new: dict[Any, Any]) -> Any:
    if isinstance(old, Mapping):
        copied: Any = copy.copy(old)
        for key, value in new.items():
            copied[key] = value
        return copied
    if isinstance(old, tuple) and hasattr(old, "_fields"):
        # Not by its constructor, which may look at the values: these can be slots.
        return tuple.__new__(type(old), new.values())
    if isinstance(old, (tuple, list)):
        return type(old)(new.values())
    return dataclasses.replace(old, **new)


def _joined(name: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{name}[{key}]" if name else f"[{key}]"
    return f"{name}.{key}" if name else str(key)


def _unlike(name: str) -> InputsError:
    return InputsError(
        "two passes gave outputs that are not built alike",
        where=name or "the output",
        remedy="stack what you need by yourself, from passes made one after the other",
    )

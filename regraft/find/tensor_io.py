"""What flows into and out of a module: its first tensor, found and replaced in whatever holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Flow = tuple[tuple[int, ...], bool]
"""The shape of a tensor, and whether it is of floating point."""
Change = Callable[[Tensor], Tensor]


class NoTensorError(LookupError):
    """A value has no tensor where one was looked for."""


def first_tensor(value: Any, field: str = "") -> Tensor:
    """The first tensor in a value that has a shape, or the one in its `field`.

    A loss, which models return before their logits, is a single number: no tensor to drop in.

    Raises:
        NoTensorError: there is none.
    """
    if field:
        return first_tensor(_field(value, field))
    if isinstance(value, Tensor):
        return value
    for _, item in _items(value):
        if _holds(item):
            return first_tensor(item)
    raise NoTensorError(f"there is no tensor in a {type(value).__name__}")


def with_first(value: Any, field: str, change: Change) -> Any:
    """The value with its first tensor changed, or the one in its `field`; itself it stays as it is.

    Raises:
        NoTensorError: there is none.
    """
    if isinstance(value, Tensor) and not field:
        return change(value)
    if field:
        return _with(value, _key(value, field), with_first(_field(value, field), "", change))
    for key, item in _items(value):
        if _holds(item):
            return _with(value, key, with_first(item, "", change))
    raise NoTensorError(f"there is no tensor in a {type(value).__name__}")


def flow(value: Any) -> Flow | None:
    """The first tensor of a value as a shape; None if there is none."""
    try:
        found = first_tensor(value)
    except Exception:  # a module may return what nobody has foreseen, and this only looks
        return None
    return tuple(found.shape), found.is_floating_point()


def _holds(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.dim() > 0
    return any(_holds(one) for _, one in _items(item))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((one.name, getattr(value, one.name)) for one in dataclasses.fields(value))


def _key(value: Any, field: str) -> Any:
    return int(field) if isinstance(value, (tuple, list)) and field.isdigit() else field


def _field(value: Any, field: str) -> Any:
    key = _key(value, field)
    for name, item in _items(value):
        if name == key:
            return item
    if isinstance(value, tuple) and field in getattr(value, "_fields", ()):
        return getattr(value, field)
    raise NoTensorError(f"a {type(value).__name__} has no {field!r}")


def _with(value: Any, key: Any, item: Any) -> Any:
    if isinstance(value, tuple):
        if hasattr(value, "_replace"):
            name = key if isinstance(key, str) else getattr(value, "_fields")[key]  # noqa: B009
            return value._replace(**{name: item})
        return (*value[:key], item, *value[key + 1 :])
    if isinstance(value, list):
        return [*value[:key], item, *value[key + 1 :]]
    if isinstance(value, Mapping):
        whole = {**value, key: item}
        # Outputs of Transformers are mappings that are made like dataclasses.
        return type(value)(**whole) if dataclasses.is_dataclass(value) else type(value)(whole)  # type: ignore[call-arg]
    return dataclasses.replace(value, **{key: item})

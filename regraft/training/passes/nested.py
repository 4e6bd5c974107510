"""Values inside values: what a forward takes and gives back, walked with a name for every leaf."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regraft.errors import InputsError, ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a forward
Change = Callable[..., Any]  # `change(name, leaf, *the same leaf of the other trees)` gives the new leaf
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def mapped(change: Change, name: str, first: Any, *others: Any) -> Any:
    """`first` with every leaf changed; containers keep their type (ModelOutput, dict, tuple, dataclass)."""
    parts = _parts(first)
    if parts is None:
        return change(name, first, *others)
    other_parts = [_parts(other) if type(other) is type(first) else None for other in others]
    if any(other is None or other.keys() != parts.keys() for other in other_parts):
        raise InputsError(
            "two passes gave outputs that are not built alike",
            where=name or "the output",
            remedy="stack what you need by yourself, from passes made one after the other",
        )
    new = {
        key: mapped(change, _path(name, key), part, *(cast("Any", other)[key] for other in other_parts))
        for key, part in parts.items()
    }
    if isinstance(first, Mapping):
        copied: Any = copy.copy(first)
        for key, value in new.items():
            copied[key] = value
        return copied
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return tuple.__new__(type(first), new.values())  # its constructor might look at the values
    if isinstance(first, (tuple, list)):
        return type(first)(new.values())
    return dataclasses.replace(first, **new)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf with its name, in order."""
    parts = _parts(value)
    if parts is None:
        yield name, value
        return
    for key, part in parts.items():
        yield from leaves(_path(name, key), part)


def tensors_in(value: Any) -> list[Tensor]:
    """Its tensors, in order."""
    return [leaf for _, leaf in leaves("", value) if isinstance(leaf, Tensor)]


def tensors_changed(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with every tensor changed."""
    return mapped(lambda _, leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, "", value)


def filled(tree: Any, tensors: Iterable[Any]) -> Any:
    """The tree with these in the places of its tensors."""
    following = iter(tensors)
    return tensors_changed(lambda _: next(following), tree)


def pass_of(outputs: Any, number: int) -> Any:
    """What one of the passes gave, of outputs of several."""
    return tensors_changed(lambda tensor: tensor[number], outputs)


def check_output(name: str, leaf: Any) -> None:
    """Raise unless an output is a tensor or a constant."""
    if not isinstance(leaf, (Tensor, *CONSTANTS)):
        raise InputsError(
            f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
            where=name,
            remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
        )


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, as Transformers has them: a forward writes into it."""
    return hasattr(value, "reorder_cache") and hasattr(value, "get_seq_length")


def own_caches(call: Call) -> Call:
    """The same arguments with copies of their caches: every pass gets one of its own."""
    if not holds_cache(call):
        return call
    return cast("Call", mapped(lambda _, leaf: copied(leaf) if is_cache(leaf) else leaf, "", call))


def holds_cache(value: Any) -> bool:
    """Whether there is one in it."""
    return any(is_cache(leaf) for _, leaf in leaves("", value))


def outputs_of(forward: Callable[..., Any], call: Call) -> Any:
    """The outputs, with None for a cache that was not asked for: it would have no meaning across passes.

    Many forwards fill one by default, and not all of them have an argument `use_cache` to say otherwise.
    """
    args, kwargs = own_caches(call)
    outputs = forward(*args, **kwargs)
    if kwargs.get("use_cache") or not holds_cache(outputs):
        return outputs
    return mapped(lambda _, leaf: None if is_cache(leaf) else leaf, "", outputs)


def copied(cache: Any) -> Any:
    """A copy of a cache that a forward may write into."""

    def clone(func: Any, args: Any, kwargs: Any) -> Any:
        # A tensor with a history has no deep copy.
        return args[0].clone() if func is Tensor.__deepcopy__ else func(*args, **kwargs)

    with Calls(clone):
        return copy.deepcopy(cache)


class Calls(TorchFunctionMode):
    """A function mode of one function: `run(func, args, kwargs)` makes the calls of torch's functions."""

    def __init__(self, run: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})


def joined(parts: list[Any]) -> Any:
    """Outputs of several forwards, along their first axis."""
    return parts[0] if len(parts) == 1 else mapped(_concatenated, "", *parts)


def _concatenated(name: str, *parts: Any) -> Any:
    first, *others = parts
    if not isinstance(first, Tensor):
        return first if all(other is first or other == first for other in others) else parts
    shapes = sorted({tuple(x.shape[1:]) for x in parts})
    if len(shapes) > 1:
        raise ModelError(
            f"the passes differ in shape, {' and '.join(map(str, shapes))}, and cannot be stacked",
            where=f"output {name or 'of the model'}",
            remedy="its length is drawn at random: call the model once for each pass",
        )
    return torch.cat(parts)


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


def _path(name: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{name}[{key}]"
    return f"{name}.{key}" if name else str(key)

"""Where a model's outputs and arguments are: logits, loss and labels, by name or by position."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from regraft.errors import InputsError, LossError
from regraft.training.rdrop.layer import Call
from regraft.training.rdrop.options import Key


def parts_of(outputs: Any) -> dict[Key, Any]:
    """What `outputs` hold, by name or by position; a tensor alone has none."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, (tuple, list)):
        names = getattr(outputs, "_fields", range(len(outputs)))
        return dict(zip(names, outputs, strict=True))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return {}


def part(outputs: Any, key: Key) -> Any:
    """One of them; None if there is none."""
    if isinstance(key, int) and isinstance(outputs, (tuple, list)):
        return outputs[key] if -len(outputs) <= key < len(outputs) else None
    return parts_of(outputs).get(key)


def logits_in(outputs: Any, key: Key | None, *, labelled: bool, where: str = "") -> Tensor:
    """The tensor of logits; by default the one called logits, or a tuple's first (behind the loss)."""
    if isinstance(outputs, Tensor):
        found: Any = outputs
    elif key is not None:
        found = part(outputs, key)
    else:
        found = part(outputs, "logits")
        if found is None and isinstance(outputs, (tuple, list)) and not hasattr(outputs, "_fields"):
            found = part(outputs, 1 if labelled else 0)
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0:
        return found
    names = [repr(name) for name, value in parts_of(outputs).items() if value is not None and name != "loss"]
    wanted = "one output called logits" if key is None else f"the output {key!r}"
    raise LossError(
        f"R-Drop compares {wanted}, and the model gives {', '.join(names) or type(outputs).__name__}",
        where=where,
        remedy=f"name it: logits={names[0] if names else '...'}; of several, a tuple of names",
    )


def loss_in(outputs: Any, key: Key | None, dims: int = 0) -> Tensor | None:
    """The loss among labelled outputs (of `dims` axes); by default the one called loss or a tuple's first."""
    found = part(outputs, "loss" if key is None else key)
    if found is None and key is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    return found if isinstance(found, Tensor) and found.dim() == dims else None


def with_loss(outputs: Any, loss: Tensor, key: Key | None, *, labelled: bool) -> Any:
    """Outputs of one pass with this loss: in the place of their own, or before them if they have none."""
    if isinstance(outputs, Mapping):
        name = "loss" if key is None else key
        rest = {other: value for other, value in outputs.items() if other != name}
        return type(outputs)(**{str(name): loss, **rest})
    if isinstance(outputs, (tuple, list)):
        fields = getattr(outputs, "_fields", None)
        if fields is not None:
            named: Any = outputs
            return named._replace(**{fields[key] if isinstance(key, int) else key or "loss": loss})
        if key is None and not labelled:
            return (loss, *outputs)
        at = int(key or 0) % len(outputs)
        return type(outputs)((*outputs[:at], loss, *outputs[at + 1 :]))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return dataclasses.replace(outputs, **{str(key or "loss"): loss})
    return loss, outputs


def named_call(forward: Callable[..., Any], call: Call) -> Call:
    """The same call with its arguments by name, if all of them have one."""
    args, kwargs = call
    parameters = list(inspect.signature(forward).parameters.values())[: len(args)]
    if len(parameters) < len(args) or any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in parameters):
        return call
    return (), {**{each.name: value for each, value in zip(parameters, args, strict=True)}, **kwargs}


def argument_name(forward: Callable[..., Any], key: Key) -> str:
    """The name of a parameter of `forward`, given by name or by position."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    names = list(parameters)
    if isinstance(key, int) and key < len(names):
        return names[key]
    if isinstance(key, str) and (key in names or takes_any):
        return key
    raise InputsError(f"the forward has no argument {key!r}", remedy=f"it has {', '.join(names)}")

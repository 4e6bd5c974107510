"""A model's outputs, whatever holds them: where the logits are, and where the loss goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.errors import LossError
from regraft.training.passes.nested import mapped


def logits_of(outputs: Any, *, labelled: bool, where: str = "") -> Tensor:
    """The one tensor of logits; `labelled` outputs have the loss before it.

    Raises:
        LossError: there is none, or there are several.
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
        known = [name for name in outputs if name != "loss"]
    elif isinstance(outputs, (tuple, list)):
        at = 1 if labelled else 0
        found = outputs[at] if len(outputs) > at else None
        known = [f"[{i}]" for i in range(len(outputs))]
    else:
        found, known = outputs, [type(outputs).__name__]
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1:
        return found
    raise LossError(
        "R-Drop compares one output called logits, and the model gives " + (", ".join(known) or "none"),
        where=where,
        remedy="make the passes by regraft.stochastic_passes and add the rdrop_loss of each output",
    )


def loss_of(outputs: Any) -> Tensor | None:
    """The loss among labelled outputs, or None."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    return found if isinstance(found, Tensor) else None


def pass_of(outputs: Any, number: int) -> Any:
    """What one of the passes gave."""
    return mapped(lambda _, leaf: leaf[number] if isinstance(leaf, Tensor) else leaf, "", outputs)


def with_loss(outputs: Any, loss: Tensor, *, labelled: bool) -> Any:
    """Outputs of one pass with this loss: in the place of their own, or before them if they have none."""
    if isinstance(outputs, Mapping):
        rest = {name: value for name, value in outputs.items() if name != "loss"}
        return type(outputs)(**{"loss": loss, **rest})
    rest_of = outputs[1:] if labelled else outputs
    return (loss, *rest_of) if isinstance(outputs, (tuple, list)) else (loss, outputs)

"""Every weight that multiplies lent to its reader, by the class layer itself, without rules or a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recording import record_products
from torch import nn

from regraft.find.walk import named_modules
from regraft.find.weights import Weight, weights_of
from regraft.graft.slots import set_graft
from regraft.graft.weights import lending
from regraft.variants.registry import complete_options, spec


def weights(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Weight]:
    recorder = record_products(model, *args, **kwargs)
    return {weight.name: weight for weight in weights_of(recorder, named_modules(model))}


def lend(
    model: nn.Module,
    chosen: dict[str, Weight],
    *,
    p: float = 0.5,
    variant: str = "dropconnect",
    keep: Callable[[Weight], bool] = lambda weight: weight.kind != "router",
    **options: Any,
) -> Callable[[], None]:
    """Lend the weights; returns what takes them all back."""
    complete = complete_options(spec(variant), options)
    slots = []
    for weight in chosen.values():
        if keep(weight) and weight.obstacle is None:
            graft = lending(weight.holder_path, weight.attribute, variant, p, complete)
            set_graft(weight.reader, graft.slot, graft)
            slots.append((weight.reader, graft.slot))

    def back() -> None:
        for reader, slot in slots:
            set_graft(reader, slot, None)

    back.count = len(slots)
    return back

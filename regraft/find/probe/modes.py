"""A model put into training or eval for a look, with the marks that tell where a call's rate comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from regraft.find.kinds import op_of
from regraft.find.probe.preserve_state import unchanged
from regraft.record import temporarily_ungrafted

_LAYER_DROPS = ("layerdrop", "layer_drop")


class MarkedRate(float):
    """A rate that knows whose it is: the same number, so that no model can notice."""

    module: nn.Module


@contextmanager
def marked(modules: list[nn.Module]) -> Iterator[None]:
    """The originals of all modules in training mode; afterwards everything is as it was.

    LayerDrop is at 0, so that no layer is missed. Each dropout's rate is marked, so that a call that uses
    it tells which module it got it from.
    """
    with unchanged(modules), temporarily_ungrafted(modules):
        set_training(modules, mode=True)
        for module in modules:
            attributes = module.__dict__
            for name in _LAYER_DROPS:
                if isinstance(attributes.get(name), float):
                    attributes[name] = 0.0
            rate: Any = attributes.get("p")
            if isinstance(rate, (float, int)) and not isinstance(rate, bool) and op_of(module) is not None:
                attributes["p"] = MarkedRate(rate)
                attributes["p"].module = module
        yield


def set_training(modules: list[nn.Module], *, mode: bool) -> None:
    """Set the flags themselves: a `train()` of the user's own may leave some of them alone."""
    for module in modules:
        module.__dict__["training"] = mode

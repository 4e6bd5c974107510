"""A model put into training or eval for a look, with the marks that tell where a call's rate comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from regraft.find.kinds import op_of
from regraft.find.original import stand_aside
from regraft.find.unchanged import unchanged

Marks = dict[float, tuple[nn.Module, float]]
"""Marked rate -> the module it is the rate of, and the true rate."""

_LAYER_DROPS = ("layerdrop", "layer_drop")


@contextmanager
def marked(modules: list[nn.Module]) -> Iterator[Marks]:
    """The originals of all modules in training mode; afterwards everything is as it was.

    LayerDrop is at 0, so that no layer is missed. Each dropout's rate is moved by less than any model can
    notice, so that a call that uses it tells which module it got it from.
    """
    marks: Marks = {}
    with unchanged(modules), _originals(modules):
        set_training(modules, mode=True)
        for module in modules:
            attributes = module.__dict__
            for name in _LAYER_DROPS:
                if isinstance(attributes.get(name), float):
                    attributes[name] = 0.0
            rate = attributes.get("p")
            if isinstance(rate, float) and 0 < rate < 1 and op_of(module) is not None:
                attributes["p"] = rate * (1 - 1e-12 * (len(marks) + 1))
                marks[attributes["p"]] = (module, rate)
        yield marks


def set_training(modules: list[nn.Module], *, mode: bool) -> None:
    """Set the flags themselves: a `train()` of the user's own may leave some of them alone."""
    for module in modules:
        module.__dict__["training"] = mode


@contextmanager
def _originals(modules: list[nn.Module]) -> Iterator[None]:
    """Grafts stand aside: a rule is read against the original."""
    grafted = [(module, cls) for module in modules if (cls := stand_aside(module)) is not None]
    try:
        yield
    finally:
        for module, cls in grafted:
            module.__class__ = cls

"""The one step that all changes are made of: put a graft into a slot of a module, or take it out."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.errors import ModelError
from regraft.find.probe.preserve_state import restore, snapshot
from regraft.graft.classes import Namespace, layered
from regraft.graft.compiled import compile_variants
from regraft.ops import MULTI_HEAD, RECURRENT_OPS
from regraft.record import (
    MISSING,
    RECORD,
    Graft,
    Layer,
    Slot,
    grafts_of,
    original_class,
    rebind_instance_forward,
)

ORDER = ("rate", "variant", "calls", "lend", "insert", "passes")
"""Kinds of slots in the order of their layers, the lowest first."""
_WRITTEN_OUT = [Slot("calls", op) for op in (MULTI_HEAD, *sorted(RECURRENT_OPS))]


def conflicting_slot(module: nn.Module, slot: Slot) -> Slot | None:
    """The slot that must be emptied first: an `nn.LSTM` has its rate set or is written out, never both."""
    rate = Slot("rate")
    others = _WRITTEN_OUT if slot == rate else [rate] if slot in _WRITTEN_OUT else []
    return next((other for other in others if str(other) in grafts_of(module)), None)


def set_graft(module: nn.Module, slot: Slot, graft: Graft | None) -> Graft | None:
    """Put `graft` into a slot, or empty it; returns what was there. Done completely or not at all."""
    grafts = dict(grafts_of(module))
    previous = grafts.pop(str(slot), None)
    if graft is not None:
        grafts[str(slot)] = graft
    was, before = type(module), snapshot(module)
    try:
        module.__class__ = layered(was, _layers(grafts))  # may refuse: an incompatible layout
        if previous is not None:
            _take_back(module, previous)
        if graft is not None:
            _write(module, graft)
        if grafts:
            module.__dict__[RECORD] = grafts
        else:
            module.__dict__.pop(RECORD, None)
        rebind_instance_forward(module)
        compile_variants(module)
    except BaseException:
        module.__class__ = was
        restore(module, before)
        raise
    return previous


def is_applied(module: nn.Module, current: Graft, graft: Graft) -> bool:
    """Does the current graft do what this one would? Then it stays, with its learned state."""
    if any(module.__dict__.get(name) != value for name, value in graft.written.items()):
        return False
    return _meaning(current) == _meaning(graft)


def _meaning(graft: Graft) -> tuple[object, ...]:
    residual = getattr(graft, "residual", False)
    return (graft.layer, graft.variant, graft.rate, graft.options, graft.in_eval, graft.fixes_eval, residual)


def _layers(grafts: dict[str, Graft]) -> list[Layer]:
    """The layers that the grafts need, one of each builder: all call sites of a module share theirs."""
    layers: dict[Any, Layer] = {}
    for graft in sorted(grafts.values(), key=lambda graft: ORDER.index(graft.slot.kind)):
        layer = graft.layer
        if layer is not None:
            other = layers.setdefault(layer.build, layer)
            if other.args != layer.args:
                layers[layer.build] = Layer(layer.build, tuple(sorted({*other.args, *layer.args})))
    return list(layers.values())


def _write(module: nn.Module, graft: Graft) -> None:
    for name, value in graft.written.items():
        graft.saved[name] = module.__dict__.get(name, MISSING)
        module.__dict__[name] = value
    for name, value in graft.state.items():
        if hasattr(module, name):
            raise ModelError(
                f"{original_class(module).__name__} has an attribute {name!r}, which the variant brings too",
                where=graft.edit.get("path", ""),
                remedy="rename it, or leave the site alone: a rule with None",
            )
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value, persistent=name not in graft.transient)
        graft.state[name] = None  # the module has it now, and may move it


def _take_back(module: nn.Module, graft: Graft) -> None:
    for name, value in graft.saved.items():
        if module.__dict__.get(name) != graft.written[name]:
            continue  # somebody set it since: that is not ours to undo
        if isinstance(value, str) and value == MISSING:
            del module.__dict__[name]
        else:
            module.__dict__[name] = value
    for name in graft.state:
        # Kept as trained, in case this graft is put back.
        graft.state[name] = module._parameters.pop(name, None)
        if graft.state[name] is None:
            graft.state[name] = module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)


def state_methods(base: type[nn.Module]) -> Namespace:
    """The method of a module with state of a graft by which a checkpoint brings it."""

    def load_from_state_dict(
        self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        base._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        for graft in grafts_of(self).values():
            graft.awaited = tuple(name for name in graft.awaited if prefix + name not in state_dict)

    return {"_load_from_state_dict": load_from_state_dict}


def require_state(graft: Graft) -> None:
    """Raise if the state that the graft had when its plan was saved has not been loaded."""
    if graft.awaited:
        raise ModelError(
            f"{graft.edit['after']} was saved with state ({', '.join(graft.awaited)}), which is not loaded: "
            "from_pretrained leaves out what the plain model has not",
            where=graft.edit["path"],
            remedy="regraft.load_plan(model, folder) reads the weights in that folder; or load the state "
            "dict after load_plan; or regraft.apply(model, plan), to begin anew",
        )

"""The one step that all changes are made of: put a graft into a slot of a module, or take it out."""

from __future__ import annotations

from torch import nn

from regraft.find.original import MISSING, RECORD, Graft, grafts_of, rebind_instance_forward
from regraft.graft.classes import layered

Change = tuple[nn.Module, str, Graft | None]
"""A module, a slot, and what was in it before."""

ORDER = ("rate", "variant", "calls", "insert", "passes")
"""Kinds of slots in the order of their layers, the lowest first. `calls:dropout` is of kind `calls`."""


def set_graft(module: nn.Module, slot: str, graft: Graft | None) -> Graft | None:
    """Put `graft` into a slot, or empty it; returns what was there. Done completely or not at all."""
    grafts = dict(grafts_of(module))
    previous = grafts.pop(slot, None)
    if graft is not None:
        grafts[slot] = graft
    cls = layered(type(module), _layers(grafts))
    module.__class__ = cls  # may refuse (an incompatible layout): nothing else has changed yet
    if previous is not None:
        _take_back(module, previous)
    if graft is not None:
        _write(module, graft)
    if grafts:
        module.__dict__[RECORD] = grafts
    else:
        module.__dict__.pop(RECORD, None)
    rebind_instance_forward(module)
    return previous


def _layers(grafts: dict[str, Graft]) -> list[str]:
    """The layers that the grafts need, each once: all call sites of a module share one."""
    slots = sorted(grafts, key=lambda slot: ORDER.index(slot.partition(":")[0]))
    layers = [grafts[slot].layer for slot in slots if grafts[slot].layer]
    calls = {name for one in layers if one.startswith("calls:") for name in one[6:].split(",")}
    plain = [one for one in layers if not one.startswith("calls:")]
    at = next((i for i, one in enumerate(plain) if not one.startswith("variant:")), len(plain))
    return [*plain[:at], *([f"calls:{','.join(sorted(calls))}"] if calls else []), *plain[at:]]


def _write(module: nn.Module, graft: Graft) -> None:
    for name, value in graft.written.items():
        graft.saved[name] = module.__dict__.get(name, MISSING)
        module.__dict__[name] = value
    for name, value in graft.state.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value, persistent=name not in graft.transient)


def _take_back(module: nn.Module, graft: Graft) -> None:
    for name, value in graft.saved.items():
        if module.__dict__.get(name) != graft.written[name]:
            continue  # somebody set it since: that is not ours to undo
        if isinstance(value, str) and value == MISSING:
            del module.__dict__[name]
        else:
            module.__dict__[name] = value
    for name in graft.state:
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)

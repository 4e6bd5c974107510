"""The versions of a method for compiled code: one for each setting of its module's call grafts.

They are made when a graft is put in place, since a compiler cannot trace the making of a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regraft.graft.compiled import rebound
from regraft.graft.handlers import ROUTES, Routed
from regraft.ops import OPS
from regraft.record import Graft, grafts_of

VERSIONS = "_regraft_versions"
"""The attribute of an entrance that holds its versions."""


class Versions:
    """The versions of one method, by the settings of the module."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.made: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class _Mode:
    """Stands for a module that trains, or does not."""

    training: bool


def settings_of(grafts: Sequence[Graft], training: bool) -> str:
    """What two modules have in common that one version serves."""
    return "&".join([graft.settings for graft in grafts]) + ("+" if training else "-")


def settings(graft: Graft) -> str:
    """The settings of one graft, as text."""
    return json.dumps([str(graft.slot), graft.variant, graft.rate, graft.options], default=str)


def prepare(module: nn.Module) -> None:
    """Make the versions of all entrances of `module` for its grafts as they are now."""
    grafts = [graft for graft in grafts_of(module).values() if graft.slot.kind == "calls"]
    acting = [graft for graft in grafts if graft.slot.op != "boundary"]
    if not grafts or any(graft.fixes_eval for graft in acting):
        return
    for graft in grafts:
        graft.settings = settings(graft)
    for name in dict.fromkeys(name for graft in grafts if graft.layer for name in graft.layer.args):
        versions: Versions | None = getattr(getattr(type(module), name, None), VERSIONS, None)
        if versions is None:
            continue
        for training in (True, False):
            key = settings_of(grafts, training)
            if key not in versions.made and (made := _version(versions.method, name, acting, training)):
                versions.made[key] = made


def _version(
    method: Callable[..., Any], name: str, acting: Sequence[Graft], training: bool
) -> Callable[..., Any] | None:
    """The method with all of `acting` in place; None if some call in it cannot be bound to anything else."""
    if not training and not any(graft.in_eval for graft in acting):
        return method  # in eval nothing is to be done
    made = method
    for graft in acting:
        # A copy: the module's own may be changed, and this version serves other modules too.
        routed = Routed(_Mode(training), [replace(graft, options=dict(graft.options))])
        takes = {function: _route(routed, function) for function, op in OPS.items() if op == graft.slot.op}
        found = rebound(made, takes)
        if found is None and not _is_in_another(graft, name):
            return None
        made = found or made
    return made


def _route(routed: Routed, function: Callable[..., Any]) -> Callable[..., Any]:
    def take(*args: Any, **kwargs: Any) -> Any:
        return ROUTES[function](routed, function, args, kwargs)

    return take


def _is_in_another(graft: Graft, name: str) -> bool:
    """Does another method run the call, one that `name` calls?"""
    return any(other != name for other in graft.edit["methods"])

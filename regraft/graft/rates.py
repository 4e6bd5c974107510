"""Rates of grafts: read and set where each graft keeps its own, as numbers that a compiler can follow.

A number that changes is compiled once more, as an input of the graph, and never again: torch does that
by itself for a float that it reads off a module or a graft, so rates stay plain floats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regraft.find.functions import ATTENTION
from regraft.find.graph_calls import graph_node
from regraft.find.site import Site
from regraft.find.walk import named_modules
from regraft.graft.graph_nodes import SLOT as NODE
from regraft.graft.graph_nodes import inside_slot, placed_grafts
from regraft.record import Graft, grafts_of
from regraft.variants.registry import complete_options, spec

Key = tuple[str, str, str]
"""A site's path, kind and operation."""
_WRITTEN = re.compile(r"\bp=[0-9.e+-]+")
_LEARNED = ("concrete",)
_FUSED = (ATTENTION, "MultiheadAttention", "multi_head_attention_forward", "LSTM", "GRU", "RNN")


@dataclass
class Rate:
    """The rate of one graft.

    Attributes:
        path: of the site.
        op: of the site.
        variant: the graft's.
        base: the rate as it was when it was found.
    """

    path: str
    op: str
    variant: str
    base: float
    module: nn.Module = field(repr=False)
    slot: str = field(repr=False)
    graft: Graft = field(repr=False)
    given: Any = field(repr=False)
    """The graft's own option p, None where the calls carry the rate."""
    place: tuple[nn.Module, str] = field(repr=False)
    """Where a change puts the graft: of a node, the module whose graph it is in."""

    @property
    def fused(self) -> bool:
        """Is it the rate of one of torch's own kernels, a constant in compiled code?"""
        return self.variant == "dropout" and self.op in _FUSED

    @property
    def in_place(self) -> bool:
        """Is the graft still there?"""
        return grafts_of(self.module).get(self.slot) is self.graft

    def set(self, p: float) -> None:
        """Give the graft the rate `p`, if it is still there."""
        if not self.in_place:
            return
        for name in self.graft.written:
            self.graft.written[name] = self.module.__dict__[name] = p
        self.graft.edit["options"]["p"] = p
        self.graft.edit["after"] = _WRITTEN.sub(f"p={p:g}", self.graft.edit["after"], count=1)

    def restore(self) -> None:
        """The rate as it was."""
        self.set(self.base)
        if self.in_place and self.given is None:
            del self.graft.edit["options"]["p"]
        elif self.in_place:
            self.graft.edit["options"]["p"] = self.given


def key_of(site: Site) -> Key:
    return site.path, site.kind, site.op


def rates_of(root: nn.Module, sites: dict[Key, Site]) -> tuple[list[Rate], dict[str, str]]:
    """The rates of the grafts at `sites`, and of those that have none to set, by path, the reason."""
    rates, without = [], {}
    for named, slot, graft in placed_grafts(named_modules(root)):
        keys = [(path, graft.edit.get("kind", ""), graft.edit.get("op", "")) for path in named.paths]
        site = next((sites[key] for key in keys if key in sites), None)
        if site is None:
            continue
        reason = _why_no_rate(graft)
        if reason is not None:
            without[site.path] = reason
            continue
        place = named.module, slot
        if slot.startswith(f"{NODE}:"):
            node = graph_node(named.module, slot.split(":")[1])
            assert node is not None
            assert node.module is not None
            rates.append(_rate(site, node.module, inside_slot(slot), graft, place))
        else:
            rates.append(_rate(site, *place, graft, place))
    return rates, without


def _rate(site: Site, module: nn.Module, slot: str, graft: Graft, place: tuple[nn.Module, str]) -> Rate:
    # The report that was made of the graft is to stay what it was.
    graft.edit = {**graft.edit, "options": dict(graft.edit["options"])}
    graft.settings = ""  # compiled code reads the rate at each call, and keeps no version with it
    given = graft.edit["options"].get("p")
    base = site.p or 0.0
    if site.variant is not None:  # else it was grafted for the sake of its rate, and stands at another
        if isinstance(given, str):
            base *= float(given[1:])
        elif given is not None:
            base = float(given)
        for name in graft.written:
            base = float(module.__dict__[name])
    return Rate(site.path, site.op, graft.edit["variant"], base, module, slot, graft, given, place)


def _why_no_rate(graft: Graft) -> str | None:
    """Why the rate of a graft cannot be set from outside; None if it can."""
    name = graft.edit["variant"]
    found = spec(name)
    options = complete_options(found, graft.edit["options"])
    if not found.rated or name == "off":
        return f"{name!r} has no rate"
    if name in _LEARNED:
        return f"{name!r} learns its rate"
    if found.needs_rate is not None and not found.needs_rate(options):
        return f"the rate plays no part in {graft.edit['after']}"
    return None

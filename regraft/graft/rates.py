"""Rates of grafts: read and set where each graft keeps its own, as numbers that a compiler can follow.

A number that changes is compiled once more, as an input of the graph, and never again: torch does that
by itself for a float that it reads off a module or a graft, so rates stay plain floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from regraft.find.site import Site
from regraft.find.walk import named_modules
from regraft.graft.graph_nodes import graft_at, placed_grafts
from regraft.ops import ATTENTION
from regraft.planning.plan import Edit, rendered
from regraft.record import Graft, Slot
from regraft.variants.registry import complete_options, spec

Key = tuple[str, str, str]
"""A site's path, kind and operation."""
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
    slot: Slot = field(repr=False)
    graft: Graft = field(repr=False)
    given: float | str | None = field(repr=False)
    """The graft's own rate, None where the calls carry it."""

    @property
    def fused(self) -> bool:
        """Is it the rate of one of torch's own kernels, a constant in compiled code?"""
        return self.variant == "dropout" and self.op in _FUSED

    @property
    def in_place(self) -> bool:
        """Is the graft still there?"""
        return graft_at(self.module, self.slot) is self.graft

    def set(self, p: float) -> None:
        """Give the graft the rate `p`, if it is still there."""
        if self.in_place:
            self._set(p, p)

    def restore(self) -> None:
        """The rate as it was."""
        if self.in_place:
            self._set(self.given, self.base)

    def _set(self, rate: float | str | None, p: float) -> None:
        graft = self.graft
        for name in graft.written:
            graft.written[name] = self.module.__dict__[name] = p
        if graft.rate == rate:
            return
        graft.rate = rate
        options = {key: value for key, value in graft.edit["options"].items() if key != "p"}
        options = options if rate is None else {"p": rate, **options}
        edit = Edit(**{**graft.edit, "options": options})
        graft.edit = {**graft.edit, "options": options, "after": rendered(edit)}


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
        rates.append(_rate(site, named.module, slot, graft))
    return rates, without


def _rate(site: Site, module: nn.Module, slot: Slot, graft: Graft) -> Rate:
    graft.settings = ""  # compiled code reads the rate at each call, and keeps no version with it
    given, base = graft.rate, site.p or 0.0
    if site.variant is not None:  # else it was grafted for the sake of its rate, and stands at another
        if isinstance(given, str):
            base *= float(given[1:])
        elif given is not None:
            base = float(given)
        for name in graft.written:
            base = float(module.__dict__[name])
    return Rate(site.path, site.op, graft.variant, base, module, slot, graft, given)


def _why_no_rate(graft: Graft) -> str | None:
    """Why the rate of a graft cannot be set from outside; None if it can."""
    name, found = graft.variant, spec(graft.variant)
    options = complete_options(found, graft.options)
    if not found.rated or name == "off":
        return f"{name!r} has no rate"
    if name in _LEARNED:
        return f"{name!r} learns its rate"
    if found.needs_rate is not None and not found.needs_rate(options):
        return f"the rate plays no part in {graft.edit['after']}"
    return None

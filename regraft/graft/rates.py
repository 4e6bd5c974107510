"""Rates of grafts: read and set where each graft keeps its own, as numbers that a compiler can follow.

A number that changes is compiled once more, as an input of the graph, and never again: torch does that
by itself for a float that it reads off a module or a graft, so rates stay plain floats.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regraft.find.site import Site
from regraft.find.walk import named_modules
from regraft.graft.apply import Step
from regraft.graft.graph_nodes import graft_at, placed_grafts
from regraft.interrupts import HeldInterrupts
from regraft.ops import FUSED, KEEPS_LAW
from regraft.planning.plan import Edit, rendered
from regraft.record import Graft, Slot
from regraft.variants.registry import complete_options, spec

Key = tuple[str, str, str]
"""A site's path, kind and operation."""
_LEARNED = ("concrete",)


@dataclass
class Rate:
    """The rate of one graft.

    Attributes:
        path: of the site.
        op: of the site.
        variant: the graft's.
        base: the rate outside any schedule.
        owner: the schedule that sets it.
    """

    path: str
    op: str
    variant: str
    base: float
    module: nn.Module = field(repr=False)
    slot: Slot = field(repr=False)
    graft: Graft = field(repr=False)
    given: float | str | None = field(repr=False)
    """The graft's own rate outside any schedule, None where the calls carry it."""
    owner: str = field(default="", repr=False)

    @property
    def fused(self) -> bool:
        """Is it the rate of one of torch's own kernels, a constant in compiled code?"""
        return self.variant == "dropout" and self.op in FUSED | KEEPS_LAW

    @property
    def in_place(self) -> bool:
        """Is the graft still there, and no other schedule's?"""
        there = graft_at(self.module, self.slot) is self.graft
        return there and self.graft.schedule.get("owner", "") == self.owner

    def set(self, p: float) -> None:
        """Give the graft the rate `p`, if it is still there."""
        if self.in_place:
            self._set(p, p)

    def restore(self) -> None:
        """Set the rate of before the schedule, which ends."""
        if self.in_place:
            self._set(self.given, self.base)
            self.graft.schedule = {}

    def rebase(self, base: float) -> None:
        """Take `base` for the rate outside the schedule."""
        self.base = self.graft.schedule["base"] = base
        if self.given is not None and not isinstance(self.given, str):
            self.given = self.graft.schedule["rate"] = base

    def _set(self, rate: float | str | None, p: float) -> None:
        graft = self.graft
        for name in graft.written:
            graft.written[name] = self.module.__dict__[name] = p
        if graft.rate == rate:
            return
        graft.rate = rate
        graft.edit = _edit_at(graft, rate)


def _edit_at(graft: Graft, rate: float | str | None) -> dict[str, Any]:
    options = {key: value for key, value in graft.edit["options"].items() if key != "p"}
    options = options if rate is None else {"p": rate, **options}
    edit = Edit(**{**graft.edit, "options": options})
    return {**graft.edit, "options": options, "after": rendered(edit)}


def unscheduled_edit(graft: Graft) -> dict[str, Any]:
    """The edit of a graft, with the rate that it has outside a schedule."""
    if "base" not in graft.schedule:
        return graft.edit
    rate = graft.schedule["rate"]
    return _edit_at(graft, graft.schedule["base"] if graft.schedule["temporary"] else rate)


@contextmanager
def all_or_no_rates(placed: Iterable[tuple[nn.Module, Graft]]) -> Iterator[None]:
    """An error in the block gives each of the grafts back the rate and the schedule that it had."""
    before = [(module, graft, {**vars(graft), "written": dict(graft.written)}) for module, graft in placed]
    values = [{name: module.__dict__.get(name) for name in graft.written} for module, graft, _ in before]
    try:
        with HeldInterrupts():
            yield
    except BaseException:
        with HeldInterrupts():
            for (module, graft, attributes), rates in zip(before, values, strict=True):
                vars(graft).update(attributes)
                module.__dict__.update(rates)
        raise


def claim(root: nn.Module, rates: list[Rate], grafts: list[Step]) -> list[Step]:
    """Make the rates those of a new schedule; returns the grafts that are in place for it alone.

    Args:
        root: the model.
        rates: of grafts that may be another schedule's.
        grafts: put in place for the new one.
    """
    owner = uuid.uuid4().hex
    before = {rate.graft.schedule.get("owner") for rate in rates} - {None}
    temporary = {id(graft) for _, _, graft in grafts}
    steps = list(grafts)
    for rate in rates:
        kept = rate.graft.schedule.get("temporary", False)
        if kept:
            steps.append((rate.module, rate.slot, rate.graft))
        rate.owner = owner
        rate.graft.schedule = {
            "owner": owner,
            "rate": rate.given,
            "base": rate.base,
            "temporary": kept or id(rate.graft) in temporary,
        }
    for named, slot, graft in placed_grafts(named_modules(root)):
        # A boundary that an earlier schedule put around the sites is needed as long as they are.
        if not graft.variant and graft.schedule.get("owner") in before:
            steps.append((named.module, slot, graft))
    for _, _, graft in steps:
        graft.schedule = {**graft.schedule, "owner": owner}
    return steps


def key_of(site: Site) -> Key:
    return site.path, site.kind, site.op


def rates_of(root: nn.Module, sites: dict[Key, Site]) -> tuple[list[Rate], dict[str, str]]:
    """The rates of the grafts at `sites`, and of those that have none to set, by path, the reason."""
    rates, without = [], {}
    for named, slot, graft in placed_grafts(named_modules(root)):
        kind, op = graft.edit.get("kind", ""), graft.edit.get("op", "")
        paths = graft.edit["paths"] if kind == "weight" else named.paths  # its reader has other names
        keys = [(path, kind, op) for path in paths]
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
    if "base" in graft.schedule:
        given, base = graft.schedule["rate"], graft.schedule["base"]
    elif site.variant is not None:  # else it was grafted for the sake of its rate, and stands at another
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

"""What a reader sees, before it is text, Markdown or HTML: a headline, notes and blocks of folded lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Facts = Mapping[str, Any]
THE_MODEL = "(the model itself)"
"""What is written for the empty path."""


@dataclass(frozen=True)
class Line:
    """One folded line of a block.

    Attributes:
        path: the folded path; "" for the model itself.
        count: how many sites it stands for.
        lead: short cells before the path (a rate, a shape).
        trail: cells after it (calls, a variant).
        source: the line of source that runs it.
        also: other names of the same modules, folded.
    """

    path: str
    count: int
    lead: tuple[str, ...] = ()
    trail: tuple[str, ...] = ()
    source: str = ""
    also: str = ""


@dataclass(frozen=True)
class Block:
    """Lines that have something in common, and that said once above them.

    Attributes:
        kind: "graft", "skip", "mend", "keys", "sites", "finding" or "check".
        title: what they are; of a graft, the rule.
        text: what is said of them: the reason, the finding.
        count: how many sites.
        before: of a graft, as it was; `after` as it is.
        remedy: what to do about it.
    """

    kind: str
    title: str
    count: int
    lines: list[Line]
    text: str = ""
    before: str = ""
    after: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Page:
    """A whole view.

    Attributes:
        view: "inspection", "plan", "report", "max_norm", "diff" or "verification".
        model: the model's class.
        headline: the figures, in one phrase.
        facts: short phrases on how they came about.
        notes: what a reader should know first.
        answer: of an inspection: does the model regularize?
        paste: a line to paste that changes it.
        blocks: in reading order.
    """

    view: str
    model: str
    headline: str
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answer: str = ""
    paste: str = ""
    blocks: list[Block] = field(default_factory=list)


def visible(text: str) -> str:
    """The text with everything that could command a terminal or turn the reading order written out.

    Names come from the model, and a model can come from anyone.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 site`, `26 sites`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def quoted(text: str) -> str:
    """The text as a Python string in double quotes, as the documentation writes rules."""
    return json.dumps(str(text), ensure_ascii=False)


def size(parameters: int) -> str:
    """A number of parameters as it is spoken: `768`, `590.6k`, `85.6M`, `1.3B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def probe_facts(view: Facts) -> tuple[list[str], list[str]]:
    """How the probe went, as a fact, or why it did not, as a note."""
    probe = view.get("probe") or {}
    if probe.get("ran"):
        how = {"fake tensors": "on fake tensors", "real forward": "by a real forward"}
        seconds = probe.get("seconds")
        took = f" in {seconds:.1f} s" if seconds and seconds >= 0.05 else ""
        return [f"probed {how.get(probe['how'], '')}".strip() + took], []
    if probe.get("reason"):
        return [], [f"not probed, so which sites run is not known: {probe['reason']}"]
    return [], []


def calls_cell(calls: int | None, *, probed: bool) -> str:
    """How often a site runs in a forward, where that is not simply once."""
    if calls is None:
        return "not probed" if probed else ""
    return {0: "never runs", 1: ""}.get(calls, f"{calls} calls")

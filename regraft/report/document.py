"""The document of a view, before it is text, Markdown or HTML: a headline, notes and sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from regraft.report.fold import fold, fold_rows, skeleton

Facts = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)
ROOT = "(the model itself)"
"""Printed for the empty path."""


@dataclass(frozen=True)
class Row:
    """One row of a table: sites that read the same and differ in the integers of their paths alone.

    Attributes:
        path: the folded path; "" for the model itself.
        count: how many sites it stands for.
        cells: one for each of the section's columns.
        source: the line of code that calls the site.
        aliases: other names of the same modules, folded.
    """

    path: str
    count: int
    cells: tuple[str, ...] = ()
    source: str = ""
    aliases: str = ""


@dataclass(frozen=True)
class Section:
    """A table, or a list of facts, under a title.

    Attributes:
        kind: "change", "skipped", "mended", "keys", "sites", "finding", "check" or "balance".
        title: what the rows have in common; of a change, the rule.
        count: how many sites.
        columns: headings of the rows' cells.
        text: the reason, the finding.
        remedy: what to do about it.
        before: of a change, the site as it was; `after` as it is.
        costs: of a change, what it costs and how strong it is.
        items: facts in a list.
    """

    kind: str
    title: str
    count: int = 1
    rows: list[Row] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    text: str = ""
    remedy: str = ""
    before: str = ""
    after: str = ""
    costs: tuple[str, ...] = ()
    items: tuple[str, ...] = ()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, the path first and the source last, without the columns that are empty."""
        heads = ["name" if self.kind == "keys" else "site", "sites", *self.columns, "source"]
        table = [[row.path, "", *row.cells, row.source] for row in self.rows]
        for row, line in zip(self.rows, table, strict=True):
            line[0] = visible(line[0]) or ROOT
            line[1] = f"x{row.count:,}" if row.count > 1 else ""
        kept = [at for at in range(len(heads)) if any(line[at] for line in table)]
        return [heads[at] for at in kept], [[visible(line[at]) for at in kept] for line in table]


@dataclass(frozen=True)
class Document:
    """A whole view.

    Attributes:
        view: the view's name: "inspection", "plan", "report", "max_norm", "advice", "diff", "verification".
        model: the model's class.
        headline: the figures, in one phrase.
        facts: short phrases on how they were obtained.
        notes: what to know first.
        answer: of an inspection: does the model regularize?
        paste: a line of code to paste.
        sections: in reading order.
    """

    view: str
    model: str
    headline: str
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answer: str = ""
    paste: str = ""
    sections: list[Section] = field(default_factory=list)


def visible(text: str) -> str:
    """The text with every character escaped that could command a terminal or reverse the reading order.

    Names come from the model, and a model can come from anyone.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 site`, `26 sites`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def quoted(text: object) -> str:
    """The text as a Python string in double quotes, as the documentation writes rules."""
    return json.dumps(str(text), ensure_ascii=False)


def rule_text(selector: object, variant: object) -> str:
    """A rule as Python writes it in a dictionary."""
    return f"{quoted(selector)}: {'None' if variant is None else quoted(variant)}"


def size(parameters: int) -> str:
    """A number of parameters in short: `768`, `590.6k`, `85.6M`, `1.3B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def percent(part: int, whole: int) -> str:
    """A share in percent, never rounded to 0 or 100: 3226 of 3227 is 99.97 %."""
    if part in (0, whole):
        return "0 %" if part == 0 else "100 %"
    share = 100 * part / whole
    digits = next((digits for digits in (1, 2, 3) if 0 < round(share, digits) < 100), 4)
    return f"{share:.{digits}f} %"


def probe_facts(view: Facts) -> tuple[list[str], list[str]]:
    """How the probe ran, as a fact, or why it did not, as a note."""
    probe = view.get("probe") or {}
    if probe.get("ran"):
        how = {"fake tensors": "on fake tensors", "real forward": "by a real forward"}
        seconds = probe.get("seconds")
        took = f" in {seconds:.1f} s" if seconds and seconds >= 0.05 else ""
        return [f"probed {how.get(probe['how'], '')}".strip() + took], []
    if probe.get("reason"):
        return [], [f"not probed, so it is unknown which sites run: {probe['reason']}"]
    return [], []


def calls_cell(calls: int | None, *, probed: bool = True) -> str:
    """How often a site runs in a forward; nothing where that is once."""
    if calls is None:
        return "not probed" if probed else ""
    return {0: "never runs", 1: ""}.get(calls, f"{calls} calls")


def kind_cell(row: Facts) -> str:
    """The kind of a site, unless it is a module."""
    kind = row.get("kind") or "module"
    return "" if kind == "module" else str(kind)


def grouped(rows: Iterable[Facts], key: Callable[[Facts], Key]) -> dict[Key, list[Facts]]:
    """The rows by their key, in the order of the first of each."""
    groups: dict[Key, list[Facts]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def folded(rows: Sequence[Facts], cells: Callable[[Facts], tuple[str, ...]] = lambda _: ()) -> list[Row]:
    """The rows of a table: those with the same cells and source are folded where their paths allow it."""

    def alike(row: Facts) -> Hashable:
        return cells(row), row.get("source"), tuple(map(skeleton, row.get("paths") or ()))

    table = []
    for group in fold_rows(rows, path=lambda row: row["path"], alike=alike):
        first = group.rows[0]
        others = [path for row in group.rows for path in row.get("paths") or () if path != row["path"]]
        aliases = ", ".join(fold(others))
        table.append(Row(group.path, len(group.rows), cells(first), first.get("source") or "", aliases))
    return table


def folded_keys(keys: Sequence[str]) -> list[Row]:
    """Names of tensors as rows of a table."""
    return [Row(group.path, len(group.rows)) for group in fold_rows(keys, path=str, alike=lambda _: None)]


def rate_texts(
    rows: Sequence[Facts],
    rates_of: Callable[[Facts], Sequence[float]],
    alike: Callable[[Facts], Hashable] = lambda _: None,
) -> dict[int, list[str]]:
    """The rates of each row as text, by the row's id: as a range where they differ at nearly every depth.

    Twelve lines that differ in the rate of DropPath alone say less than `p=0.01..0.1` does.
    """
    texts = {id(row): [f"{rate:g}" for rate in rates_of(row)] for row in rows}
    for group in grouped(rows, lambda row: (skeleton(row["path"]), len(rates_of(row)), alike(row))).values():
        if 2 < (distinct := len({tuple(texts[id(row)]) for row in group})) and 2 * distinct >= len(group):
            spans = [_span(min(column), max(column)) for column in zip(*map(rates_of, group), strict=True)]
            texts |= dict.fromkeys(map(id, group), spans)
    return texts


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:.2g}..{high:.2g}"


def skipped_sections(rows: Sequence[Facts], noun: str = "site") -> list[Section]:
    """What was skipped, by reason."""
    sections = []
    for (reason, remedy), group in grouped(
        rows, lambda row: (row.get("reason") or "", row.get("remedy") or "")
    ).items():
        ops = {row.get("op") or "" for row in group}
        noun_here = noun if len(ops) > 1 else f"{ops.pop()} {noun}".strip()
        title = f"skipped {counted(len(group), noun_here)}"
        table = folded(group, lambda row: (row.get("op") or "", kind_cell(row)))
        sections.append(Section("skipped", title, len(group), table, ("operation", "kind"), reason, remedy))
    return sections


def balance_sections(view: Facts) -> list[Section]:
    """The end of a page: what was left as it is, and whether every draw and product is accounted for."""
    rows = [
        {**row, "path": path}
        for row in view.get("left") or ()
        for path in row.get("paths") or [row.get("path", "")]
    ]
    groups = grouped(rows, lambda row: (row.get("name") or row["what"], row.get("remedy") or ""))
    sections = []
    for (what, remedy), group in groups.items():
        table = folded([{**row, "paths": ()} for row in group])
        title = f"left as it is: {counted(len(group), 'place')}"
        sections.append(Section("skipped", title, len(group), table, text=what, remedy=remedy))
    items = _balance_items(view.get("balance") or {})
    if items:
        text, items = (items[0], ()) if len(items) == 1 else ("", items)
        sections.append(Section("balance", "balance", text=text, items=items))
    return sections


_BALANCE = {
    "grafted": "grafted",
    "sites": "at sites",
    "untouched": "at sites left alone",
    "other": "of other known kinds",
    "unrecognized": "unrecognized",
}


def _balance_items(balance: Mapping[str, Any]) -> tuple[str, ...]:
    """The balance in sentences: of draws, of unconfirmed sites, and whatever else is counted."""
    facts = dict(balance)
    items = []
    if "draws" in facts:
        draws = counted(facts.pop("draws"), "draw")
        parts = [f"{number:,} {words}" for name, words in _BALANCE.items() if (number := facts.pop(name, 0))]
        items.append(f"{draws} seen" + (f": {', '.join(parts)}" if parts else ""))
    if unconfirmed := facts.pop("unconfirmed", 0):
        items.append(f"{counted(unconfirmed, 'site')} unconfirmed: no forward has shown what runs")
    if "matrices" in facts:
        matrices = facts.pop("matrices")
        left = ", ".join(f"{count:,} {kind}" for kind, count in matrices["left"].items())
        what = counted(matrices["multiply"], "matrix that multiplies", "matrices that multiply")
        items.append(f"{what}: {matrices['reached']:,} reached{f'; left: {left}' if left else ''}")
    return (*items, *(f"{name}: {value}" for name, value in facts.items()))

"""The document of a view, before it is text, Markdown or HTML: a headline, notes and sections."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from regraft.report.fold import fold, fold_rows, skeleton

Facts = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)
ROOT = "(the model itself)"
"""Printed for the empty path."""
BRACES = re.compile(r"(\{[^{}]*\})")
"""What the renderers set apart in a folded path."""
_NUMBER = re.compile(r"x?[0-9.,]+[kMB]?")


@dataclass(frozen=True)
class Row:
    """One row of a table: sites that read the same and differ in the integers of their paths alone."""

    path: str  # folded; "" for the model itself
    count: int  # sites
    cells: Mapping[str, str]  # by heading; the same headings in every row of a table
    aliases: str  # other names of the same modules, folded


@dataclass(frozen=True)
class Section:
    """A table, or a list of facts, under a title."""

    kind: str  # "change", "skipped", "mended", "keys", "sites", "finding", "check" or "balance"
    title: str  # of a change, the rule
    rows: Sequence[Row] = ()
    text: str = ""  # the reason, the finding
    remedy: str = ""
    before: str = ""  # of a change, as the next two
    after: str = ""
    costs: tuple[str, ...] = ()  # what it costs and how strong it is
    items: tuple[str, ...] = ()  # facts in a list

    @property
    def count(self) -> int:
        """How many sites the rows stand for."""
        return sum(row.count for row in self.rows)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, the path first, without the columns that are empty."""
        heads = ["name" if self.kind == "keys" else "site", "sites", *self.rows[0].cells]
        table = [
            [visible(row.path) or ROOT, f"x{row.count:,}" if row.count > 1 else "", *row.cells.values()]
            for row in self.rows
        ]
        kept = [at for at, column in enumerate(zip(*table, strict=True)) if any(column)]
        return [heads[at] for at in kept], [[visible(line[at]) for at in kept] for line in table]


@dataclass(frozen=True)
class Document:
    """A whole view."""

    headline: str  # the figures, in one phrase
    facts: Sequence[str] = ()  # short phrases on how they were obtained
    notes: Sequence[str] = ()  # what to know first
    answer: str = ""  # of an inspection: does the model regularize?
    paste: str = ""  # a line of code
    sections: Sequence[Section] = ()
    view: str = ""
    model: str = ""


def numeric_columns(table: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column, whether it holds numbers alone; the first holds paths."""
    columns = list(zip(*table, strict=True))[1:]
    return [False, *(all(_NUMBER.fullmatch(cell) for cell in column if cell) for column in columns)]


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


def rule_text(selector: object, variant: object) -> str:
    """A rule as Python writes it in a dictionary, in double quotes as the documentation does."""
    written = "None" if variant is None else json.dumps(str(variant), ensure_ascii=False)
    return f"{json.dumps(str(selector), ensure_ascii=False)}: {written}"


def size(parameters: int) -> str:
    """A number of parameters in short: `768`, `590.6k`, `85.6M`, `1.3B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def shape_cell(site: Facts) -> str:
    """The shape of a layer: `768 -> 1000` from in to out, and of a weight `64 x 3, kernel 7x7`."""
    shape = list(map(str, site.get("shape") or ()))
    if site.get("kind") != "weight":
        return " -> ".join(shape)
    if site["op"].startswith("Conv") and len(shape) > 2:
        return f"{' x '.join(shape[:2])}, kernel {'x'.join(shape[2:])}"
    return " x ".join(shape)


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


def folded(rows: Sequence[Facts], cells: Callable[[Facts], dict[str, str]] = lambda _: {}) -> list[Row]:
    """The rows of a table: those with the same cells and source are folded where their paths allow it."""

    def all_cells(row: Facts) -> dict[str, str]:
        return {**cells(row), "source": row.get("source") or ""}

    def alike(row: Facts) -> Hashable:
        return tuple(all_cells(row).values()), tuple(map(skeleton, row.get("paths") or ()))

    table = []
    for path, group in fold_rows(rows, path=lambda row: row["path"], alike=alike):
        others = [other for row in group for other in row.get("paths") or () if other != row["path"]]
        table.append(Row(path, len(group), all_cells(group[0]), ", ".join(fold(others))))
    return table

"""A document as text: plain for `print`, coloured by rich in a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from regraft.report.document import Document, Facts, Section, visible
from regraft.report.registry import document_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Span = tuple[str, str]
"""A piece of text and the name of its style."""
Spans = list[Span]

PIPED_WIDTH = 100
_NARROWEST, _WIDEST = 60, 140
_INDENT, _GAP = 4, 2
_PATH_ROOM = 28
"""Columns that a table leaves to the path before its source moves to a line of its own."""
_NUMBER = re.compile(r"x?[0-9.,]+[kMB]?")
_BRACES = re.compile(r"(\{[^{}]*\})")
STYLES = {
    "": "",
    "head": "bold",
    "dim": "dim",
    "rule": "cyan",
    "minus": "red",
    "plus": "green",
    "warn": "yellow",
    "help": "green",
    "brace": "cyan",
}


class Coloured:
    """A view for rich: at the console's width, with colours where the console has them."""

    def __init__(self, view: Facts) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for spans in lines_of(document_of(self.view), max(options.max_width, _NARROWEST)):
            styled = [(text, STYLES[style]) for text, style in spans]
            yield Text.assemble(*styled, no_wrap=True, overflow="ignore")


def stdout_width() -> int:
    """The terminal's width within what reads well; 100 columns in a pipe, a file or a notebook."""
    if not (sys.stdout and sys.stdout.isatty()):
        return PIPED_WIDTH
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def to_text(view: Facts, width: int = PIPED_WIDTH) -> str:
    """The view of a `to_dict` as plain text of at most `width` columns, where names allow it."""
    lines = lines_of(document_of(view), width)
    return "\n".join("".join(text for text, _ in spans).rstrip() for spans in lines)


def lines_of(document: Document, width: int) -> Iterator[Spans]:
    """The lines of a document, each as spans of one style."""
    yield from _wrapped([(f"{visible(document.model)}: {document.headline}", "head")], width, hang=2)
    if document.facts:
        yield from _wrapped([(", ".join(document.facts), "dim")], width)
    for note in document.notes:
        yield from _wrapped([(f"note: {visible(note)}", "warn")], width, hang=6)
    if document.answer:
        yield []
        yield from _wrapped([(visible(document.answer), "head")], width)
    if document.paste:
        yield [("  " + visible(document.paste), "help")]
    rule = ""
    for section in document.sections:
        yield []
        yield from _section(section, width, rule)
        rule = section.title if section.kind == "change" else ""


def _section(section: Section, width: int, rule_above: str) -> Iterator[Spans]:
    table = _Table(section, width)
    where = f" (in {table.file})" if table.file else ""
    if section.kind == "change":
        if section.title and section.title != rule_above:
            yield [(f"@@ {visible(section.title)} @@", "rule")]
        count = f"  x{section.count}" if section.count > 1 and len(section.rows) > 1 else ""
        yield [(f"- {visible(section.before)}", "minus"), (count + where, "dim")]
        yield from _wrapped([(f"+ {visible(section.after)}", "plus")], width, hang=4)
        for cost in section.costs:
            yield from _wrapped([("  ", ""), (visible(cost), "warn")], width, hang=4)
    else:
        style = "warn" if section.kind in ("skipped", "mended", "finding") else "head"
        text = f": {visible(section.text)}" if section.text else ""
        yield from _wrapped([(visible(section.title), style), (text, ""), (where, "dim")], width, hang=2)
    if section.remedy:
        yield from _wrapped([("  help: ", "help"), (visible(section.remedy), "")], width, hang=8)
    for item in section.items:
        yield from _wrapped([("  - ", "dim"), (visible(item), "")], width, hang=4)
    yield from table.lines(width)


class _Table:
    """The rows of a section in aligned columns.

    Where they would be too wide, the file that all rows share is named once, above them, and a source
    that still leaves no room for the path goes below it.
    """

    def __init__(self, section: Section, width: int) -> None:
        self.rows, self.file, self.below = section.rows, "", False
        if not self.rows:
            return
        self.heads, self.cells = section.table()
        sources = [row.source.rpartition(":") for row in self.rows]
        files = {visible(file) for file, _, _ in sources}
        if len(files) == 1 and all(files) and self._room(width) < max(len(cells[0]) for cells in self.cells):
            self.file, self.heads[-1] = files.pop(), "line"
            for cells, (_, _, number) in zip(self.cells, sources, strict=True):
                cells[-1] = visible(number)
        if self.heads[-1] == "source" and self._room(width) < _PATH_ROOM:
            self.below = True
            self.heads.pop()
            self.sources = [cells.pop() for cells in self.cells]
        self.room = max(self._room(width), _PATH_ROOM)

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.heads, *self.cells, strict=True)]

    def _room(self, width: int) -> int:
        """The columns left for a path."""
        return width - _INDENT - sum(_GAP + column for column in self._widths()[1:])

    def lines(self, width: int) -> Iterator[Spans]:
        if not self.rows:
            return
        pieces = [list(_broken(cells[0], self.room)) for cells in self.cells]
        widths = self._widths()
        widths[0] = max(len(piece) for lines in [[self.heads[0]], *pieces] for piece in lines)
        yield [(" " * _INDENT + _aligned(self.heads, widths, self.cells), "dim")]
        for index, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True)):
            first, *rest = pieces[index]
            beside = _aligned(["", *cells[1:]], [0, *widths[1:]], self.cells) if len(cells) > 1 else ""
            pad = " " * (widths[0] - len(first)) if beside.strip() else ""
            yield [(" " * _INDENT, ""), *_path(first), (pad + beside, "dim")]
            for piece in rest:
                yield [(" " * _INDENT, ""), *_path(piece)]
            below = [f"also {visible(row.aliases)}"] if row.aliases else []
            below += [self.sources[index]] if self.below and self.sources[index] else []
            for text in below:
                hang = _INDENT + _GAP
                yield from _wrapped([(" " * hang, ""), (text, "dim")], width, hang=hang)


def _aligned(cells: Sequence[str], widths: Sequence[int], table: Sequence[Sequence[str]]) -> str:
    """The cells of a row in one text; a column of numbers is aligned to the right."""
    texts = []
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        numbers = at > 0 and all(_NUMBER.fullmatch(row[at]) for row in table if row[at])
        texts.append(cell.rjust(width) if numbers else cell.ljust(width))
    return (" " * _GAP).join(texts)


def _broken(path: str, room: int) -> Iterator[str]:
    """The path over as many lines as it needs, broken at its dots."""
    line = ""
    # A dot inside braces belongs to a range.
    for piece in re.findall(r"(?:[^.{]|\{[^}]*\}?)+\.?|\.", path):
        if line.strip() and len(line) + len(piece) > room:
            yield line
            line = "  "
        line += piece
    yield line


def _path(path: str) -> Spans:
    return [(piece, "brace" if index % 2 else "") for index, piece in enumerate(_BRACES.split(path)) if piece]


def _wrapped(spans: Spans, width: int, hang: int = 0) -> Iterator[Spans]:
    """The spans over as many lines as they need, broken at spaces."""
    line: Spans = []
    used = 0
    for text, style in spans:
        for word in re.findall(r"\s+|\S+", text):
            if used + len(word) > width and used > hang and not word.isspace():
                yield line
                line, used = [(" " * hang, "")], hang
            line.append((word, style))
            used += len(word)
    if line:
        yield line

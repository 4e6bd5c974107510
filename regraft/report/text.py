"""A document as text: plain for `print`, coloured by rich in a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from regraft.report.document import BRACES, Document, Facts, Section, document_of, numeric_columns, visible

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

Span = tuple[str, str]
"""A piece of text and its style, as rich names it."""
Spans = list[Span]

PIPED_WIDTH = 100
_NARROWEST, _WIDEST = 60, 140
_INDENT, _GAP = 4, 2
_PATH_ROOM = 28
"""Columns that a table leaves to the path before its source moves to a line of its own."""


def rich_lines(view: Facts, options: ConsoleOptions) -> RenderResult:
    """The view for rich: at the console's width, with colours where the console has them."""
    from rich.text import Text

    for spans in lines_of(document_of(view), max(options.max_width, _NARROWEST)):
        yield Text.assemble(*spans, no_wrap=True, overflow="ignore")


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
    yield from _wrapped([(f"{visible(document.model)}: {document.headline}", "bold")], width, hang=2)
    if document.facts:
        yield from _wrapped([(", ".join(document.facts), "dim")], width)
    for note in document.notes:
        yield from _wrapped([(f"note: {visible(note)}", "yellow")], width, hang=6)
    if document.answer:
        yield []
        yield from _wrapped([(visible(document.answer), "bold")], width)
    if document.paste:
        yield [("  " + visible(document.paste), "green")]
    rule = ""
    for section in document.sections:
        yield []
        yield from _section(section, width, rule)
        rule = section.title if section.kind == "change" else ""


def _section(section: Section, width: int, rule_above: str) -> Iterator[Spans]:
    file, table = _table(section, width) if section.rows else ("", [])
    where = f" (in {file})" if file else ""
    if section.kind == "change":
        if section.title and section.title != rule_above:
            yield [(f"@@ {visible(section.title)} @@", "cyan")]
        count = f"  x{section.count}" if len(section.rows) > 1 else ""
        yield [(f"- {visible(section.before)}", "red"), (count + where, "dim")]
        yield from _wrapped([(f"+ {visible(section.after)}", "green")], width, hang=4)
        for cost in section.costs:
            yield from _wrapped([("  ", ""), (visible(cost), "yellow")], width, hang=4)
    else:
        style = "yellow" if section.kind in ("skipped", "mended", "left", "finding") else "bold"
        text = f": {visible(section.text)}" if section.text else ""
        yield from _wrapped([(visible(section.title), style), (text, ""), (where, "dim")], width, hang=2)
    if section.remedy:
        yield from _wrapped([("  help: ", "green"), (visible(section.remedy), "")], width, hang=8)
    for item in section.items:
        yield from _wrapped([("  - ", "dim"), (visible(item), "")], width, hang=4)
    yield from table


def _table(section: Section, width: int) -> tuple[str, list[Spans]]:
    """The rows of a section in aligned columns, and the file to name above them.

    Where they would be too wide, the file that all rows share is named once, above them, and a source
    that still leaves no room for the path goes below it.
    """
    heads, cells = section.table()

    def room() -> int:
        """The columns left for a path."""
        return width - _INDENT - sum(_GAP + column for column in _widths(heads, cells)[1:])

    file, below = "", [""] * len(cells)
    if heads[-1] == "source":
        files = {row[-1].rpartition(":")[0] for row in cells}
        if len(files) == 1 and all(files) and room() < max(len(row[0]) for row in cells):
            file, heads[-1] = files.pop(), "line"
            for row in cells:
                row[-1] = row[-1].rpartition(":")[2]
        elif room() < _PATH_ROOM:
            heads.pop()
            below = [row.pop() for row in cells]
    numeric = numeric_columns(cells)
    pieces = [list(_broken(row[0], max(room(), _PATH_ROOM))) for row in cells]
    widths = _widths(heads, cells)
    widths[0] = max(len(piece) for lines in [[heads[0]], *pieces] for piece in lines)

    def beside(row: Sequence[str]) -> str:
        columns = list(zip(row, widths, numeric, strict=True))[1:]
        texts = (cell.rjust(wide) if number else cell.ljust(wide) for cell, wide, number in columns)
        return "".join(" " * _GAP + text for text in texts)

    margin: tuple[str, str] = (" " * _INDENT, "")
    lines: list[Spans] = [[(margin[0] + heads[0].ljust(widths[0]) + beside(heads), "dim")]]
    for shown, row, source, (first, *rest) in zip(section.rows, cells, below, pieces, strict=True):
        lines.append([margin, *_path(first), (" " * (widths[0] - len(first)) + beside(row), "dim")])
        lines += [[margin, *_path(piece)] for piece in rest]
        for text in filter(None, [shown.aliases and f"also {visible(shown.aliases)}", source]):
            hang = _INDENT + _GAP
            lines += _wrapped([(" " * hang, ""), (text, "dim")], width, hang=hang)
    return file, lines


def _widths(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(heads, *cells, strict=True)]


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
    return [(piece, "cyan" if index % 2 else "") for index, piece in enumerate(BRACES.split(path)) if piece]


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

"""A page as text: plain for `print`, coloured by rich in a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

from regraft.report.page import THE_MODEL, Block, Facts, Line, Page, visible
from regraft.report.registry import page_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

Span = tuple[str, str]
"""A piece of text and the name of its style."""
Spans = list[Span]

PIPED_WIDTH = 100
_NARROWEST = 60
_WIDEST = 140
_INDENT = 4
_GAP = 2
_SIZE = re.compile(r"[0-9.]+[kMB]?")
_BRACES = re.compile(r"(\{[^{}]*\})")
STYLES = {
    "": "",
    "head": "bold",
    "dim": "dim",
    "rule": "cyan",
    "minus": "red",
    "plus": "green",
    "warn": "yellow",
    "answer": "bold",
    "help": "green",
    "brace": "cyan",
    "lead": "magenta",
}


class Coloured:
    """A view for rich: at the console's width, with colours where the console has them."""

    def __init__(self, view: Facts) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for spans in lines_of(page_of(self.view), max(options.max_width, _NARROWEST)):
            styled = [(text, STYLES[style]) for text, style in spans]
            yield Text.assemble(*styled, no_wrap=True, overflow="ignore")


def stdout_width() -> int:
    """The terminal's width within what reads well; 100 columns in a pipe, a file or a notebook."""
    if not (sys.stdout and sys.stdout.isatty()):
        return PIPED_WIDTH
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def to_text(view: Facts, width: int = PIPED_WIDTH) -> str:
    """The view of a `to_dict` as plain text of at most `width` columns, where names allow it."""
    return "\n".join("".join(text for text, _ in spans).rstrip() for spans in lines_of(page_of(view), width))


def lines_of(page: Page, width: int) -> Iterator[Spans]:
    """The lines of a page, each as spans of one style."""
    yield from _wrapped([(f"{visible(page.model)}: ", "head"), (page.headline, "head")], width, hang=2)
    if page.facts:
        yield from _wrapped([(", ".join(page.facts), "dim")], width)
    for note in page.notes:
        yield from _wrapped([("note: ", "warn"), (visible(note), "warn")], width, hang=6)
    if page.answer:
        yield []
        yield from _wrapped([(visible(page.answer), "answer")], width)
    if page.paste:
        yield [("  ", ""), (visible(page.paste), "help")]
    above: Block | None = None
    for block in page.blocks:
        yield from _block(block, above, width)
        above = block


def _block(block: Block, above: Block | None, width: int) -> Iterator[Spans]:
    yield []
    file = _common_file(block, width)
    if block.kind == "graft":
        if block.title and not (above and above.title == block.title):
            yield [(f"@@ {visible(block.title)} @@", "rule")]
        count = f"  x{block.count}" if block.count > 1 and len(block.lines) > 1 else ""
        where = f"  in {visible(file)}" if file else ""
        yield [("- ", "minus"), (visible(block.before), "minus"), (count + where, "dim")]
        yield from _wrapped([("+ ", "plus"), (visible(block.after), "plus")], width, hang=4)
        if block.text:
            yield from _wrapped([("  cost: ", "warn"), (visible(block.text), "")], width, hang=8)
    else:
        where = f" (in {visible(file)})" if file else ""
        style = "head" if block.kind in ("sites", "keys") else "warn"
        title: Spans = [
            (f"{visible(block.title)}", style),
            (f": {visible(block.text)}" if block.text else "", ""),
        ]
        yield from _wrapped([*title, (where, "dim")], width, hang=2)
    if block.remedy:
        yield from _wrapped([("  help: ", "help"), (visible(block.remedy), "")], width, hang=8)
    yield from _table(block, width, file)


def _table(block: Block, width: int, file: str) -> Iterator[Spans]:
    lines = block.lines
    leads = _columns([line.lead for line in lines])
    trails = [_beside(line, file) for line in lines]
    counts = [f"x{line.count}" if line.count > 1 else "" for line in lines]
    count_width = max(map(len, counts), default=0)
    room = _room(leads, counts, trails, width)
    paths = [visible(line.path) or THE_MODEL for line in lines]
    column = max((len(path) for path in paths if len(path) <= room), default=0)
    for line, path, lead, count, trail in zip(lines, paths, leads, counts, trails, strict=True):
        start: Spans = [(" " * _INDENT, ""), (lead, "lead")]
        hang = _INDENT + len(lead) + _GAP
        if len(path) <= room:
            beside = " " * (column - len(path))
            beside += " " * _GAP + count.rjust(count_width) if count_width else ""
            beside += " " * _GAP + trail if trail else ""
            yield [*start, *_path(path), (beside, "dim")]
        else:
            yield from _long(start, path, "  ".join(filter(None, [count, trail])), width)
        if line.also:
            yield from _wrapped(
                [(" " * hang + "also ", "dim"), (visible(line.also), "dim")], width, hang=hang + 5
            )


def _room(leads: Sequence[str], counts: Sequence[str], trails: Sequence[str], width: int) -> int:
    """The columns left for a path on a line with everything that stands beside it."""
    count, trail = max(map(len, counts), default=0), max(map(len, trails), default=0)
    beside = sum(_GAP + taken for taken in (count, trail) if taken)
    return width - _INDENT - (len(leads[0]) if leads else 0) - beside


def _beside(line: Line, file: str) -> str:
    cells = [visible(cell) for cell in line.trail if cell]
    if file and line.source:
        cells.append(f"line {line.source.removeprefix(file + ':')}")
    elif line.source:
        cells.append(visible(line.source))
    return "  ".join(cells)


def _common_file(block: Block, width: int) -> str:
    """The file that all lines of a block come from, if saying it once makes them fit."""
    files = {line.source.rpartition(":")[0] for line in block.lines if line.source}
    if len(files) != 1:
        return ""
    leads = _columns([line.lead for line in block.lines])
    counts = [f"x{line.count}" if line.count > 1 else "" for line in block.lines]
    room = _room(leads, counts, [_beside(line, "") for line in block.lines], width)
    return files.pop() if any(len(line.path) > room for line in block.lines) else ""


def _long(start: Spans, path: str, beside: str, width: int) -> Iterator[Spans]:
    """A path too long for its column: broken at its dots, what stands beside it below."""
    spans, used = list(start), sum(len(text) for text, _ in start)
    hang = used + _GAP
    # A dot inside braces belongs to a range.
    for piece in re.findall(r"(?:[^.{]|\{[^}]*\}?)+\.?|\.", path):
        if used + len(piece) > width and used > hang:
            yield spans
            spans, used = [(" " * hang, "")], hang
        spans += _path(piece)
        used += len(piece)
    if beside and used + _GAP + len(beside) <= width:
        yield [*spans, ("  " + beside, "dim")]
        return
    yield spans
    if beside:
        yield from _wrapped([(" " * hang, ""), (beside, "dim")], width, hang=hang)


def _path(path: str) -> Spans:
    return [(piece, "brace" if index % 2 else "") for index, piece in enumerate(_BRACES.split(path)) if piece]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Each row's cells in one text, the columns aligned; a column with nothing in it takes no room."""
    widths = [max(len(visible(cell)) for cell in column) for column in zip(*rows, strict=True)]
    texts = []
    for row in rows:
        cells = [
            visible(cell).rjust(width) if _SIZE.fullmatch(cell) else visible(cell).ljust(width)
            for cell, width in zip(row, widths, strict=True)
            if width
        ]
        texts.append("".join(cell + " " * _GAP for cell in cells))
    return texts


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

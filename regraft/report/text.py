"""A page as text: plain for `print`, coloured by rich in a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from regraft.report.page import Block, Facts, Line, Page, counted, page_of, visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Span = tuple[str, str]
"""A piece of text and the name of its style."""
Spans = list[Span]

PIPED_WIDTH = 100
_NARROWEST = 60
_WIDEST = 140
_INDENT = 4
_GAP = 2
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
    if block.kind == "graft":
        if block.title and not (above and above.title == block.title):
            yield [(f"@@ {visible(block.title)} @@", "rule")]
        count = f"  x{block.count}" if block.count > 1 and len(block.lines) > 1 else ""
        yield [("- ", "minus"), (visible(block.before), "minus"), (count, "dim")]
        yield from _wrapped([("+ ", "plus"), (visible(block.after), "plus")], width, hang=4)
    else:
        yield from _title(block, width)
    if block.remedy:
        yield from _wrapped([("  help: ", "help"), (visible(block.remedy), "")], width, hang=8)
    yield from _table(block.lines, width)


def _title(block: Block, width: int) -> Iterator[Spans]:
    words = {"skip": "skipped", "mend": "mended", "finding": "found"}.get(block.kind)
    if words is None:
        yield from _wrapped([(visible(block.title), "head")], width, hang=2)
        return
    said = f"{words} {counted(block.count, 'site')}: "
    yield from _wrapped([(said, "warn"), (visible(block.title), "")], width, hang=2)


def _table(lines: Sequence[Line], width: int) -> Iterator[Spans]:
    if not lines:
        return
    leads = _columns([line.lead for line in lines])
    trails = _columns([line.trail for line in lines])
    counts = [f"x{line.count}" if line.count > 1 else "" for line in lines]
    count_width = max(map(len, counts))
    lead_width = len(leads[0]) + (_GAP if leads[0] else 0)
    tail = (_GAP + count_width if count_width else 0) + max((_GAP + len(t) for t in trails if t), default=0)
    room = width - _INDENT - lead_width - tail
    paths = [visible(line.path) or "(the model itself)" for line in lines]
    column = max((len(path) for path in paths if len(path) <= room), default=0)
    for line, path, lead, count, trail in zip(lines, paths, leads, counts, trails, strict=True):
        start: Spans = [(" " * _INDENT, ""), (lead.ljust(lead_width), "lead")]
        hang = _INDENT + lead_width + _GAP
        beside = (count.rjust(count_width), trail.rstrip())
        if len(path) <= room:
            gap = " " * (column - len(path) + _GAP)
            yield [*start, *_path(path), (gap, ""), (beside[0], "dim"), ("  ", ""), (beside[1], "dim")]
        else:
            yield from _long(start, path, " ".join(" ".join(beside).split(" ")), hang, width)
        if line.also:
            yield from _wrapped([(" " * hang + "also ", "dim"), (visible(line.also), "dim")], width, hang=hang + 5)


def _long(start: Spans, path: str, beside: str, hang: int, width: int) -> Iterator[Spans]:
    """A path too long for its column: broken at its dots, what stands beside it below."""
    spans, used = list(start), hang - _GAP
    for piece in re.findall(r"[^.{]*(?:\{[^}]*\}?[^.{]*)*\.?", path):
        if used + len(piece) > width and used > hang:
            yield spans
            spans, used = [(" " * hang, "")], hang
        spans += _path(piece)
        used += len(piece)
    beside = re.sub(r" {2,}", "  ", beside).strip()
    if beside and used + _GAP + len(beside) <= width:
        yield [*spans, ("  ", ""), (beside, "dim")]
        return
    yield spans
    if beside:
        yield from _wrapped([(" " * hang, ""), (beside, "dim")], width, hang=hang)


def _path(path: str) -> Spans:
    return [(piece, "brace" if index % 2 else "") for index, piece in enumerate(_BRACES.split(path)) if piece]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Each row's cells in one text, the columns aligned; a column with nothing in it takes no room."""
    widths = [max(len(visible(cell)) for cell in column) for column in zip(*rows, strict=True)]
    last = max((index for index, width in enumerate(widths) if width), default=0)
    texts = []
    for row in rows:
        cells = [
            visible(cell).ljust(width if index < last else 0)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        texts.append("  ".join(cells))
    longest = max(map(len, texts), default=0)
    return [text.ljust(longest) for text in texts]


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

"""A page as Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.report.page import THE_MODEL, Block, Facts, Line, visible
from regraft.report.registry import page_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPECIAL = re.compile(r"([\\`*_\[\]{}#|~])")
_TICKS = re.compile(r"`+")


def to_markdown(view: Facts) -> str:
    """The view of a `to_dict` as Markdown; nothing that a model is named becomes markup."""
    page = page_of(view)
    parts = [f"### {_plain(page.model)}: {page.headline}"]
    if page.facts:
        parts.append(f"*{_plain(', '.join(page.facts))}*")
    parts += [f"> **Note:** {_plain(note)}" for note in page.notes]
    if page.answer:
        parts.append(f"**{_plain(page.answer)}**")
    if page.paste:
        parts.append(_fenced("python", page.paste))
    for block in page.blocks:
        parts += _block(block)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    if block.kind == "graft":
        rule = f"@@ {block.title} @@\n" if block.title else ""
        yield _fenced("diff", f"{rule}- {block.before}\n+ {block.after}")
        if block.text:
            yield f"*Cost:* {_plain(block.text)}"
    else:
        yield f"**{_plain(block.title)}**" + (f": {_plain(block.text)}" if block.text else "")
    if block.remedy:
        yield f"*Help:* {_plain(block.remedy)}"
    if block.lines:
        yield "\n".join(_table(block.lines))


def _table(lines: list[Line]) -> Iterator[str]:
    rows = [
        [
            *(_cell(cell) for cell in line.lead),
            _code(visible(line.path) or THE_MODEL) + (f" (also {_code(line.also)})" if line.also else ""),
            str(line.count),
            _plain("  ".join(filter(None, line.trail))),
            _code(line.source) if line.source else "",
        ]
        for line in lines
    ]
    leads = len(lines[0].lead)
    heads = [*([""] * leads), "site", "sites", "", "source"]
    # A column with nothing in it says nothing.
    keep = [any(row[column] for row in rows) for column in range(len(heads))]
    yield "| " + " | ".join(head for head, kept in zip(heads, keep, strict=True) if kept) + " |"
    yield "|" + "|".join("---" for kept in keep if kept) + "|"
    for row in rows:
        yield "| " + " | ".join(cell for cell, kept in zip(row, keep, strict=True) if kept) + " |"


def _cell(text: str) -> str:
    return _plain(text) if text else ""


def _plain(text: str) -> str:
    """Text that is no markup, neither Markdown nor HTML."""
    text = _SPECIAL.sub(r"\\\1", visible(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Text in a code span, whose fence is longer than any run of backticks inside."""
    text = visible(text).replace("|", "\\|")
    fence = "`" * (max(map(len, _TICKS.findall(text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(language: str, text: str) -> str:
    text = "\n".join(visible(line) for line in text.split("\n"))
    fence = "`" * max(3, max(map(len, _TICKS.findall(text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"

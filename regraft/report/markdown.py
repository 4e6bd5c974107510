"""A document as Markdown, for an issue, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regraft.report.document import Facts, Section, document_of, visible

_SPECIAL = re.compile(r"([\\`*_\[\]{}#|~])")
_TICKS = re.compile(r"`+")


def to_markdown(view: Facts) -> str:
    """The view of a `to_dict` as Markdown; no name of the model's becomes markup."""
    document = document_of(view)
    parts = [f"### {_plain(document.model)}: {document.headline}"]
    if document.facts:
        parts.append(f"*{_plain(', '.join(document.facts))}*")
    parts += [f"> **Note:** {_plain(note)}" for note in document.notes]
    if document.answer:
        parts.append(f"**{_plain(document.answer)}**")
    if document.paste:
        parts.append(_fenced("python", document.paste))
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    if section.kind == "change":
        rule = f"@@ {section.title} @@\n" if section.title else ""
        yield _fenced("diff", f"{rule}- {section.before}\n+ {section.after}")
        for cost in section.costs:
            yield f"*{_plain(cost)}*"
    else:
        yield f"**{_plain(section.title)}**" + (f": {_plain(section.text)}" if section.text else "")
    if section.remedy:
        yield f"*Help:* {_plain(section.remedy)}"
    if section.items:
        yield "\n".join(f"- {_plain(item)}" for item in section.items)
    if section.rows:
        yield "\n".join(_table(section))


def _table(section: Section) -> Iterator[str]:
    heads, table = section.table()
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row, cells in zip(section.rows, table, strict=True):
        written = [
            _code(cell) if head in ("site", "source") and cell else _plain(cell)
            for head, cell in zip(heads, cells, strict=True)
        ]
        written[0] += f" (also {_code(row.aliases)})" if row.aliases else ""
        yield f"| {' | '.join(written)} |"


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

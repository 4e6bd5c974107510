"""A document as HTML: a fragment for notebooks, and a page that needs nothing else.

Everything that comes from the view is escaped, since names and reprs come from the model; the page's
own policy then forbids any script, style or address but the ones in this folder.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from regraft.report.document import Document, Facts, Section, visible
from regraft.report.registry import document_of
from regraft.report.tree_view import tree_of

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
# JupyterLab's own rules for tables and code in an output would otherwise be the more specific ones.
_NOTEBOOK_STYLE = re.sub(r"\.regraft(?!-)", ".regraft.regraft.regraft", STYLE)
_BRACES = re.compile(r"(\{[^{}]*\})")
_NUMBER = re.compile(r"x?[0-9.,]+[kMB]?")


def to_page(view: Facts) -> str:
    """The view of a `to_dict` as one self-contained HTML page."""
    document = document_of(view)
    title = _text(f"{document.model}: {document.headline}")
    tree = tree_of(view)
    script = f"<script>{SCRIPT}</script>\n" if tree else ""
    policy = f"default-src 'none'; style-src {_hash(STYLE)}" + (
        f"; script-src {_hash(SCRIPT)}" if tree else ""
    )
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body class="regraft-page">\n{_body(document, tree)}\n{script}</body>\n</html>\n'
    )


def to_fragment(view: Facts) -> str:
    """The view as a piece of HTML with its own style, for a notebook."""
    return f"<style>{_NOTEBOOK_STYLE}</style>\n{_body(document_of(view))}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(visible(text))


def _paragraph(kind: str, text: str) -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if text else ""


def _body(document: Document, tree: str = "") -> str:
    """The document; where a tree lists the sites, no table lists them again."""
    last = [section for section in document.sections if section.kind == "balance"]
    parts = [
        f'<main class="regraft">\n<header>{_paragraph("view", f"regraft {document.view}")}'
        f"<h1>{_text(document.model)}</h1>",
        _paragraph("headline", document.headline),
        _paragraph("facts", ", ".join(document.facts)),
        "</header>",
        *(_paragraph("note", note) for note in document.notes),
    ]
    if document.answer or document.paste:
        paste = f"<pre>{_text(document.paste)}</pre>" if document.paste else ""
        parts.append(f'<div class="answer">{_paragraph("said", document.answer)}{paste}</div>')
    for section in document.sections:
        listed = bool(tree) and section.kind in ("sites", "change", "skipped")
        if section not in last and not (listed and section.kind == "sites"):
            parts.append(_section(section, rows=not listed))
    parts += [tree, *(_section(section) for section in last), "</main>"]
    return "\n".join(filter(None, parts))


def _section(section: Section, rows: bool = True) -> str:
    parts = [f'<section class="{escape(section.kind)}">']
    if section.kind == "change":
        parts += [
            f'<h2><span class="rule">{_text(section.title)}</span><span>{section.count:,}</span></h2>',
            f'<pre class="diff"><del>{_text(section.before)}</del>\n<ins>{_text(section.after)}</ins></pre>',
            *(_paragraph("cost", cost) for cost in section.costs),
        ]
    else:
        parts += [f"<h2>{_text(section.title)}</h2>", _paragraph("said", section.text)]
    parts.append(_paragraph("remedy", section.remedy))
    if section.items:
        parts.append(f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in section.items)}</ul>")
    if section.rows and rows:
        parts += ["<table>", *_table(section), "</table>"]
    return "\n".join([*filter(None, parts), "</section>"])


def _table(section: Section) -> Iterator[str]:
    heads, table = section.table()
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column if cell) for column in zip(*table, strict=True)]
    kinds = ["path", *("number" if number else "cell" for number in numeric[1:])]
    headings = (f'<th class="{kind}">{head}</th>' for kind, head in zip(kinds, heads, strict=True))
    yield f"<thead><tr>{''.join(headings)}</tr></thead>"
    for row, cells in zip(section.rows, table, strict=True):
        aliases = f'<span class="also">also {_path(row.aliases)}</span>' if row.aliases else ""
        path = f'<td class="path"><code>{_path(cells[0])}</code>{aliases}</td>'
        rest = zip(kinds[1:], cells[1:], strict=True)
        beside = (f'<td class="{kind}">{_text(cell)}</td>' for kind, cell in rest)
        yield f"<tr>{path}{''.join(beside)}</tr>"


def _path(path: str) -> str:
    """The path with its braces marked, and places where it may break."""
    pieces = [
        f"<b>{_text(piece)}</b>" if index % 2 else _text(piece).replace(".", ".<wbr>")
        for index, piece in enumerate(_BRACES.split(path))
    ]
    return "".join(pieces)

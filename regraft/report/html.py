"""A page as HTML: a fragment for notebooks, and a page that needs nothing else.

Everything that comes from the view is escaped, since names and reprs come from the model; the page's
own policy then forbids any script, style or address but the ones written here.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from typing import TYPE_CHECKING

from regraft.report.page import THE_MODEL, Block, Facts, Line, Page, visible
from regraft.report.registry import page_of
from regraft.report.style import FRAGMENT_STYLE, PAGE_STYLE
from regraft.report.tree_view import SCRIPT, explorer, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_BRACES = re.compile(r"(\{[^{}]*\})")
_SIZE = re.compile(r"[0-9.]+[kMB]?")


def to_page(view: Facts) -> str:
    """The view of a `to_dict` as one self-contained HTML page."""
    page = page_of(view)
    title = _text(f"{page.model}: {page.headline}")
    tree = explorer(rows_of(view))
    script = f"<script>{SCRIPT}</script>\n" if tree else ""
    policy = f"default-src 'none'; style-src {_hash(PAGE_STYLE)}" + (
        f"; script-src {_hash(SCRIPT)}" if tree else ""
    )
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n"
        f"<body>\n{_body(page, tree)}\n{script}</body>\n</html>\n"
    )


def to_fragment(view: Facts) -> str:
    """The view as a piece of HTML with its own style, for a notebook."""
    return f"<style>{FRAGMENT_STYLE}</style>\n{_body(page_of(view))}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(visible(text))


def _body(page: Page, tree: str = "") -> str:
    parts = [
        '<main class="regraft">',
        f'<header><p class="view">regraft {_text(page.view)}</p><h1>{_text(page.model)}</h1>',
        f'<p class="headline">{_text(page.headline)}</p>',
    ]
    if page.facts:
        parts.append(f'<p class="facts">{_text(", ".join(page.facts))}</p>')
    parts.append("</header>")
    parts += [f'<p class="note">{_text(note)}</p>' for note in page.notes]
    if page.answer:
        paste = f"<pre>{_text(page.paste)}</pre>" if page.paste else ""
        parts.append(f'<div class="answer"><p>{_text(page.answer)}</p>{paste}</div>')
    if tree:
        parts.append(tree)
    parts += [_block(block) for block in page.blocks]
    parts.append("</main>")
    return "\n".join(parts)


def _block(block: Block) -> str:
    parts = [f'<section class="{escape(block.kind)}">']
    if block.kind == "graft":
        rule = f'<span class="rule">{_text(block.title)}</span>' if block.title else ""
        parts.append(f'<h2>{rule}<span class="count">{block.count:,}</span></h2>')
        parts.append(
            f'<pre class="diff"><del>{_text(block.before)}</del>\n<ins>{_text(block.after)}</ins></pre>'
        )
        if block.text:
            parts.append(f'<p class="cost">cost: {_text(block.text)}</p>')
    else:
        said = f'<span class="said">{_text(block.text)}</span>' if block.text else ""
        parts.append(f"<h2>{_text(block.title)}</h2>{said}")
    if block.remedy:
        parts.append(f'<p class="remedy">{_text(block.remedy)}</p>')
    if block.lines:
        parts += ["<table>", *_rows(block.lines), "</table>"]
    return "\n".join([*parts, "</section>"])


def _rows(lines: list[Line]) -> Iterator[str]:
    leads = [index for index in range(len(lines[0].lead)) if any(line.lead[index] for line in lines)]
    for line in lines:
        cells = [_lead(line.lead[index]) for index in leads]
        also = f'<span class="also">also {_path(line.also)}</span>' if line.also else ""
        cells.append(f'<td class="path"><code>{_path(line.path) or THE_MODEL}</code>{also}</td>')
        cells.append(f'<td class="times">{f"&times;{line.count:,}" if line.count > 1 else ""}</td>')
        cells.append(f'<td class="trail">{_text("  ".join(filter(None, line.trail)))}</td>')
        cells.append(f'<td class="source">{_text(line.source)}</td>')
        yield f"<tr>{''.join(cells)}</tr>"


def _lead(cell: str) -> str:
    kind = "size" if _SIZE.fullmatch(cell) else "lead"
    return f'<td class="{kind}">{_text(cell).replace("-&gt;", "&rarr;")}</td>'


def _path(path: str) -> str:
    """The path with its braces marked, and places where it may break."""
    pieces = [
        f"<b>{_text(piece)}</b>" if index % 2 else _text(piece).replace(".", ".<wbr>")
        for index, piece in enumerate(_BRACES.split(path))
    ]
    return "".join(pieces)

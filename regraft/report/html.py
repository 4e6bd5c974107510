"""A document as HTML: a fragment for notebooks, and a page that needs nothing else.

Everything that comes from the view is escaped, since names and reprs come from the model; the page's
own policy then forbids any script, style or address but the ones in this folder.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from regraft.report.document import (
    BRACES,
    ROOT,
    Document,
    Facts,
    Section,
    calls_cell,
    counted,
    document_of,
    is_layer,
    kind_cell,
    numeric_columns,
    rule_text,
    shape_cell,
    size,
    visible,
)

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
# JupyterLab's own rules for tables and code in an output would otherwise be the more specific ones.
_NOTEBOOK_STYLE = re.sub(r"\.regraft(?!-)", ".regraft.regraft.regraft", STYLE)

_MOST_CHIPS = 12
_OPEN_AT_FIRST = 40
"""Rows that a fresh page opens at most."""
_TOOLS = """<input id="regraft-search" type="search" placeholder="Search names, kinds, rates   ( / )" \
aria-label="Search" autocomplete="off" spellcheck="false">
<button id="regraft-open" type="button">open all</button>
<button id="regraft-close" type="button">close all</button>
<button id="regraft-theme" type="button" aria-label="Light or dark">&#9680;</button>"""


def to_page(view: Facts) -> str:
    """The view of a `to_dict` as one self-contained HTML page."""
    document = document_of(view)
    title = _text(f"{document.model}: {document.headline}")
    tree = _tree(view)
    script = f"<script>{SCRIPT}</script>\n" if tree else ""
    policy = f"default-src 'none'; style-src {_hash(STYLE)}"
    policy += f"; script-src {_hash(SCRIPT)}" if tree else ""
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
    last = [_section(section) for section in document.sections if section.kind == "balance"]
    for section in document.sections:
        if section.kind != "balance" and not (tree and section.kind == "sites"):
            parts.append(_section(section, rows=not (tree and section.kind in ("change", "skipped"))))
    return "\n".join(filter(None, [*parts, tree, *last, "</main>"]))


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
    kinds = ["path", *("number" if number else "cell" for number in numeric_columns(table)[1:])]
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
        for index, piece in enumerate(BRACES.split(path))
    ]
    return "".join(pieces)


# The model as a tree of nested `details`: it folds without a script; `page.js` searches and filters it.


@dataclass(frozen=True)
class _Place:
    """One site in the tree; `facts` are shown when it is opened."""

    row: Facts
    status: str
    before: str = ""
    after: str = ""
    beside: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.row.get("op") or ""

    @property
    def parts(self) -> list[str]:
        return self.row["path"].split(".") if self.row["path"] else []


def _tree(view: Facts) -> str:
    """The markup of the tree of a view's sites; empty for a view without any."""
    places = list(_places(view))
    if not places:
        return ""
    paths, depth = [place.parts for place in places], 1
    while depth < max(map(len, paths)) and _count(paths, depth + 1) <= _OPEN_AT_FIRST:
        depth += 1
    rows = [_site(ROOT, place) for place in places if not place.parts]
    rows += _branch(places, 0, depth)
    tools = f'{_TOOLS}\n<span id="regraft-shown" role="status">{counted(len(places), "site")}</span>'
    return (
        f'<div class="explorer"><div class="tools" role="search">\n{tools}</div>\n'
        f'<div class="chips">{_chips("status", places)}{_chips("op", places)}</div>\n'
        f'<div class="tree" aria-label="The model">{"".join(rows)}</div></div>'
    )


def _count(paths: list[list[str]], depth: int) -> int:
    """How many names there are down to a depth."""
    return len({tuple(path[:end]) for path in paths for end in range(1, depth + 1)})


def _places(view: Facts) -> Iterator[_Place]:
    for site in view.get("sites", ()):
        rate = "" if site.get("p") is None else f"(p={site['p']:.4g})"
        parameters = site.get("parameters")
        facts = {
            "calls": calls_cell(site.get("calls")) or "1 call",
            "parameters": f"{parameters:,}" if parameters else "",
            "dtype": " on ".join(filter(None, [site.get("dtype"), site.get("device")])),
            "mode": "" if site.get("training", True) else "in eval",
        }
        before = f"{site['op']}{rate}  {shape_cell(site)}".strip()
        beside = f"{size(parameters)} parameters" if parameters else ""
        yield _Place(site, _status(site), before, site.get("variant") or "", beside, facts)
    rules = view.get("rules", ())
    for edit in view.get("grafted", ()):
        facts = {name: edit.get(name) or "" for name in ("cost", "strength")}
        if 0 <= edit.get("rule", -1) < len(rules):
            facts["rule"] = rule_text(*rules[edit["rule"]])
        status = "to graft" if view["view"] == "plan" else "grafted"
        yield _Place(edit, status, edit["before"], edit["after"], kind_cell(edit), facts)
    for skip in view.get("skipped", ()) if view["view"] in ("plan", "report") else ():
        facts = {name: skip.get(name) or "" for name in ("reason", "remedy")}
        yield _Place(skip, "skipped", skip["op"], beside=facts["reason"], facts=facts)
    for status in ("changed", "added", "removed"):
        for row in view.get(status, ()):
            yield _Place(row, status, row.get("before") or "", row.get("after") or "", kind_cell(row))


def _status(site: Facts) -> str:
    if site.get("variant"):
        return "grafted"
    if site.get("calls") == 0:
        return "never runs"
    if not is_layer(site) and site.get("p") == 0:
        return "rate 0"
    return "not probed" if site.get("calls") is None else "runs"


def _branch(places: list[_Place], at: int, depth: int) -> Iterator[str]:
    """The rows of what is below the first `at` parts of the paths, opened down to a depth."""
    groups: dict[str, list[_Place]] = {}
    for place in places:
        if len(place.parts) > at:
            groups.setdefault(place.parts[at], []).append(place)
    for group in groups.values():
        end = at + 1
        # A name with one name below it and nothing else is one with that: encoder.layer.
        while len(steps := {tuple(place.parts[end : end + 1]) for place in group}) == 1 and steps != {()}:
            end += 1
        name = ".".join(group[0].parts[at:end])
        rows = "".join(_branch(group, end, depth))
        below = f'<div class="below">{rows}</div>' if rows else ""
        opened = " open" if rows and end < depth else ""
        if here := [place for place in group if len(place.parts) == end]:
            yield from (_site(name, place) for place in here[:-1])
            yield _site(name, here[-1], below, opened)
        else:
            count = f'<span class="count">{counted(len(group), "site")}</span>'
            summary = f"<summary><code>{_text(name)}</code>{count}</summary>"
            yield f'<details class="group"{opened}>{summary}{below}</details>'


def _site(name: str, place: _Place, below: str = "", opened: str = "") -> str:
    row, old = place.row, "del" if place.after else "code"
    sides = f'<{old} class="before">{_text(place.before)}</{old}>' if place.before else ""
    sides += f"<ins>{_text(place.after)}</ins>" if place.after else ""
    known = {
        "path": row["path"] or ROOT,
        "also": ", ".join(path for path in row.get("paths") or () if path != row["path"]),
        "class": str(row.get("type") or ""),
        "source": str(row.get("source") or ""),
    }
    facts = (f"<dt>{name}</dt><dd>{_text(text)}</dd>" for name, text in (known | place.facts).items() if text)
    return (
        f'<details class="site" data-op="{_text(place.op)}" data-status="{place.status}"{opened}>'
        f'<summary><code>{_text(name)}</code><span class="sides">{sides}</span>'
        f'<span class="status">{place.status}</span>'
        f'<span class="beside">{_text(place.beside)}</span></summary>'
        f"<dl>{''.join(facts)}</dl>{below}</details>\n"
    )


def _chips(name: str, places: list[_Place]) -> str:
    """Buttons that show only the sites with one status, or one operation."""
    counts = Counter(getattr(place, name) for place in places).most_common(_MOST_CHIPS)
    buttons = (
        f'<button type="button" class="chip" data-{name}="{_text(value)}" aria-pressed="false">'
        f"{_text(value)} <b>{count:,}</b></button>"
        for value, count in counts
    )
    return f'<span class="chipset">{"".join(buttons)}</span>' if len(counts) > 1 else ""

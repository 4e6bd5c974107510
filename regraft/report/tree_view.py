"""The model as a tree of nested `details`: it folds without a script; `page.js` searches and filters it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from regraft.report.document import ROOT, Facts, calls_cell, kind_cell, rule_text, size, visible
from regraft.report.inspection_page import is_layer

_MOST_CHIPS = 12
_OPEN_AT_FIRST = 40
"""Rows that a fresh page opens at most."""


@dataclass
class Place:
    """One site in the tree; `facts` are shown when it is opened."""

    path: str
    op: str
    status: str
    before: str
    after: str
    beside: str
    facts: dict[str, str]


@dataclass
class _Node:
    name: str
    places: list[Place] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def count(self) -> int:
        return len(self.places) + sum(child.count() for child in self.children.values())


def tree_of(view: Facts) -> str:
    """The markup of the tree of a view's sites; empty for a view without any."""
    places = list(places_of(view))
    if not places:
        return ""
    root = _Node(ROOT)
    for place in places:
        node = root
        for part in place.path.split(".") if place.path else ():
            node = node.children.setdefault(part, _Node(part))
        node.places.append(place)
    _join(root)
    return "\n".join(
        [
            '<div class="explorer"><div class="tools" role="search">',
            '<input id="regraft-search" type="search" placeholder="Search names, kinds, rates   ( / )" '
            'aria-label="Search" autocomplete="off" spellcheck="false">',
            '<button id="regraft-open" type="button">open all</button>',
            '<button id="regraft-close" type="button">close all</button>',
            '<button id="regraft-theme" type="button" aria-label="Light or dark">&#9680;</button>',
            f'<span id="regraft-shown" role="status">{_sites(len(places))}</span></div>',
            f'<div class="chips">{_chips("status", places)}{_chips("op", places)}</div>',
            f'<div class="tree" aria-label="The model">{"".join(_root(root))}</div></div>',
        ]
    )


def places_of(view: Facts) -> Iterator[Place]:
    """The sites of a view, one place each."""
    for site in view.get("sites", ()):
        shape = " -> ".join(map(str, site.get("shape") or ()))
        rate = "" if site.get("p") is None else f"(p={site['p']:.4g})"
        parameters = f"{size(site['parameters'])} parameters" if site.get("parameters") else ""
        facts = {
            "calls": calls_cell(site.get("calls")) or "1 call",
            "parameters": f"{site['parameters']:,}" if site.get("parameters") else "",
            "dtype": " on ".join(filter(None, [site.get("dtype"), site.get("device")])),
            "mode": "" if site.get("training", True) else "in eval",
        }
        before = f"{site['op']}{rate}  {shape}".strip()
        yield _place(site, _status(site), before, site.get("variant") or "", parameters, facts)
    rules = view.get("rules", ())
    for edit in view.get("grafted", ()):
        facts = {name: edit.get(name) or "" for name in ("cost", "strength")}
        if 0 <= edit.get("rule", -1) < len(rules):
            facts["rule"] = rule_text(*rules[edit["rule"]])
        status = "to graft" if view["view"] == "plan" else "grafted"
        yield _place(edit, status, edit["before"], edit["after"], kind_cell(edit), facts)
    for skip in view.get("skipped", ()) if view["view"] in ("plan", "report") else ():
        facts = {name: skip.get(name) or "" for name in ("reason", "remedy")}
        yield _place(skip, "skipped", skip["op"], "", skip.get("reason") or "", facts)
    for status in ("changed", "added", "removed"):
        for row in view.get(status, ()):
            yield _place(row, status, row.get("before") or "", row.get("after") or "", kind_cell(row), {})


def _place(row: Facts, status: str, before: str, after: str, beside: str, facts: dict[str, str]) -> Place:
    known = {
        "path": row["path"] or ROOT,
        "also": ", ".join(path for path in row.get("paths") or () if path != row["path"]),
        "class": str(row.get("type") or ""),
        "source": str(row.get("source") or ""),
    }
    return Place(row["path"], row.get("op") or "", status, before, after, beside, known | facts)


def _status(site: Facts) -> str:
    if site.get("variant"):
        return "grafted"
    if site.get("calls") == 0:
        return "never runs"
    if not is_layer(site) and site.get("p") == 0:
        return "rate 0"
    return "not probed" if site.get("calls") is None else "runs"


def _join(node: _Node) -> None:
    """Names with one name below them and nothing else become one: encoder.layer."""
    for child in node.children.values():
        _join(child)
        if len(child.children) == 1 and not child.places:
            (only,) = child.children.values()
            child.name, child.places, child.children = f"{child.name}.{only.name}", only.places, only.children


def _root(root: _Node) -> Iterator[str]:
    """The rows of the tree, opened level by level while all of it stays in view."""
    level, depth, rows = list(root.children.values()), 0, len(root.children)
    while level and rows <= _OPEN_AT_FIRST:
        level = [child for node in level for child in node.children.values()]
        rows += len(level)
        depth += 1
    for place in root.places:
        yield _site(ROOT, place)
    for child in root.children.values():
        yield from _node(child, depth - 1)


def _node(node: _Node, open_levels: int) -> Iterator[str]:
    children = [text for child in node.children.values() for text in _node(child, open_levels - 1)]
    below = f'<div class="below">{"".join(children)}</div>' if children else ""
    opened = " open" if children and open_levels > 0 else ""
    if not node.places:
        yield (
            f'<details class="group"{opened}><summary><code>{_text(node.name)}</code>'
            f'<span class="count">{_sites(node.count())}</span></summary>{below}</details>'
        )
        return
    for place in node.places[:-1]:
        yield _site(node.name, place)
    yield _site(node.name, node.places[-1], below, opened)


def _site(name: str, place: Place, below: str = "", opened: str = "") -> str:
    old = "del" if place.after else "code"
    sides = f'<{old} class="before">{_text(place.before)}</{old}>' if place.before else ""
    sides += f"<ins>{_text(place.after)}</ins>" if place.after else ""
    facts = "".join(f"<dt>{name}</dt><dd>{_text(said)}</dd>" for name, said in place.facts.items() if said)
    return (
        f'<details class="site" data-op="{_text(place.op)}" data-status="{place.status}"{opened}>'
        f'<summary><code>{_text(name)}</code><span class="sides">{sides}</span>'
        f'<span class="status">{place.status}</span>'
        f'<span class="beside">{_text(place.beside)}</span></summary>'
        f"<dl>{facts}</dl>{below}</details>\n"
    )


def _chips(name: str, places: list[Place]) -> str:
    counts = Counter(getattr(place, name) for place in places)
    buttons = [
        f'<button type="button" class="chip" data-{name}="{_text(value)}" aria-pressed="false">'
        f"{_text(value)} <b>{count:,}</b></button>"
        for value, count in counts.most_common(_MOST_CHIPS)
    ]
    return f'<span class="chipset">{"".join(buttons)}</span>' if len(counts) > 1 else ""


def _sites(count: int) -> str:
    return f"{count:,} site" if count == 1 else f"{count:,} sites"


def _text(text: str) -> str:
    return escape(visible(text))

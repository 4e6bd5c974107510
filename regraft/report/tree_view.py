"""The explorer of a page: the model as a tree to fold, search and filter, and what its script is given.

The script (`page.js`) sets text alone, so nothing that a model is named can become markup; the data stands
in the page as JSON in which no tag can end.
"""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.report.page import THE_MODEL, Facts, size, visible
from regraft.report.sites import is_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = tuple[str, str, str, str, str, str, list[tuple[str, str]]]
"""Path, operation, status, before, after, what stands beside it, and further facts by name."""

SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
_MOST_CHIPS = 12


def rows_of(view: Facts) -> list[Row]:
    """The places of a view, one row each."""
    kinds = {"inspection": _inspected, "plan": _edited, "report": _edited, "diff": _differing}
    make = kinds.get(view["view"])
    return [] if make is None else [_visible(row) for row in make(view)]


def explorer(rows: list[Row]) -> str:
    """The markup of the explorer and its data; empty without rows."""
    if not rows:
        return ""
    data = {"root": THE_MODEL, "rows": rows}
    return "\n".join(
        [
            '<div id="regraft-explorer" class="explorer" hidden>',
            '<div class="tools" role="search">',
            '<input id="regraft-search" type="search" placeholder="Search names, kinds, rates   ( / )" '
            'aria-label="Search" autocomplete="off" spellcheck="false">',
            '<button id="regraft-open" type="button">open all</button>',
            '<button id="regraft-close" type="button">fold all</button>',
            '<button id="regraft-theme" type="button" aria-label="Light or dark">&#9680;</button>',
            '<span id="regraft-shown" role="status"></span>',
            "</div>",
            f'<div class="chips">{_chips(rows, 2, "status")}{_chips(rows, 1, "op")}</div>',
            '<div id="regraft-tree" class="tree" role="tree" aria-label="The model"></div>',
            "</div>",
            f'<script type="application/json" id="regraft-data">{_embedded(data)}</script>',
        ]
    )


def _chips(rows: list[Row], column: int, kind: str) -> str:
    counts = Counter(str(row[column]) for row in rows)
    if len(counts) < 2:
        return ""
    made = [
        f'<button type="button" class="chip" data-kind="{kind}" data-value="{escape(value)}" '
        f'aria-pressed="false">{escape(value)} <b>{count:,}</b></button>'
        for value, count in counts.most_common(_MOST_CHIPS)
    ]
    return f'<span class="chipset">{"".join(made)}</span>'


def _embedded(data: Any) -> str:
    """JSON that no HTML parser finds a tag in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible(row: Row) -> Row:
    path, op, status, before, after, beside, facts = row
    texts = tuple(visible(text) for text in (path, op, status, before, after, beside))
    return (*texts, [(name, visible(said)) for name, said in facts if said])  # type: ignore[return-value]


def _facts(row: Facts, **more: str) -> list[tuple[str, str]]:
    others = [path for path in row.get("paths") or [] if path != row["path"]]
    known = {
        "also": ", ".join(others),
        "class": str(row.get("type") or ""),
        "source": str(row.get("source") or ""),
    }
    return list((known | more).items())


def _calls(calls: int | None) -> str:
    return {None: "", 0: "never runs", 1: "1 call"}.get(calls, f"{calls} calls")


def _inspected(view: Facts) -> Iterator[Row]:
    for site in view.get("sites", []):
        shape = " -> ".join(map(str, site.get("shape") or ()))
        rate = "" if site.get("p") is None else f"(p={site['p']:.4g})"
        plain = f"{site['op']}{rate}" + (f"  {shape}" if shape else "")
        beside = size(site["parameters"]) if site.get("parameters") else ""
        facts = _facts(
            site,
            calls=_calls(site.get("calls")),
            parameters=f"{site['parameters']:,}" if site.get("parameters") else "",
            dtype=" on ".join(filter(None, [site.get("dtype"), site.get("device")])),
            mode="" if site.get("training", True) else "in eval",
        )
        yield site["path"], site["op"], _status(site), plain, site.get("variant") or "", beside, facts


def _status(site: Facts) -> str:
    if site.get("variant"):
        return "grafted"
    if site.get("calls") == 0:
        return "never runs"
    if not is_layer(site) and site.get("p") == 0:
        return "rate 0"
    return "not probed" if site.get("calls") is None else "runs"


def _edited(view: Facts) -> Iterator[Row]:
    word = "to graft" if view["view"] == "plan" else "grafted"
    rules = view.get("rules", [])
    for edit in view.get("grafted", []):
        rule = rules[edit["rule"]] if 0 <= edit.get("rule", -1) < len(rules) else ["", ""]
        facts = _facts(
            edit,
            calls=_calls(edit.get("calls")),
            rule=f"{rule[0]}: {rule[1]}",
            cost=edit.get("cost") or "",
        )
        yield edit["path"], edit["op"], word, edit["before"], edit["after"], _beside(edit), facts
    for skip in view.get("skipped", []):
        facts = _facts(skip, reason=skip.get("reason") or "", remedy=skip.get("remedy") or "")
        yield skip["path"], skip["op"], "skipped", skip["op"], "", skip.get("reason") or "", facts


def _beside(row: Facts) -> str:
    return "" if row.get("kind", "module") == "module" else str(row["kind"])


def _differing(view: Facts) -> Iterator[Row]:
    for word in ("changed", "added", "removed"):
        for row in view.get(word, []):
            before, after = row.get("before") or "", row.get("after") or ""
            yield row["path"], row["op"] or "", word, before, after, _beside(row), _facts(row)

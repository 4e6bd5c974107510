"""The page of a plan or a report: what is grafted as a diff, what is skipped and why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from regraft.report.fold import Fold, fold, fold_rows, skeleton
from regraft.report.page import Block, Facts, Line, Page, calls_cell, counted, probe_facts, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

_RATE = re.compile(r"\bp=([0-9][0-9.e+-]*)")
_WORDS = {"plan": "to graft", "report": "grafted"}


def changes_page(view: Facts) -> Page:
    """The page of a plan (what would change) or of a report (what has changed)."""
    grafted, skipped = view.get("grafted", []), view.get("skipped", [])
    mended, keys = view.get("mended", []), view.get("state_keys", [])
    probed = bool((view.get("probe") or {}).get("ran"))
    facts, notes = probe_facts(view)
    if view["view"] == "report" and grafted and not keys:
        facts.append("no new state-dict keys")
    parts = [f"{counted(len(grafted), 'site')} {_WORDS[view['view']]}", f"{len(skipped)} skipped"]
    if mended:
        parts.append(f"{len(mended)} mended")
    return Page(
        view=view["view"],
        model=view.get("model", ""),
        headline=", ".join(parts),
        facts=facts,
        notes=[*view.get("notes", []), *notes],
        blocks=[
            *_graft_blocks(grafted, view.get("rules", []), probed),
            *_skip_blocks(skipped),
            *_mend_blocks(mended),
            *_key_blocks(keys),
        ],
    )


def merged_rates(rows: Sequence[Facts], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns of each row, a rate that differs nearly everywhere written as its range.

    The rate of DropPath grows with the depth: twelve lines that differ in it alone say less than
    `DropPath(p=0.01..0.1)` does.
    """
    texts = [tuple(str(row.get(column) or "") for column in columns) for row in rows]
    alike: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        bare = tuple(_RATE.sub("p=#", text) for text in texts[index])
        alike.setdefault((skeleton(row["path"]), row.get("rule"), bare), []).append(index)
    for members in alike.values():
        distinct = {texts[index] for index in members}
        if len(distinct) > 2 and 2 * len(distinct) >= len(members):
            spans = tuple(_span([texts[index][c] for index in members]) for c in range(len(columns)))
            for index in members:
                texts[index] = spans
    return texts


def _span(texts: Sequence[str]) -> str:
    rates = [_RATE.findall(text) for text in texts]
    ends = iter([(min(map(float, column)), max(map(float, column))) for column in zip(*rates, strict=True)])

    def written(_: re.Match[str]) -> str:
        low, high = next(ends)
        return f"p={low:g}" if low == high else f"p={low:.2g}..{high:.2g}"

    return _RATE.sub(written, texts[0])


def also(folded: Fold[Any]) -> str:
    """The other names of the modules on a line, folded."""
    others = [path for row in folded.rows for path in row.get("paths", []) if path != row["path"]]
    return ", ".join(fold(others))


def folded_lines(
    rows: Sequence[Facts], cells: Callable[[Facts], tuple[tuple[str, ...], tuple[str, ...]]]
) -> list[Line]:
    """The rows as lines, those folded that would read the same; `cells` gives what stands beside a path."""

    def alike(row: Facts) -> Hashable:
        return (cells(row), row.get("source"), tuple(skeleton(path) for path in row.get("paths", [])))

    lines = []
    for found in fold_rows(rows, path=lambda row: row["path"], alike=alike):
        first = found.rows[0]
        lead, trail = cells(first)
        lines.append(Line(found.path, len(found.rows), lead, trail, first.get("source") or "", also(found)))
    return lines


def kind_cell(row: Facts) -> str:
    """The kind of a site, where it is no module."""
    kind = row.get("kind") or "module"
    return "" if kind == "module" else str(kind)


def _graft_blocks(grafted: Sequence[Facts], rules: Sequence[Any], probed: bool) -> list[Block]:
    def cells(row: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), (kind_cell(row), calls_cell(row.get("calls"), probed=probed))

    texts = merged_rates(grafted, ("before", "after"))
    hunks: dict[tuple[Any, str, str, str], list[Facts]] = {}
    for row, (before, after) in zip(grafted, texts, strict=True):
        hunks.setdefault((row.get("rule"), before, after, row.get("cost") or ""), []).append(row)
    return [
        Block(
            "graft",
            _rule(rules, rule),
            len(rows),
            folded_lines(rows, cells),
            text=cost,
            before=before,
            after=after,
        )
        for (rule, before, after, cost), rows in hunks.items()
    ]


def _rule(rules: Sequence[Any], index: int | None) -> str:
    if index is None or not 0 <= index < len(rules):
        return ""
    selector, variant = rules[index]
    return f"{quoted(selector)}: {'None' if variant is None else quoted(variant)}"


def _skip_blocks(skipped: Sequence[Facts]) -> list[Block]:
    reasons: dict[tuple[str, str], list[Facts]] = {}
    for row in skipped:
        reasons.setdefault((row.get("reason") or "", row.get("remedy") or ""), []).append(row)
    return [_skip_block(rows, reason, remedy) for (reason, remedy), rows in reasons.items()]


def _skip_block(rows: Sequence[Facts], reason: str, remedy: str) -> Block:
    ops = {row.get("op") or "" for row in rows}
    several = len(ops) > 1

    def cells(row: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (row.get("op") or "",) if several else (), (kind_cell(row),)

    title = f"skipped {counted(len(rows), 'site' if several else f'{ops.pop()} site'.strip())}"
    return Block("skip", title, len(rows), folded_lines(rows, cells), text=reason, remedy=remedy)


def _mend_blocks(mended: Sequence[Facts]) -> list[Block]:
    faults: dict[str, list[Facts]] = {}
    for row in mended:
        faults.setdefault(row["what"], []).append(row)
    return [
        Block("mend", f"mended {counted(len(rows), 'site')}", len(rows), bare_lines(rows), text=what)
        for what, rows in faults.items()
    ]


def bare_lines(rows: Sequence[Facts]) -> list[Line]:
    """The rows as lines with nothing beside the path but its line of source."""
    return folded_lines(rows, lambda _: ((), ()))


def _key_blocks(keys: Sequence[str]) -> list[Block]:
    if not keys:
        return []
    lines = [Line(found.path, len(found.rows)) for found in fold_rows(keys, path=str, alike=lambda _: None)]
    title = counted(len(keys), "new key", "new keys") + " in the state dict"
    return [Block("keys", title, len(keys), lines)]

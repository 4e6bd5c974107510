"""The page of a plan or a report: what is grafted as a diff, what is skipped and why."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from regraft.report.fold import Fold, fold, fold_rows, skeleton
from regraft.report.page import Block, Facts, Line, Page, calls_cell, counted, probe_facts

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
            *_skip_blocks(skipped, probed),
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
    ends = iter([(min(column, key=float), max(column, key=float)) for column in zip(*rates, strict=True)])

    def written(_: re.Match[str]) -> str:
        low, high = next(ends)
        return f"p={low}" if low == high else f"p={low}..{high}"

    return _RATE.sub(written, texts[0])


def also(folded: Fold[Any]) -> str:
    """The other names of the modules on a line, folded."""
    others = [path for row in folded.rows for path in row.get("paths", []) if path != row["path"]]
    return ", ".join(fold(others))


def _graft_blocks(grafted: Sequence[Facts], rules: Sequence[Any], probed: bool) -> list[Block]:
    texts = merged_rates(grafted, ("before", "after"))
    hunks: dict[tuple[Any, str, str], list[Facts]] = {}
    for row, (before, after) in zip(grafted, texts, strict=True):
        hunks.setdefault((row.get("rule"), before, after), []).append(row)
    blocks = []
    for (rule, before, after), rows in hunks.items():
        lines = [
            Line(found.path, len(found.rows), (), _trail(found.rows[0], probed), also(found))
            for found in fold_rows(rows, path=lambda row: row["path"], alike=_alike)
        ]
        blocks.append(Block("graft", _rule(rules, rule), len(rows), lines, before, after))
    return blocks


def _alike(row: Facts) -> Hashable:
    aliases = tuple(skeleton(path) for path in row.get("paths", []))
    return (row.get("calls"), row.get("source"), row.get("kind"), row.get("op"), aliases)


def _trail(row: Facts, probed: bool) -> tuple[str, ...]:
    kind = row.get("kind", "module")
    return ("" if kind == "module" else kind, calls_cell(row.get("calls"), probed=probed), row.get("source") or "")


def _rule(rules: Sequence[Any], index: int | None) -> str:
    if index is None or not 0 <= index < len(rules):
        return ""
    selector, variant = rules[index]
    return f"{selector!r}: {'None' if variant is None else repr(variant)}"


def _skip_blocks(skipped: Sequence[Facts], probed: bool) -> list[Block]:
    reasons: dict[tuple[str, str], list[Facts]] = {}
    for row in skipped:
        reasons.setdefault((row.get("reason") or "", row.get("remedy") or ""), []).append(row)
    blocks = []
    for (reason, remedy), rows in reasons.items():
        lines = [
            Line(found.path, len(found.rows), (found.rows[0].get("op") or "",), _skip_trail(found.rows[0]), also(found))
            for found in fold_rows(rows, path=lambda row: row["path"], alike=_alike)
        ]
        blocks.append(Block("skip", reason, len(rows), lines, remedy=remedy))
    return blocks


def _skip_trail(row: Facts) -> tuple[str, ...]:
    # Why it is skipped says whether it runs.
    return ("" if row.get("kind", "module") == "module" else row["kind"], row.get("source") or "")


def _mend_blocks(mended: Sequence[Facts]) -> list[Block]:
    faults: dict[str, list[Facts]] = {}
    for row in mended:
        faults.setdefault(row["what"], []).append(row)
    return [
        Block("mend", what, len(rows), [
            Line(found.path, len(found.rows), (), (found.rows[0].get("source") or "",))
            for found in fold_rows(rows, path=lambda row: row["path"], alike=lambda row: row.get("source"))
        ])
        for what, rows in faults.items()
    ]  # fmt: skip


def _key_blocks(keys: Sequence[str]) -> list[Block]:
    if not keys:
        return []
    lines = [Line(found.path, len(found.rows)) for found in fold_rows(keys, path=str, alike=lambda _: None)]
    return [Block("keys", "new in the state dict", len(keys), lines)]

"""The pages of a difference between two models and of a verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.changes import folded_lines, kind_cell, merged_rates
from regraft.report.fold import fold_rows
from regraft.report.page import Block, Facts, Line, Page, counted, probe_facts, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence


def diff_page(view: Facts) -> Page:
    """The page of what differs between two models."""
    changed, added, removed = view["changed"], view["added"], view["removed"]
    weights = view["weights"]
    parts = [
        f"{len(rows)} {word}" for rows, word in ((changed, "changed"), (added, "added"), (removed, "removed"))
    ]
    title = view["model"] if view["model"] == view["other"] else f"{view['model']} and {view['other']}"
    nothing = not (changed or added or removed or weights["differ"])
    return Page(
        view="diff",
        model=title,
        headline="no difference" if nothing else ", ".join(parts),
        facts=_weight_facts(weights),
        notes=list(view.get("notes", [])),
        blocks=[
            *_change_blocks(changed),
            *_one_sided(removed, "removed", "before"),
            *_one_sided(added, "added", "after"),
            *_weight_blocks(weights["differ"]),
        ],
    )


def _weight_facts(weights: Facts) -> list[str]:
    if weights["compared"] is None:
        return ["weights not compared"]
    by = "bit for bit" if weights["compared"] == "values" else "in shape"
    return [f"{counted(weights['same'], 'tensor')} the same {by}, {len(weights['differ'])} not"]


def _change_blocks(rows: Sequence[Facts]) -> list[Block]:
    hunks: dict[tuple[str, ...], list[Facts]] = {}
    for row, texts in zip(rows, merged_rates(rows, ("before", "after")), strict=True):
        hunks.setdefault(texts, []).append(row)
    return [
        Block("graft", "", len(found), _lines(found), before=before, after=after)
        for (before, after), found in hunks.items()
    ]


def _one_sided(rows: Sequence[Facts], word: str, column: str) -> list[Block]:
    alike: dict[str, list[Facts]] = {}
    for row in rows:
        alike.setdefault(str(row[column]), []).append(row)
    return [Block("sites", f"{word}: {what}", len(found), _lines(found)) for what, found in alike.items()]


def _lines(rows: Sequence[Facts]) -> list[Line]:
    return folded_lines(rows, lambda row: ((), (kind_cell(row),)))


def _weight_blocks(keys: Sequence[str]) -> list[Block]:
    if not keys:
        return []
    lines = [Line(found.path, len(found.rows)) for found in fold_rows(keys, path=str, alike=lambda _: None)]
    return [Block("keys", f"{counted(len(keys), 'tensor')} differ", len(keys), lines)]


def verification_page(view: Facts) -> Page:
    """The page of promises, each with how it went."""
    checks = view["checks"]
    failed = sum(check["passed"] is False for check in checks)
    open_ones = sum(check["passed"] is None for check in checks)
    held = len(checks) - failed - open_ones
    parts = [f"{held} of {counted(len(checks), 'promise')} hold"]
    parts += [f"{failed} FAILED"] if failed else []
    parts += [f"{open_ones} not checked"] if open_ones else []
    facts, notes = probe_facts(view)
    rules = ", ".join(
        f"{quoted(one)}: {'None' if what is None else quoted(what)}" for one, what in view["rules"]
    )
    return Page(
        view="verification",
        model=view["model"],
        headline=", ".join(parts),
        facts=[*facts, f"with {{{rules}}}"],
        notes=[*view.get("notes", []), *notes],
        blocks=[_check_block(check) for check in checks],
    )


_WORDS: dict[Any, str] = {True: "pass", False: "FAIL", None: "not checked"}


def _check_block(check: Facts) -> Block:
    kind = "check" if check["passed"] else "finding"
    return Block(kind, f"{_WORDS[check['passed']]}: {check['promise']}", 1, [], text=check["said"])

"""The page of max-norm: which rows of weights are held, and to what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.changes import folded_lines
from regraft.report.page import Block, Facts, Page, counted

if TYPE_CHECKING:
    from collections.abc import Sequence


def limits_page(view: Facts) -> Page:
    """The page of the limits of `regraft.max_norm`."""
    limited, skipped, first = view.get("limited", []), view.get("skipped", []), view.get("first")
    rows, over = sum(one["rows"] for one in limited), sum(one["over"] for one in limited)
    facts = [f"{over:,} over their bound when it was set"]
    if first is not None:
        facts.append(f"{first['over']:,} of {first['rows']:,} scaled back at the first step")
    return Page(
        view="max_norm",
        model=view.get("model", ""),
        headline=f"{counted(rows, 'row')} of {counted(len(limited), 'weight')} held after every step, "
        f"{len(skipped)} skipped",
        facts=facts,
        notes=list(view.get("notes", [])),
        blocks=[*_held_blocks(limited), *_skip_blocks(skipped)],
    )


def _held_blocks(limited: Sequence[Facts]) -> list[Block]:
    alike: dict[tuple[str, str], list[Facts]] = {}
    for one in limited:
        alike.setdefault((one["op"], _written(one["bound"])), []).append(one)
    return [
        Block("sites", f"{op}: held to {bound}", len(ones), folded_lines(ones, _cells))
        for (op, bound), ones in alike.items()
    ]


def _written(bound: object) -> str:
    return f"{str(bound).removesuffix('x')} times their norm" if isinstance(bound, str) else f"norm {bound:g}"


def _cells(one: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    over = f"{one['over']:,} over" if one["over"] else ""
    return (f"{one['rows']} rows",), (over,)


def _skip_blocks(skipped: Sequence[Facts]) -> list[Block]:
    alike: dict[tuple[str, str], list[Facts]] = {}
    for one in skipped:
        alike.setdefault((one["reason"], one["remedy"]), []).append(one)
    return [
        Block(
            "skip",
            f"skipped {counted(len(ones), 'weight')}",
            len(ones),
            folded_lines(ones, lambda one: ((one["op"],), ())),
            reason,
            remedy=remedy,
        )
        for (reason, remedy), ones in alike.items()
    ]

"""Edits and skips: the lines of a plan, one for each selected site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regraft.planning.resolve import Choice, acts_in_eval


@dataclass(frozen=True)
class Edit:
    """One site that gets a variant. The attributes are the keys of the JSON."""

    path: str
    paths: list[str]
    kind: str
    op: str
    type: str
    before: str
    after: str
    variant: str
    options: dict[str, Any]
    rule: int
    calls: int | None
    source: str | None
    methods: list[str] = field(default_factory=list)
    """Of a call site: the owner's methods that run it."""
    mends: bool = False
    """Did the call drop in eval too, and does the graft end that?"""
    cost: str | None = None
    """What the graft costs beyond the variant itself."""
    p: float | None = None
    """The site's own rate."""


@dataclass(frozen=True)
class Skip:
    """One selected site that gets none, why, and what would help."""

    path: str
    paths: list[str]
    kind: str
    op: str
    type: str
    calls: int | None
    source: str | None
    reason: str
    remedy: str
    rule: int


def edit_of(choice: Choice) -> Edit:
    """The edit that a choice of a variant means."""
    site = choice.site
    assert choice.variant is not None
    return Edit(
        path=site.path,
        paths=list(site.paths),
        kind=site.kind,
        op=site.op,
        type=site.type,
        before=site.written,
        after=choice.after,
        variant=choice.variant.name,
        options=dict(choice.variant.options),
        rule=choice.rule,
        calls=site.calls,
        source=site.source,
        methods=sorted(site.call.methods) if site.call else [],
        mends=(site.draws_in_eval or site.baked is not None) and not acts_in_eval(choice.variant),
        cost=choice.cost,
        p=site.p,
    )


def skip_of(choice: Choice) -> Skip:
    """The skip that a choice of nothing means, with its reason."""
    site = choice.site
    return Skip(
        path=site.path,
        paths=list(site.paths),
        kind=site.kind,
        op=site.op,
        type=site.type,
        calls=site.calls,
        source=site.source,
        reason=choice.reason or "",
        remedy=choice.remedy,
        rule=choice.rule,
    )

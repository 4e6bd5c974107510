"""Planning: rules x sites -> plan. Pure: it reads a model and changes nothing.

The module is not called `plan` because `regraft.plan` is the function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from regraft.errors import FileError, MisfitError, raise_all
from regraft.find.inspection import Inspection, inspect
from regraft.report.view import SCHEMA, View
from regraft.rules import Choice, Rule, read_rules, resolve

Rules = Mapping[Any, Any] | Sequence[tuple[Any, Any]]
"""Selector -> variant, in order; a mapping or a list of pairs."""


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


@dataclass(frozen=True, repr=False)
class Plan(View):
    """The edits that a set of rules means for one model, and what is skipped and why: a value.

    Attributes:
        model: the class name of the model it was made for.
        rules: pairs of a selector and a variant, as text.
        grafted: the edits.
        skipped: selected sites that get no variant, with reason and remedy.
        fingerprint: of each selected site, by path, what a model must have there for the plan to fit.
        notes: what a reader should know first.
        probe: how the sites were probed.
    """

    model: str
    rules: list[list[str | None]]
    grafted: list[Edit]
    skipped: list[Skip]
    fingerprint: dict[str, str]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values; `Plan.from_json` reads them back."""
        return {"schema": SCHEMA, "view": "plan", **asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            FileError: the text is no JSON, no plan, or of a schema that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(f"this is no JSON: {error}", remedy="give what plan.to_json() wrote") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or "fingerprint" not in values:
            found = values.get("schema") if isinstance(values, dict) else None
            raise FileError(
                "this JSON is no plan that this version can read",
                where=f"schema {found!r}, expected {SCHEMA}",
                remedy="give what plan.to_json() wrote",
            )
        known = {one.name for one in fields(cls)}
        try:
            values["grafted"] = [Edit(**edit) for edit in values["grafted"]]
            values["skipped"] = [Skip(**skip) for skip in values["skipped"]]
            return cls(**{key: value for key, value in values.items() if key in known})
        except (KeyError, TypeError) as error:
            raise FileError(f"this JSON is no whole plan: {error}") from None

    def check_fits(self, inspection: Inspection) -> None:
        """Raise MisfitError with every difference between the model and the one the plan was made for."""
        found = fingerprint(inspection)
        lines = []
        for path, expected in self.fingerprint.items():
            actual = found.get(path)
            if actual != expected:
                lines.append(f"{path or '(the model)'}: the plan has {expected}, this model {actual or 'nothing'}")
        if lines:
            raise MisfitError(
                f"the plan was made for another {self.model}; {len(lines)} sites differ:\n    "
                + "\n    ".join(lines[:20])
                + ("" if len(lines) <= 20 else f"\n    and {len(lines) - 20} more"),
                remedy="make a new one: regraft.plan(model, rules)",
            )


def fingerprint(inspection: Inspection) -> dict[str, str]:
    """Of each site, by path and operation, what a plan needs to find there again."""
    marks: dict[str, list[str]] = {}
    for site in inspection.sites:
        shape = list(site.shape) if site.shape else ""
        marks.setdefault(site.path, []).append(f"{site.type}/{site.op}{shape}")
    return {path: " + ".join(sorted(set(mark))) for path, mark in marks.items()}


def plan(model: nn.Module, rules: Rules, inputs: Any = None) -> Plan:
    """What a set of rules means for a model, as a value. Changes nothing, not even the random state.

    Args:
        model: any module. If it is grafted already, the plan is made against the original.
        rules: selector -> variant, later ones win; `None` leaves a site alone.
        inputs: for the probe, see `regraft.inspect`.

    Raises:
        RegraftError: all problems of all rules together (also a ValueError); a single one as itself.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> plan = regraft.plan(net, {"Dropout": "gaussian"})
        >>> [(edit.path, edit.before, edit.after) for edit in plan.grafted]
        [('1', 'Dropout(p=0.1)', 'GaussianDropout(p=0.1)')]
    """
    read = read_rules(rules)
    return plan_of(inspect(model, inputs), read)


def plan_of(inspection: Inspection, rules: list[Rule]) -> Plan:
    """The plan for a model that has been inspected."""
    choices, problems = resolve(inspection, rules)
    raise_all(problems)
    edits = [_edit(choice) for choice in choices if choice.reason is None]
    skips = [_skip(choice) for choice in choices if choice.reason is not None]
    marks = fingerprint(inspection)
    selected = [*(edit.path for edit in edits), *(skip.path for skip in skips)]
    return Plan(
        model=type(inspection.root).__name__,
        rules=[[rule.selector.text, None if rule.variant is None else str(rule.variant)] for rule in rules],
        grafted=edits,
        skipped=skips,
        fingerprint={path: marks[path] for path in selected if path in marks},
        notes=[*inspection.notes, *_notes(edits, skips, choices)],
        probe=inspection.probe.to_dict(),
    )


def _notes(edits: list[Edit], skips: list[Skip], choices: list[Choice]) -> list[str]:
    at_zero = [choice for choice in choices if choice.at_zero]
    if not edits and skips and len(at_zero) == len(skips):
        return [
            f"every selected site is at rate 0, so nothing was grafted: {at_zero[0].remedy}, "
            "or build the model with rates above 0"
        ]
    return []


def _edit(choice: Choice) -> Edit:
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
    )


def _skip(choice: Choice) -> Skip:
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


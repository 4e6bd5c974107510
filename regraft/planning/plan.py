"""Planning: rules x sites -> plan. Pure: it reads a model and changes nothing.

The module is not called `plan` because `regraft.plan` is the function.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from regraft.errors import FileError, MisfitError, OptionError, raise_all
from regraft.find.graph_nodes import node_marks, owner_path
from regraft.find.inspect import Inspection, inspect
from regraft.planning.edits import Edit, Skip, edit_of, skip_of
from regraft.planning.resolve import Choice
from regraft.planning.rules import Rule, read_rules, resolve
from regraft.record import original_class
from regraft.report.view import SCHEMA, View

Rules = Mapping[Any, Any] | Sequence[tuple[Any, Any]]
"""Selector -> variant, in order; a mapping or a list of pairs."""


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
        boundaries: modules inside a call site's owner that drop by themselves and are to be left alone.
    """

    model: str
    rules: list[list[str | None]]
    grafted: list[Edit]
    skipped: list[Skip]
    fingerprint: dict[str, str]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)
    boundaries: list[str] = field(default_factory=list)

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
        found = fingerprint(inspection, self.fingerprint)
        lines = []
        for path, expected in self.fingerprint.items():
            actual = found.get(path)
            if actual != expected:
                lines.append(
                    f"{path or '(the model)'}: the plan has {expected}, this model {actual or 'nothing'}"
                )
        if lines:
            raise MisfitError(
                f"the plan was made for another {self.model}; {len(lines)} sites differ:\n    "
                + "\n    ".join(lines[:20])
                + ("" if len(lines) <= 20 else f"\n    and {len(lines) - 20} more"),
                remedy="make a new one: regraft.plan(model, rules)",
            )


def fingerprint(inspection: Inspection, paths: Iterable[str]) -> dict[str, str]:
    """Of each path, what a plan needs to find there again: class, operation and shape.

    Only what can be seen without running the model, so that a plan can be checked in a moment.
    """
    ops = {site.path: site for site in inspection.sites if site.kind == "module"}
    types = {path: original_class(named.module) for named in inspection.modules for path in named.paths}
    nodes = node_marks(inspection.modules)
    marks = {}
    for path in paths:
        if path in nodes:
            marks[path] = nodes[path]
            continue
        if path not in types:
            continue
        site = ops.get(path)
        inside = f"/{site.op}{list(site.shape) if site.shape else ''}" if site else ""
        marks[path] = f"{types[path].__name__}{inside}"
    return marks


def plan(model: nn.Module, rules: Rules, inputs: Any = None, *, fused: str = "auto") -> Plan:
    """What a set of rules means for a model, as a value. Changes nothing, not even the random state.

    Args:
        model: any module. If it is grafted already, the plan is made against the original.
        rules: selector -> variant, later ones win; `None` leaves a site alone.
        inputs: for the probe, see `regraft.inspect`.
        fused: what a variant with its own noise does at fused attention: "auto" writes it out unless one
            call's scores would take more than 1 GiB, "write" always does, "keep" skips the site.

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
    return plan_of(inspect(model, inputs), read, fused)


def plan_of(inspection: Inspection, rules: list[Rule], fused: str = "auto") -> Plan:
    """The plan for a model that has been inspected."""
    if fused not in ("auto", "write", "keep"):
        raise OptionError(f"fused={fused!r}", remedy="'auto', 'write' or 'keep'")
    choices, problems = resolve(inspection, rules, fused)
    raise_all(problems)
    edits = [edit_of(choice) for choice in choices if choice.reason is None]
    skips = [skip_of(choice) for choice in choices if choice.reason is not None]
    selected = [*(edit.path for edit in edits), *(skip.path for skip in skips)]
    return Plan(
        model=type(inspection.root).__name__,
        rules=[[rule.selector.text, None if rule.variant is None else str(rule.variant)] for rule in rules],
        grafted=edits,
        skipped=skips,
        fingerprint=fingerprint(inspection, selected),
        notes=[*inspection.notes, *_notes(edits, skips, choices)],
        probe=inspection.probe.to_dict(),
        boundaries=_boundaries(inspection, edits),
    )


def _boundaries(inspection: Inspection, edits: list[Edit]) -> list[str]:
    """Modules below the owner of a call graft that drop by themselves: its mode must not reach them."""
    owners = {path for edit in edits if edit.kind == "call" for path in edit.paths[:1]}
    return sorted(
        {
            path
            for site in inspection.sites
            for path in [owner_path(site)]
            if site.family in ("Dropout", "DropPath")
            and path not in owners
            and any(not owner or path.startswith(f"{owner}.") for owner in owners)
        }
    )


def _notes(edits: list[Edit], skips: list[Skip], choices: list[Choice]) -> list[str]:
    at_zero = [choice for choice in choices if choice.at_zero]
    if not edits and skips and len(at_zero) == len(skips):
        return [
            f"every selected site is at rate 0, so nothing was grafted: {at_zero[0].remedy}, "
            "or build the model with rates above 0"
        ]
    return []

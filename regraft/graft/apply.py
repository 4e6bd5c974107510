"""`regraft.apply`: carry out a plan, in place; all of it or none of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from regraft.find.inspect import inspect, look
from regraft.graft.graph_nodes import compiled_once, set_slot
from regraft.graft.slots import Change, rival, set_graft, stands
from regraft.graft.steps import Step, steps_of
from regraft.planning.edits import Edit, Skip
from regraft.planning.plan import Plan, Rules, plan_of
from regraft.planning.rules import read_rules
from regraft.report.view import SCHEMA, View

_MENDED = (
    "{} dropped in eval too; the graft follows .training",
    "tracing had fixed {} for both modes; the graft follows .training",
)


@dataclass(frozen=True)
class Mended:
    """A fault of the model that the graft put right."""

    path: str
    what: str
    source: str | None


@dataclass(frozen=True, repr=False)
class Report(View):
    """What was done to a model: the diff.

    Attributes:
        model: the model's class name.
        rules: pairs of a selector and a variant, as text.
        grafted: sites that have their variant now.
        skipped: selected sites that have none, with reason and remedy.
        mended: faults of the model that the graft put right.
        state_keys: keys that the graft added to the state dict.
        notes: what a reader should know first.
        probe: how the sites were probed.
    """

    model: str
    rules: list[list[str | None]]
    grafted: list[Edit]
    skipped: list[Skip]
    mended: list[Mended] = field(default_factory=list)
    state_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"schema": SCHEMA, "view": "report", **asdict(self)}


def apply(model: nn.Module, rules: Rules | Plan, inputs: Any = None, *, fused: str = "auto") -> Report:
    """Graft variants into a model, in place: all of it, or, after an error, none of it.

    Weights, state-dict keys, devices, hooks and training flags stay as they are, and so does the eval
    output, unless a variant says otherwise by name. On a model that is grafted already, rules are read
    against the original and add to what is there; at one site the later graft takes the earlier's place.

    Args:
        model: any module; DDP and compiled wrappers are looked into.
        rules: selector -> variant (later rules win, None leaves alone), or a `Plan`.
        inputs: for the probe, see `regraft.inspect`.
        fused: what becomes of fused attention, see `regraft.plan`.

    Returns:
        The report: print it, or take `.to_json()`, `.to_markdown()`, `.to_html()`.

    Raises:
        RegraftError: every problem of every rule, before anything was changed.
        MisfitError: a plan that was made for another model.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "multisample"})
        >>> net[1]
        MultiSampleDropout(p=0.1, num_samples=8)
    """
    return graft_rules(model, rules, inputs, fused)[0]


@contextmanager
def grafted(
    model: nn.Module, rules: Rules | Plan, inputs: Any = None, *, fused: str = "auto"
) -> Iterator[Report]:
    """A model grafted for the length of a block; afterwards, also after an exception, as it was before.

    Args, Raises: as `regraft.apply`.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> with regraft.grafted(net, {"Dropout": "gaussian"}):
        ...     net[1]
        GaussianDropout(p=0.1)
        >>> net[1]
        Dropout(p=0.1, inplace=False)
    """
    report, changes = graft_rules(model, rules, inputs, fused)
    try:
        yield report
    finally:
        undo(changes)


def graft_rules(
    model: nn.Module, rules: Rules | Plan, inputs: Any = None, fused: str = "auto"
) -> tuple[Report, list[Change]]:
    """What `apply` does, and the changes that undo it."""
    if isinstance(rules, Plan):
        inspection = look(model)
        rules.check_fits(inspection)
        made = rules
    else:
        read = read_rules(rules)
        inspection = inspect(model, inputs)
        made = plan_of(inspection, read, fused)
    steps = steps_of(inspection, made)
    changes = _carry_out(steps)
    report = Report(
        model=made.model,
        rules=made.rules,
        grafted=made.grafted,
        skipped=made.skipped,
        mended=[
            Mended(edit.path, _MENDED[edit.kind == "node"].format(edit.before), edit.source)
            for edit in made.grafted
            if edit.mends
        ],
        state_keys=_state_keys(steps),
        notes=made.notes,
        probe=made.probe,
    )
    return report, changes


def _carry_out(steps: list[Step]) -> list[Change]:
    changes: list[Change] = []
    try:
        with compiled_once():
            for module, slot, graft in steps:
                if stands(module, slot, graft):
                    continue
                if other := rival(module, slot):
                    changes.append((module, other, set_graft(module, other, None)))
                changes.append((module, slot, set_slot(module, slot, graft)))
    except BaseException:
        undo(changes)
        raise
    return changes


def undo(changes: list[Change]) -> None:
    """Put back what was in each slot before, the last change first."""
    with compiled_once():
        for module, slot, previous in reversed(changes):
            set_slot(module, slot, previous)


def _state_keys(steps: list[Step]) -> list[str]:
    """Keys of the state dict that the grafts have brought, also those that stood already."""
    return [
        f"{graft.edit['path']}.{name}".lstrip(".")
        for _, _, graft in steps
        for name in graft.state
        if name not in graft.transient
    ]

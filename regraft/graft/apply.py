"""`regraft.apply`: carry out a plan, in place; all of it or none of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from regraft.find.insertion_points import INSERTED
from regraft.find.inspect import Inspection, inspect, look
from regraft.graft.calls import BOUNDARY, boundary_graft, call_graft
from regraft.graft.graph_nodes import all_or_nothing, compiled_once, finish, graft_at, node_graft, set_slot
from regraft.graft.insertions import insert_graft
from regraft.graft.modules import module_graft, rate_graft
from regraft.graft.slots import conflicting_slot, is_applied
from regraft.interrupts import HeldInterrupts
from regraft.ops import HIDDEN
from regraft.planning.plan import Edit, Plan, Rules, Skip, plan_of
from regraft.planning.resolve import acts_in_eval
from regraft.planning.rules import read_rules
from regraft.record import Graft, Slot, read_slot
from regraft.report.view import SCHEMA, View
from regraft.variants.spec import Variant

Step = tuple[nn.Module, Slot, Graft]
"""A module, a slot of it or of a node in its graph, and the graft that goes there."""
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)

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
        lists = {
            "grafted": [edit.to_dict() for edit in self.grafted],
            "skipped": [asdict(skip) for skip in self.skipped],
            "mended": [asdict(fault) for fault in self.mended],
        }
        return {"schema": SCHEMA, "view": "report", **copy.deepcopy({**vars(self), **lists})}


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
    return graft_rules(model, rules, inputs, fused)


@contextmanager
def grafted(
    model: nn.Module, rules: Rules | Plan, inputs: Any = None, *, fused: str = "auto"
) -> Iterator[Report]:
    """A model grafted for the length of a block; afterwards, also after an exception, as it was before.

    Blocks that overlap without one being inside the other each take out their own grafts.

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
    steps: list[Step] = []
    try:
        yield graft_rules(model, rules, inputs, fused, temporary=steps)
    finally:
        take_out(steps)


def graft_rules(
    model: nn.Module,
    rules: Rules | Plan,
    inputs: Any = None,
    fused: str = "auto",
    *,
    temporary: list[Step] | None = None,
) -> Report:
    """What `apply` does.

    `temporary` is filled with the grafts that are put in place, for `take_out`: each of them remembers
    those whose places it takes.
    """
    if isinstance(rules, Plan):
        inspection = look(model)
        plan = rules.located(inspection)
    else:
        read = read_rules(rules)
        inspection = inspect(model, inputs)
        plan = plan_of(inspection, read, fused)
    steps = _steps(inspection, plan)
    _carry_out(steps, temporary)
    return Report(
        model=plan.model,
        rules=plan.rules,
        grafted=[replace(edit, site=None) for edit in plan.grafted],
        skipped=plan.skipped,
        mended=[
            Mended(edit.path, _MENDED[edit.kind == "node"].format(edit.before), edit.source)
            for edit in plan.grafted
            if edit.fixes_eval
        ],
        state_keys=_state_keys(steps),
        notes=plan.notes,
        probe=plan.probe,
    )


def _steps(inspection: Inspection, plan: Plan) -> list[Step]:
    """The grafts of all edits, then the boundaries that keep them to their own modules."""
    by_path = {path: named.module for named in inspection.modules for path in named.paths}
    steps = []
    for edit in plan.grafted:
        assert edit.site is not None
        graft = _graft_of(edit)
        _move_state(graft, edit.path, by_path)
        steps.append((edit.site.module, replace(graft.slot, node=edit.node), graft))
    owners = {id(module) for module, slot, _ in steps if slot.kind == "calls" and not slot.node}
    steps += [
        (by_path[path], BOUNDARY, boundary_graft())
        for path in plan.boundaries
        if path in by_path and id(by_path[path]) not in owners
    ]
    return steps + _off_the_fast_path(plan, by_path)


def _graft_of(edit: Edit) -> Graft:
    if edit.kind == INSERTED:
        return insert_graft(edit)
    if edit.kind == "node":
        return node_graft(edit)
    opaque = edit.op in HIDDEN.values()
    if edit.kind == "call" or (opaque and edit.variant not in ("dropout", "off")):
        return call_graft(edit)
    return rate_graft(edit) if opaque else module_graft(edit)


def _move_state(graft: Graft, path: str, by_path: dict[str, nn.Module]) -> None:
    """Move the state a graft brings to where the model is.

    A dropout has no parameters to tell its device and precision: those of the nearest module around it do.
    """
    if not graft.state:
        return
    around = (p for prefix in reversed(_prefixes(path)) for p in by_path[prefix].parameters())
    like = next((p for p in around if p.is_floating_point()), None)
    if like is None:
        return
    for name, value in graft.state.items():
        moved = value.detach().to(like.device, like.dtype if value.is_floating_point() else None)
        graft.state[name] = nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved


def _off_the_fast_path(plan: Plan, by_path: dict[str, nn.Module]) -> list[Step]:
    """In eval torch's encoder layers skip their children in one fused call: keep them off that path."""
    acting = [edit.path for edit in plan.grafted if acts_in_eval(Variant(edit.variant, edit.options))]
    above = {
        id(by_path[prefix]): by_path[prefix]
        for path in acting
        for prefix in _prefixes(path)
        if isinstance(by_path.get(prefix), _FAST_PATHS)
    }
    return [(module, BOUNDARY, boundary_graft(disable_fast_path=True)) for module in above.values()]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _carry_out(steps: list[Step], temporary: list[Step] | None) -> None:
    with all_or_nothing() as change:
        for module, slot, graft in steps:
            if is_applied(module, graft_at(module, slot), graft):
                continue
            displaced = {slot: graft_at(module, slot)}
            if other := conflicting_slot(module, slot):
                displaced[other] = change(module, other, None)
            if temporary is not None:
                graft.covered = {str(place): old for place, old in displaced.items() if old is not None}
                temporary.append((module, slot, graft))
            change(module, slot, graft)


def take_out(steps: list[Step]) -> None:
    """Take temporary grafts out and put back what they covered; what others have since put there stays."""
    with HeldInterrupts(), compiled_once():
        finish(_take_out, reversed(steps))


def _take_out(module: nn.Module, slot: Slot, graft: Graft) -> None:
    current = graft_at(module, slot)
    if current is graft:
        set_slot(module, slot, graft.covered.get(str(slot)))
    if current is graft or current is None:
        for text, before in graft.covered.items():
            place = read_slot(text)
            if place != slot and current is graft and graft_at(module, place) is None:
                set_slot(module, place, before)
        return
    # A later temporary graft has covered this one: what it gives back is what this one covered.
    for taken in (slot, conflicting_slot(module, slot)):
        above = None if taken is None else graft_at(module, taken)
        if above is not None and above.covered.get(str(slot)) is graft:
            above.covered = {**graft.covered}


def _state_keys(steps: list[Step]) -> list[str]:
    """Keys of the state dict that the grafts have brought, also those that stood already."""
    return [
        f"{graft.edit['path']}.{name}".lstrip(".")
        for _, _, graft in steps
        for name in graft.state
        if name not in graft.transient
    ]

"""`regraft.apply`: carry out a plan, in place; all of it or none of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import MisfitError, UnprovenError
from regraft.find.insertion_points import INSERTED
from regraft.find.inspect import Inspection, inspect_flow, look
from regraft.find.probe.example_inputs import given_inputs, made_inputs
from regraft.find.walk import lock_of, one_at_a_time
from regraft.graft.calls import BOUNDARY, boundary_graft, call_graft
from regraft.graft.graph_nodes import (
    Changes,
    all_or_nothing,
    compiled_once,
    finish,
    graft_at,
    grafts_at,
    node_graft,
    set_slot,
)
from regraft.graft.insertions import insert_graft
from regraft.graft.modules import VARIANT, module_graft, rate_graft
from regraft.graft.proof import prove
from regraft.graft.slots import conflicting_slot, is_applied
from regraft.graft.weights import lend_graft
from regraft.interrupts import HeldInterrupts
from regraft.ops import HIDDEN, KEEPS_LAW
from regraft.planning.plan import Edit, Plan, Rules, Skip, plain, plan_of
from regraft.planning.resolve import acts_in_eval
from regraft.planning.rules import dataflow_for, read_rules
from regraft.record import Graft, Slot, read_slot
from regraft.report.view import SCHEMA, View
from regraft.variants.spec import Variant

Step = tuple[nn.Module, Slot, Graft]
"""A module, a slot of it or of a node in its graph, and the graft that goes there."""
SavedState = Callable[[list[str]], dict[str, Tensor]]
"""Of keys of a state dict, the tensors that a checkpoint has for them."""
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
        balance: how many draws the probe saw, and what became of them; how many sites are unconfirmed.
        left: the draws that no variant took, with module, line and remedy.
    """

    model: str
    rules: list[list[str | None]]
    grafted: list[Edit]
    skipped: list[Skip]
    mended: list[Mended] = field(default_factory=list)
    state_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    left: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"schema": SCHEMA, "view": "report", **plain(self)}


def apply(
    model: nn.Module,
    rules: Rules | Plan,
    inputs: Any = None,
    *,
    fused: str = "auto",
    verify: bool = False,
) -> Report:
    """Graft variants into a model, in place: all of it, or, after an error, none of it.

    Weights, state-dict keys, devices, hooks and training flags stay as they are, and so does the eval
    output, unless a variant says otherwise by name. On a model that is grafted already, rules are read
    against the original and add to what is there; at one site the later graft takes the earlier's place.

    Args:
        model: any module; DDP and compiled wrappers are looked into.
        rules: selector -> variant (later rules win, None leaves alone), or a `Plan`.
        inputs: for the probe, see `regraft.inspect`.
        fused: what becomes of fused attention, see `regraft.plan`.
        verify: prove the graft by real training forwards, as `regraft.verify` does: a graft whose variant
            does not run is an error, and everything is taken out again.

    Returns:
        The report: print it, or take `.to_json()`, `.to_markdown()`, `.to_html()`.

    Raises:
        RegraftError: every problem of every rule, before anything was changed.
        MisfitError: a plan that was made for another model.
        UnprovenError: with `verify`, what no training forward has shown.

    Warns:
        UserWarning: nothing was grafted, and why.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "multisample"})
        >>> net[1]
        MultiSampleDropout(p=0.1, num_samples=8)
    """
    return graft_rules(model, rules, inputs, fused, verify=verify)


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
    with HeldInterrupts() as held, ExitStack() as stack:
        steps: list[Step] = []
        for _ in range(2):  # what an exception in the first has left, the second takes out
            stack.callback(_take_out_of, model, steps)
        with held.released():
            yield graft_rules(model, rules, inputs, fused, temporary=steps)


def _take_out_of(model: nn.Module, steps: list[Step]) -> None:
    with lock_of(model):
        take_out(steps)


@one_at_a_time
def graft_rules(
    model: nn.Module,
    rules: Rules | Plan,
    inputs: Any = None,
    fused: str = "auto",
    *,
    verify: bool = False,
    temporary: list[Step] | None = None,
    saved: SavedState | None = None,
) -> Report:
    """What `apply` does; for a while, if there is a list `temporary`: it is filled for `take_out`.

    With `saved` the state of new grafts is that of a checkpoint, or is awaited from one.
    """
    if isinstance(rules, Plan):
        inspection = look(model)
        plan = rules.located(inspection)
    else:
        read = read_rules(rules)
        inspection = inspect_flow(model, inputs, dataflow_for(read))
        plan = plan_of(inspection, read, fused)
    steps = _steps(inspection, plan)
    report = Report(
        model=plan.model,
        rules=plan.rules,
        grafted=[replace(edit, site=None) for edit in plan.grafted],
        skipped=plan.skipped,
        mended=[
            Mended(edit.path, _MENDED[edit.kind == "node"].format(edit.before), edit.source)
            for edit in plan.grafted
            if edit.fixes_eval
        ],
        state_keys=_state_keys(steps, inspection),
        notes=[*plan.notes],
        probe=plan.probe,
        balance=plan.balance,
        left=plan.left,
    )
    if temporary is None and not report.grafted and any(variant is not None for _, variant in report.rules):
        why = report.notes or [f"{skip.reason}; {skip.remedy}" for skip in report.skipped[:1]]
        warnings.warn(f"nothing was grafted: {'; '.join(why) or 'no site'}", stacklevel=4)
    with all_or_nothing() as changes:
        with compiled_once():
            for module, slot, graft in steps:
                _put_in(module, slot, graft, changes, temporary)
        if saved is not None:
            _bring_state(steps, saved)
        if verify:
            with changes.held.released():
                report.notes.append(f"proven: {_prove(inspection.root, inputs)}")
        return report


def _prove(root: nn.Module, inputs: Any) -> str:
    proof = prove(root, made_inputs(root) if inputs is None else [given_inputs(root, inputs)])
    if proof.passed is True:
        return proof.said
    raise UnprovenError(
        f"the grafts are not proven, and were taken out again: {proof.said}",
        where=type(root).__name__,
        remedy="narrow the rules to what runs, or give inputs= that run it",
    )


def _steps(inspection: Inspection, plan: Plan) -> list[Step]:
    """The grafts of all edits, then the boundaries that keep them to their own modules."""
    by_path = {path: named.module for named in inspection.modules for path in named.paths}
    steps = []
    for edit in plan.grafted:
        assert edit.site is not None
        graft = _graft_of(edit)
        _move_state(graft, edit.reader if edit.kind == "weight" else edit.path, by_path)
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
    if edit.kind == "weight":
        return lend_graft(edit)
    opaque = edit.op in HIDDEN.values()
    if edit.kind == "call" or (opaque and edit.variant not in ("dropout", "off")):
        return call_graft(edit)
    if edit.variant == "dropout" and edit.op in KEEPS_LAW:
        return rate_graft(edit, VARIANT)
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
        if value is None:
            continue  # the graft is in place, and its module has it
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


def _put_in(
    module: nn.Module, slot: Slot, graft: Graft, changes: Changes, temporary: list[Step] | None
) -> None:
    current = graft_at(module, slot)
    if current is not None and is_applied(module, current, graft):
        if temporary is None:
            current.holders = 0
        elif current.holders:
            current.holders += 1
            temporary.append((module, slot, current))
        return
    displaced = {slot: current}
    if other := conflicting_slot(module, slot):
        displaced[other] = changes.set(module, other, None)
    if temporary is not None:
        graft.holders = 1
        graft.covered = {str(place): old for place, old in displaced.items() if old is not None}
        temporary.append((module, slot, graft))
    changes.set(module, slot, graft)


def take_out(steps: list[Step]) -> None:
    """Take temporary grafts out and put back what they covered; what others have since put there stays.

    The list then has those alone that an exception has left in place.
    """

    def undo(at: int) -> None:
        _take_out(*steps[at])
        del steps[at]

    with HeldInterrupts(), compiled_once():
        finish(undo, [(at,) for at in reversed(range(len(steps)))])


def _take_out(module: nn.Module, slot: Slot, graft: Graft) -> None:
    if graft.holders != 1:  # another block has the same one, or it is to stay
        graft.holders = max(graft.holders - 1, 0)
        return
    if graft_at(module, slot) is graft:
        for text, old in graft.covered.items():
            place = read_slot(text)
            if place != slot and graft_at(module, place) is None:
                set_slot(module, place, old)
        set_slot(module, slot, graft.covered.get(str(slot)))
    for above in list(_covering(grafts_at(module, slot.node).values(), graft)):
        others = {text: old for text, old in above.covered.items() if old is not graft}
        above.covered = {**others, **graft.covered}
    graft.holders = 0


def _covering(grafts: Iterable[Graft], graft: Graft) -> Iterator[Graft]:
    """Of these and of all that they cover in turn, those that cover `graft`."""
    for above in grafts:
        if any(old is graft for old in above.covered.values()):
            yield above
        yield from _covering(above.covered.values(), graft)


def _state_keys(steps: list[Step], inspection: Inspection) -> list[str]:
    """Keys of the state dict that the grafts have brought, by every name of a shared module."""
    paths = {path: named.paths for named in inspection.modules for path in named.paths}
    keys = []
    for _, _, graft in steps:
        first = _keeper(graft)
        for name in _keys(graft):
            keys += [f"{path}.{name}".lstrip(".") for path in paths.get(first, [first])]
    return keys


def _keys(graft: Graft) -> dict[str, str]:
    """Of each name of a graft's state, its key in the state dict of the model."""
    path = _keeper(graft)
    return {name: f"{path}.{name}".lstrip(".") for name in graft.state if name not in graft.transient}


def _keeper(graft: Graft) -> str:
    """The path of the module that keeps a graft's state; of a lent weight's, that is the reader."""
    path: str = graft.edit.get("reader" if graft.edit.get("kind") == "weight" else "path", "")
    return path


@torch.no_grad()
def _bring_state(steps: list[Step], saved: SavedState) -> None:
    """Load the state of the grafts that are new; what a checkpoint has not is awaited."""
    new = [(module, graft) for module, slot, graft in steps if graft_at(module, slot) is graft]
    tensors = saved([key for _, graft in new for key in _keys(graft).values()])
    for module, graft in new:
        keys = _keys(graft)
        for name, key in keys.items():
            state, value = getattr(module, name), tensors.get(key)
            if value is not None and value.shape != state.shape:
                raise MisfitError(
                    f"{key} is of shape {list(value.shape)} in the checkpoint, and {list(state.shape)} here",
                    where=graft.edit["path"],
                )
            if value is not None:
                state.copy_(value)
        graft.awaited = tuple(name for name, key in keys.items() if key not in tensors)

"""`regraft.verify`: regraft's promises, checked on a model of the user's own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from regraft.errors import RegraftError
from regraft.find.inspect import Inspection
from regraft.find.inspect import inspect as inspect_model
from regraft.find.probe.example_inputs import Inputs, given_inputs, made_inputs
from regraft.find.probe.preserve_state import random_state_kept
from regraft.find.walk import one_at_a_time
from regraft.graft.apply import Report, apply
from regraft.graft.proof import prove
from regraft.graft.revert import revert
from regraft.graft.snapshot import model_snapshot
from regraft.planning.plan import Rules
from regraft.planning.resolve import acts_in_eval
from regraft.record import grafts_of
from regraft.report.document import counted
from regraft.report.view import SCHEMA, View
from regraft.variants.spec import Variant


@dataclass(frozen=True)
class Check:
    """One promise, and how it went; `passed` is None where it could not be checked."""

    promise: str
    passed: bool | None
    said: str


_NEEDED = ("nothing silent", "each graft runs")
"""Promises of which "not checked" is no pass."""


@dataclass(frozen=True, repr=False)
class Verification(View):
    """Each promise, checked.

    Attributes:
        model: the model's class.
        rules: what was grafted for it.
        checks: the promises, each passed, failed or not checked, and what was seen.
        notes: what a reader should know first.
        probe: how the sites were probed.
    """

    model: str
    rules: list[list[str | None]]
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether every check passed; None where none failed, and what the grafts do could not be seen."""
        if any(check.passed is False for check in self.checks):
            return False
        shown = [check.passed for check in self.checks if check.promise in _NEEDED]
        return None if None in shown else True

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain JSON values."""
        return {"schema": SCHEMA, "view": "verification", "passed": self.passed, **asdict(self)}


@one_at_a_time
def verify(model: nn.Module, inputs: Any = None, rules: Rules | None = None) -> Verification:
    """Graft a copy of a model and check each promise on it; the model itself is left alone.

    Real training forwards show that each graft's variant runs and that no stock draw is left which the
    report does not name. A model that is grafted already is checked as it stands, unless there are rules.

    Args:
        model: any module that can be copied.
        inputs: for the probe and for comparing outputs, see `regraft.inspect`.
        rules: what to graft; without them, a variant at every dropout, drop-path and linear site.

    Returns:
        The checks. `passed` is None where no forward could show what the grafts do.

    Raises:
        ModelError: not a module (also a TypeError).
        RegraftError: the rules that were given do not fit the model.

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> made = regraft.verify(net, inputs=torch.randn(2, 4))
        >>> made.passed
        True
    """
    seen = inspect_model(model, inputs)
    trial, plain = copy.deepcopy(seen.root), copy.deepcopy(seen.root)
    grafted = any(grafts_of(module) for module in trial.modules())
    if grafted:
        revert(plain)
    if grafted and rules is None:
        return _Trial(plain, inputs, seen, []).run_standing(trial)
    return _Trial(plain, inputs, seen, rules or _fitting(seen)).run()


def _fitting(seen: Inspection) -> list[tuple[str, str]]:
    """Rules that graft something at every kind of site the model has."""
    families = {site.family for site in seen.sites}
    ops = {site.op for site in seen.sites}
    rules = []
    if "Dropout" in families:
        plain = ops & {"Dropout", "dropout", "scaled_dot_product_attention"}
        rules.append(("Dropout", "gaussian(p=0.1)") if plain else ("*", "dropout(p=0.1)"))
    if "DropPath" in families:
        rules.append(("DropPath", "droppath(p=0.1)"))
    if "Linear" in ops:
        rules.append(("Linear", "dropconnect(p=0.1)"))
    return rules or [("*", "dropout(p=0.1)")]


class _Trial:
    """A copy of the model, and what it was like before the graft."""

    def __init__(self, model: nn.Module, inputs: Any, seen: Inspection, rules: Rules) -> None:
        self.model, self.inputs, self.seen, self.rules = model, inputs, seen, rules
        self.before = model_snapshot(model)
        self.output, self.why_not = self._outputs(model)
        self.report: Report | None = None

    def run(self) -> Verification:
        checks = [self._check("all or nothing", self._all_or_nothing)]
        self.report = apply(self.model, self.rules, self.inputs)
        checks += [
            self._check(promise, check)
            for promise, check in (
                ("nothing silent", self._nothing_silent),
                ("each graft runs", self._each_graft_runs),
                ("same weights", self._same_weights),
                ("same model otherwise", self._same_model),
                ("same eval", self._same_eval),
                ("travels: deep copy and pickle", self._travels),
                ("a way back", self._way_back),
            )
        ]
        return Verification(
            model=type(self.seen.root).__name__,
            rules=self.report.rules,
            checks=checks,
            notes=[*self.seen.notes, *self.report.notes],
            probe=self.seen.probe.to_dict(),
        )

    def run_standing(self, grafted: nn.Module) -> Verification:
        """The checks of a copy that is grafted already; the trial's own model is the plain one."""
        plain, self.model = self.model, grafted
        checks = [
            self._check("each graft runs", self._each_graft_runs),
            self._check("same eval", self._same_eval),
            self._check("travels: deep copy and pickle", self._travels),
        ]
        revert(self.model)
        same = model_snapshot(self.model).owners == model_snapshot(plain).owners
        checks.append(Check("a way back", same, "after a revert no graft is left"))
        return Verification(
            model=type(plain).__name__,
            rules=[],
            checks=checks,
            notes=[*self.seen.notes, "the grafts that stand on the model were checked"],
            probe=self.seen.probe.to_dict(),
        )

    def _each_graft_runs(self) -> tuple[bool | None, str]:
        proof = prove(self.model, self._candidates())
        if self.report is None or proof.passed is not True:
            return proof.passed, proof.said
        rows = [*(skip.paths for skip in self.report.skipped), *(row["paths"] for row in self.report.left)]
        named = {path for paths in rows for path in paths}
        silent = sorted({path for path, _ in proof.draws if path not in named})
        if silent:
            return False, f"draws that the report does not name: {', '.join(silent[:3])}"
        return True, proof.said

    def _candidates(self) -> Iterable[Inputs]:
        return made_inputs(self.model) if self.inputs is None else [given_inputs(self.model, self.inputs)]

    def _check(self, promise: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
        try:
            passed, said = check()
        except Exception as error:
            passed, said = False, f"{type(error).__name__}: {error}".split("\n")[0][:200]
        return Check(promise, passed, said)

    def _all_or_nothing(self) -> tuple[bool, str]:
        try:
            apply(self.model, [*_pairs(self.rules), ("NoSuchKind@nowhere", "dropout")], self.inputs)
        except RegraftError:
            same = model_snapshot(self.model).same_as(self.before)
            return same, "a rule that matches nothing was refused, and nothing had changed"
        return False, "a rule that matches nothing was accepted"

    def _nothing_silent(self) -> tuple[bool | None, str]:
        assert self.report is not None
        grafted, skipped = self.report.grafted, self.report.skipped
        bare = [skip.path for skip in skipped if not skip.reason]
        never = [edit.path for edit in grafted if edit.calls == 0]
        said = f"{counted(len(grafted), 'site')} grafted, {len(skipped)} skipped, each with its reason"
        if not self.seen.probe.ran:
            return (None if not bare else False), f"{said}; not probed: {self.seen.probe.reason}"
        return not bare and not never, said if not never else f"{len(never)} grafted sites never run"

    def _same_weights(self) -> tuple[bool, str]:
        assert self.report is not None
        now = dict(self.model.named_parameters(remove_duplicate=False))
        kept = all(now.get(name) is one for name, one in self.before.parameters.items())
        extra = set(self.model.state_dict()) - set(self.before.keys)
        lost = set(self.before.keys) - set(self.model.state_dict())
        told = extra <= set(self.report.state_keys)
        said = f"{len(self.before.parameters)} parameters are the same objects, {len(self.before.keys)} keys"
        return kept and not lost and told, said + (f" and {len(extra)} new ones" if extra else "")

    def _same_model(self) -> tuple[bool, str]:
        now = model_snapshot(self.model)
        same = now.owners == self.before.owners and now.signature == self.before.signature
        flags = now.training == self.before.training and now.hooks == self.before.hooks
        return same and flags, "class names, the signature, training flags and hooks are as they were"

    def _same_eval(self) -> tuple[bool | None, str]:
        if self.output is None:
            return None, f"not compared: {self.why_not}"
        now, why = self._outputs(self.model)
        if now is None:
            return False, f"the grafted model does not run: {why}"
        grafts = [graft for module in self.model.modules() for graft in grafts_of(module).values()]
        if any(graft.fixes_eval or graft.in_eval for graft in grafts) or self._changes_eval():
            return None, "not compared: the rules, or a fault that was mended, change the eval output"
        same = len(now) == len(self.output) and all(map(_equal, now, self.output))
        return same, f"{counted(len(now), 'output')} bit for bit the same"

    def _changes_eval(self) -> bool:
        edits = [] if self.report is None else self.report.grafted
        return any(acts_in_eval(Variant(edit.variant, edit.options)) for edit in edits)

    def _travels(self) -> tuple[bool, str]:
        copied = copy.deepcopy(self.model)
        room = io.BytesIO()
        torch.save(self.model, room)
        room.seek(0)
        loaded = torch.load(room, weights_only=False)
        wanted = [str(type(module).__name__) for module in self.model.modules()]
        same = all([type(m).__name__ for m in other.modules()] == wanted for other in (copied, loaded))
        revert(copied)
        alone = [type(module).__name__ for module in self.model.modules()] == wanted
        return (
            same and alone,
            "both carry the grafts; the copy reverts by itself",
        )

    def _way_back(self) -> tuple[bool, str]:
        revert(self.model)
        revert(self.model)
        now = model_snapshot(self.model)
        same = now.same_as(self.before)
        if self.output is not None:
            output, _ = self._outputs(self.model)
            same = same and output is not None and all(map(_equal, output, self.output))
        return same, "classes, attributes, hooks and keys are as they were; a second revert does nothing"

    def _outputs(self, model: nn.Module) -> tuple[list[Any] | None, str]:
        """What the model returns in eval, as a flat list; None and why, where it cannot run."""
        if any(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
            return None, "the model has no weights to run with"
        why = "give inputs="
        for made in self._candidates():
            returned, why = _run(model, made)
            if not why:
                return returned, ""
        return None, why


def _run(model: nn.Module, made: Inputs) -> tuple[list[Any] | None, str]:
    """The outputs of a forward in eval, or why there are none; training flags and random state are kept."""
    was = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), random_state_kept():
            model.eval()
            returned = model(*made.args, **made.kwargs)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".split("\n")[0][:160]
    finally:
        for module, training in was:
            module.training = training
    return tree_flatten(returned)[0], ""


def _pairs(rules: Rules) -> list[tuple[Any, Any]]:
    return list(rules.items()) if hasattr(rules, "items") else list(rules)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return isinstance(one, Tensor) == isinstance(other, Tensor)

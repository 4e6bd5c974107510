"""`regraft.schedule`: rates that change in the course of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from regraft.errors import MisfitError, NoMatchError, OptionError, RateError, WrongKindError, nearest
from regraft.find.inspect import Inspection, inspect
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import lock_of, named_modules, one_at_a_time
from regraft.graft.apply import Step, graft_rules, take_out
from regraft.graft.graph_nodes import placed_grafts
from regraft.graft.rates import Key, Rate, all_or_no_rates, claim, key_of, rates_of
from regraft.planning.plan import plan_of
from regraft.planning.rules import read_rules
from regraft.variants.checks import check_choice, check_count
from regraft.variants.module import check_rate
from regraft.variants.registry import variant

_NOISE = {"Dropout": "dropout", "DropPath": "droppath"}
"""For each family of ungrafted sites, the variant that sets the rate and nothing else."""
_NO_RATE = "nothing there has a rate"


Level = float | str
"""A rate in [0, 1), or one relative to the site's own, `"x0.5"`."""


SHAPES: dict[str, Callable[[float, int], float]] = {
    "linear": lambda t, _: t,
    "cosine": lambda t, _: (1 - math.cos(math.pi * t)) / 2,
    "step": lambda t, stairs: math.floor(t * stairs) / stairs,
    "early": lambda t, _: float(t >= 1),
    "late": lambda t, _: float(t >= 1),
    # The paper's gamma of 10 / T; the e^-10 that is left at T counts as none.
    "curriculum": lambda t, _: 1 - math.exp(-10 * t) if t < 1 else 1.0,
}
"""Each maps the fraction of the steps done to the fraction of the way from start to end."""


@dataclass(frozen=True)
class Curve:
    """A rate over time.

    Attributes:
        start: the first rate; required by `"early"`, otherwise 0 by default.
        end: the rate from `steps` on; 0 by default for `"early"`.
        steps: the number of steps from start to end.
        shape: one of `SHAPES`.
        stairs: the number of equal jumps of `"step"`, the last of them at `steps`.
    """

    start: Level
    end: Level
    steps: int
    shape: str = "linear"
    stairs: int = 1

    def ends(self, base: float) -> tuple[float, float]:
        """The first and the last rate, of a site whose own rate is `base`."""
        start, end = (float(x[1:]) * base if isinstance(x, str) else x for x in (self.start, self.end))
        return start, end

    def rate(self, step: int, base: float) -> float:
        """The rate after `step` steps of a site whose own rate is `base`."""
        start, end = self.ends(base)
        part = SHAPES[self.shape](min(step / self.steps, 1.0), self.stairs)
        return start if part == 0 else end if part == 1 else start + (end - start) * part


def read_curve(given: Any) -> Curve:
    """Read the argument `p` of `regraft.schedule`."""
    if not isinstance(given, Mapping):
        raise OptionError(
            f"p={given!r} is no schedule", remedy='for example p={"start": 0.0, "end": 0.1, "steps": 1000}'
        )
    known = list(Curve.__dataclass_fields__)
    for key in given:
        if key not in known:
            hint = f"{nearest(str(key), known)} it has {', '.join(known)}".strip()
            raise OptionError(f"a schedule has no {key!r}", remedy=hint)
    shape = given.get("shape", "linear")
    check_choice("shape", shape, tuple(SHAPES))
    needed = ["start", "steps"] if shape == "early" else ["end", "steps"]
    missing = [key for key in needed if key not in given]
    if missing:
        raise OptionError(f"a schedule of shape {shape!r} needs {' and '.join(map(repr, missing))}")
    stairs = given.get("stairs", 5 if shape == "step" else 1)
    check_count("steps", given["steps"])
    check_count("stairs", stairs)
    # Early dropout is on and then off; all others start at 0.
    start, end = _level("start", given.get("start", 0.0)), _level("end", given.get("end", 0.0))
    return Curve(start, end, given["steps"], shape, stairs)


def _level(name: str, value: Any) -> Level:
    if isinstance(value, str):
        try:
            factor = float(value.removeprefix("x"))
        except ValueError:
            factor = -1.0
        if not value.startswith("x") or not 0 <= factor < float("inf"):
            raise OptionError(
                f"{name}={value!r} is no rate", remedy="a number in [0, 1), or relative: 'x0.5'"
            )
        return value
    try:
        return check_rate(value)
    except RateError as error:
        error.where = error.where or f"{name} of the schedule"
        raise


class Schedule:
    """What `regraft.schedule` returns: it counts the steps and sets the rates.

    Attributes:
        curve: how the rates go; `extend` changes its `steps`.
        steps_done: how many steps have been counted.
        rates: the sites it sets, each with its `path`, `variant` and `base`, the rate outside any schedule.
        skipped: paths of selected sites that it cannot set, and why.
        notes: what to know first.
    """

    def __init__(
        self,
        root: nn.Module,
        curve: Curve,
        rates: list[Rate],
        skipped: dict[str, str],
        grafts: list[Step],
    ) -> None:
        self._root = root
        self.curve = curve
        self.rates = rates
        self.skipped = skipped
        self.notes: list[str] = []
        fused = sum(rate.fused for rate in rates)
        if fused and curve.shape not in ("step", "early", "late"):
            self.notes.append(
                f"{fused} of {len(rates)} rates are of torch's own kernels: under torch.compile each new "
                "value compiles anew; 'shape': 'step' has few values"
            )
        self.steps_done = 0
        self._grafts = grafts
        self._write()

    @property
    def rate(self) -> float:
        """The rate now; of rates relative to each site's own, the largest."""
        return max(self.curve.rate(self.steps_done, rate.base) for rate in self.rates)

    def step(self, to: int | None = None) -> float:
        """Count a step, after the optimizer's, or go to step `to`; returns the rate from here on.

        Raises:
            MisfitError: a site lost the graft whose rate the schedule sets, by `apply` or `revert`, or
                another schedule has taken it over (also a ValueError).
        """
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or to < 0):
            raise RateError(f"to={to!r} is no number of steps")
        self._require_all()
        done = self.steps_done
        self.steps_done = done + 1 if to is None else to
        try:
            self._write()
        except BaseException:
            self.steps_done = done
            raise
        return self.rate

    def extend(self, steps: int) -> None:
        """Reach the end after `steps` steps instead."""
        self._require_all()
        self.curve = read_curve({**asdict(self.curve), "steps": steps})
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The step, the curve and each site's own rate: what a checkpoint keeps, as plain JSON values."""
        bases = [[rate.path, rate.op, rate.base] for rate in self.rates]
        return {"steps_done": self.steps_done, "curve": asdict(self.curve), "bases": bases}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the schedule of that state was, from the rates that its sites had of their own.

        Raises:
            MisfitError: not a state of a schedule, or one of other sites (also a ValueError).
        """
        if set(state) != {"steps_done", "curve", "bases"}:
            raise MisfitError("this is no state of a schedule", where=", ".join(map(str, state)))
        bases = {(path, op): base for path, op, base in state["bases"]}
        own = {(rate.path, rate.op) for rate in self.rates}
        if bases.keys() != own:
            other = sorted(path for path, _ in bases.keys() ^ own)
            raise MisfitError(
                "the state is of a schedule of other sites",
                where=", ".join(map(repr, other[:5])),
                remedy="make the schedule with the selector, and after the grafts, of the run that saved it",
            )
        self._require_all()
        for rate in self.rates:
            rate.rebase(bases[rate.path, rate.op])
        self.curve = read_curve(state["curve"])
        self.step(to=state["steps_done"])

    def remove(self) -> None:
        """Restore every rate of before the schedule, and take out what was grafted for it.

        Sites that others have grafted or scheduled since are left alone.
        """
        temporary = {id(graft) for _, _, graft in self._grafts}
        with lock_of(self._root):
            for rate in self.rates:
                if id(rate.graft) not in temporary:
                    rate.restore()
            take_out([step for step in self._grafts if step[2].schedule.get("owner") == self.rates[0].owner])
        self._grafts = []

    def __repr__(self) -> str:
        curve = self.curve
        way = f"{curve.start} to {curve.end}, {curve.shape} over {curve.steps} steps"
        return f"Schedule({len(self.rates)} rates, {way}; after {self.steps_done}: {self.rate:g})"

    def _require_all(self) -> None:
        lost = [rate.path for rate in self.rates if not rate.in_place]
        if lost:
            raise MisfitError(
                f"{len(lost)} of the {len(self.rates)} rates of the schedule are no longer its own: apply, "
                "revert or another schedule has changed those sites since",
                where=", ".join(map(repr, lost[:5])),
                remedy="call .remove() on this schedule, and make a new one after the grafts",
            )

    def _write(self) -> None:
        placed = [(rate.module, rate.graft) for rate in self.rates]
        with lock_of(self._root), all_or_no_rates(placed):
            for rate in self.rates:
                rate.set(self.curve.rate(self.steps_done, rate.base))
        state = {"steps_done": self.steps_done, "curve": asdict(self.curve)}
        for rate in self.rates:
            if rate.in_place:
                rate.graft.schedule |= {"state": state, "site": [rate.path, rate.op]}


def schedules_on(root: nn.Module) -> list[dict[str, Any]] | None:
    """The states of the schedules that set rates of a model; None without any."""
    states: dict[str, dict[str, Any]] = {}
    for _, _, graft in placed_grafts(named_modules(root)):
        if "state" in graft.schedule:
            entry = graft.schedule
            state = states.setdefault(entry["owner"], {**entry["state"], "bases": [], "temporary": []})
            state["bases"].append([*entry["site"], entry["base"]])
            if entry["temporary"]:
                state["temporary"].append(entry["site"])
    return list(states.values()) or None


def restore_schedule(model: nn.Module, saved: Mapping[str, Any]) -> Schedule:
    """The schedule whose state `schedules_on` gave, on a model that has its grafts again."""
    state = {key: value for key, value in saved.items() if key != "temporary"}
    sites = {(path, op) for path, op, _ in state["bases"]}
    result = schedule(model, state["curve"], lambda site: (site.path, site.op) in sites)
    try:
        result.load_state_dict(state)
    except BaseException:
        result.remove()
        raise
    for rate in result.rates:
        if [rate.path, rate.op] in saved["temporary"]:  # a graft that goes with its schedule
            rate.graft.schedule["temporary"], rate.graft.holders = True, 1
            result._grafts.append((rate.module, rate.slot, rate.graft))
    return result


@one_at_a_time
def schedule(model: nn.Module, p: Mapping[str, Any], selector: Any = None, inputs: Any = None) -> Schedule:
    """Let rates change over time, in place: of any graft that has a rate, and of dropouts without one.

    The rates go to their start at once; call `.step()` after each step of the optimizer. A dropout or
    drop-path that is not grafted yet is grafted with its own kind, so that `regraft.revert` puts back
    the rate that the model came with; so does `.remove()`.

    Relative rates are relative to a site's rate outside any schedule, also where one has set it already: a
    second schedule takes over the sites that it selects, and the first then raises at its next step.

    Under `torch.compile` the first change of a rate compiles once more, and no later one does, but for
    one kind of site: `"dropout"` at fused attention and RNNs sets the rate of one of torch's kernels,
    where it is a constant. There use `"shape": "step"`, with fewer `stairs` than the compiler's limit
    of eight versions, or a variant with noise of its own.

    Args:
        model: any module. DDP and compiled wrappers are looked into.
        p: `start`, `end`, `steps` and `shape`. Rates are numbers, or relative to each site's own rate:
            `{"start": "x0", "end": "x1"}`. Shapes: "linear", "cosine", "step" (in `stairs` equal jumps),
            "early" (`start` until `steps`, then off), "late" (off until `steps`, then `end`),
            "curriculum" (Morerio's exponential).
        selector: which sites, as in a rule. By default every rate that the model has: grafted or not.
        inputs: for the probe, see `regraft.inspect`.

    Returns:
        The schedule, with `.step()`, `.rate`, `.state_dict()`, `.load_state_dict()` and `.remove()`.

    Raises:
        RegraftError: a selector that matches nothing with a rate, or a schedule that cannot be read.

    Source: Morerio, Cavazza, Volpi, Vidal, Murino (2017), "Curriculum Dropout"; Liu, Xu, Jin, Shen,
        Darrell (2023), "Dropout Reduces Underfitting", for early and late dropout.

    Differs: the paper's early dropout may also fall linearly: that is "linear", with an end of 0.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "gaussian"})
        >>> schedule = regraft.schedule(net, p={"start": 0.0, "end": 0.5, "steps": 4})
        >>> [schedule.step() for _ in range(5)]
        [0.125, 0.25, 0.375, 0.5, 0.5]
        >>> net[1]
        GaussianDropout(p=0.5)
        >>> schedule.remove()
        >>> net[1]
        GaussianDropout(p=0.1)
    """
    curve = read_curve(p)
    inspection = inspect(model, inputs)
    wanted = None if selector is None else read_selector(selector)
    sites = _selected(inspection, wanted)
    bare = {key: site.family for key, site in sites.items() if site.variant is None and site.family in _NOISE}
    grafts: list[Step] = []
    placed = [(named.module, graft) for named, _, graft in placed_grafts(named_modules(inspection.root))]
    try:
        with all_or_no_rates(placed):
            skipped = _graft(model, inspection, bare, grafts)
            rates, without = rates_of(inspection.root, sites)
            skipped |= without
            if wanted is not None and not wanted.any_type:
                known = {rate.path for rate in rates} | set(skipped)
                skipped |= {site.path: _NO_RATE for site in sites.values() if site.path not in known}
            _check(curve, rates, sites, skipped, wanted)
            claimed = claim(inspection.root, rates, grafts)
            return Schedule(inspection.root, curve, rates, skipped, claimed)
    except BaseException:
        take_out(grafts)
        raise


def _selected(inspection: Inspection, selector: Selector | None) -> dict[Key, Site]:
    sites = inspection.sites
    if selector is None:
        selected = [site for site in sites if site.variant or (site.family in _NOISE and site.calls != 0)]
    else:
        selected = [site for site in sites if selector.matches(site)]
    if not selected:
        kinds = ", ".join(sorted({site.op for site in sites})) or "no sites"
        what = "the model has no rates" if selector is None else "the selector matches nothing"
        raise NoMatchError(
            what, where="" if selector is None else repr(selector.text), remedy=f"this model has {kinds}"
        )
    return {key_of(site): site for site in selected}


def _graft(
    model: nn.Module, inspection: Inspection, bare: dict[Key, str], grafts: list[Step]
) -> dict[str, str]:
    """Graft the sites that have no graft yet, with the variant that only sets their rate; what is skipped."""

    def in_family(name: str) -> Any:
        return lambda site: bare.get(key_of(site)) == name

    families = [name for name in _NOISE if name in bare.values()]
    if not families:
        return {}
    rules = read_rules([(in_family(name), variant(_NOISE[name], p=0.1)) for name in families])
    report = graft_rules(model, plan_of(inspection, rules), temporary=grafts)
    return {skip.path: skip.reason for skip in report.skipped}


def _check(
    curve: Curve, rates: list[Rate], sites: dict[Key, Site], skipped: dict[str, str], wanted: Selector | None
) -> None:
    where = "" if wanted is None else repr(wanted.text)
    if not rates:
        why = (
            next(iter(skipped.values()), None) or "a rate is what dropouts and grafts have, by regraft.apply"
        )
        raise WrongKindError(f"none of {len(sites)} selected sites has a rate", where=where, remedy=why)
    ends = [(rate.path, curve.ends(rate.base)) for rate in rates]
    for path, levels in ends:
        if max(levels) >= 1:
            raise RateError(f"the rate would be {max(levels):g}, not in [0, 1)", where=f"{where} at {path!r}")
    if all(start == end for _, (start, end) in ends):
        base = " (relative to 0 is 0)" if isinstance(curve.end, str) else ""
        raise RateError(
            f"the schedule goes from {curve.start} to {curve.end}{base}: no rate changes", where=where
        )

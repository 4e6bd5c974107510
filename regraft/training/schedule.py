"""`regraft.schedule`: rates that change in the course of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from regraft.errors import MisfitError, NoMatchError, RateError, WrongKindError
from regraft.find.inspect import Inspection, inspect
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import lock_of, named_modules, one_at_a_time
from regraft.graft.apply import Step, graft_rules, take_out
from regraft.graft.graph_nodes import placed_grafts
from regraft.graft.rates import Key, Rate, all_or_no_rates, claim, key_of, rates_of
from regraft.planning.plan import plan_of
from regraft.planning.rules import read_rules
from regraft.training.curve import Curve, level, read_curve
from regraft.variants.registry import variant

_NOISE = {"Dropout": "dropout", "DropPath": "droppath"}
"""For each family of ungrafted sites, the variant that sets the rate and nothing else."""
_NO_RATE = "nothing there has a rate"


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
        self.notes = _notes(curve, rates)
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
        self.curve = read_curve({**self.curve.to_dict(), "steps": steps})
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """The step, the curve and each site's own rate: what a checkpoint keeps, as plain JSON values."""
        bases = [[rate.path, rate.op, rate.base] for rate in self.rates]
        return {"steps_done": self.steps_done, "curve": self.curve.to_dict(), "bases": bases}

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
    bare = {key_of(site) for site in sites.values() if site.variant is None and site.family in _NOISE}
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


def _graft(model: nn.Module, inspection: Inspection, bare: set[Key], grafts: list[Step]) -> dict[str, str]:
    """Graft the sites that have no graft yet, with the variant that only sets their rate; what is skipped."""
    if not bare:
        return {}

    def family(name: str) -> Any:
        return lambda site: key_of(site) in bare and site.family == name

    pairs = [
        (family(name), variant(value, p=0.1))
        for name, value in _NOISE.items()
        if any(key_of(site) in bare and site.family == name for site in inspection.sites)
    ]
    report = graft_rules(model, plan_of(inspection, read_rules(pairs)), temporary=grafts)
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
    for rate in rates:
        highest = max(level(curve.start, rate.base), level(curve.end, rate.base))
        if highest >= 1:
            raise RateError(
                f"the rate would be {highest:g}, not in [0, 1)", where=f"{where} at {rate.path!r}"
            )
    if all(level(curve.start, rate.base) == level(curve.end, rate.base) for rate in rates):
        base = " (relative to 0 is 0)" if isinstance(curve.end, str) else ""
        raise RateError(
            f"the schedule goes from {curve.start} to {curve.end}{base}: no rate changes", where=where
        )


def _notes(curve: Curve, rates: list[Rate]) -> list[str]:
    fused = sum(rate.fused for rate in rates)
    if not fused or curve.shape in ("step", "early", "late"):
        return []
    return [
        f"{fused} of {len(rates)} rates are of torch's own kernels: under torch.compile each new value "
        "compiles anew; 'shape': 'step' has few values"
    ]

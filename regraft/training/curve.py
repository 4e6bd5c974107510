"""Curves: how a rate goes from its start to its end over the steps of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regraft.errors import OptionError, RateError, nearest
from regraft.variants.checks import check_choice, check_count
from regraft.variants.module import check_rate

Level = float | str
"""A rate in [0, 1), or one relative to the site's own, `"x0.5"`."""


def _linear(t: float, _: int) -> float:
    return t


def _cosine(t: float, _: int) -> float:
    return (1 - math.cos(math.pi * t)) / 2


def _step(t: float, stairs: int) -> float:
    return math.floor(t * stairs) / stairs


def _jump(t: float, _: int) -> float:
    return float(t >= 1)


def _curriculum(t: float, _: int) -> float:
    # The paper's gamma of 10 / T; the e^-10 that is left at T counts as none.
    return 1 - math.exp(-10 * t) if t < 1 else 1.0


SHAPES: dict[str, Callable[[float, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "step": _step,
    "early": _jump,
    "late": _jump,
    "curriculum": _curriculum,
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

    def part(self, step: int) -> float:
        """The fraction of the way from start to end after `step` steps."""
        return SHAPES[self.shape](min(step / self.steps, 1.0), self.stairs)

    def rate(self, step: int, base: float) -> float:
        """The rate after `step` steps of a site whose own rate is `base`."""
        start, end = level(self.start, base), level(self.end, base)
        part = self.part(step)
        return start if part == 0 else end if part == 1 else start + (end - start) * part

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def level(given: Level, base: float) -> float:
    """A rate as a number: a relative one times `base`."""
    return float(given[1:]) * base if isinstance(given, str) else given


def read_curve(given: Any) -> Curve:
    """Read the argument `p` of `regraft.schedule`.

    Raises:
        OptionError: an unknown or missing key, or a value of the wrong kind.
        RateError: a rate or a number out of range.
    """
    if isinstance(given, Curve):
        return given
    if not isinstance(given, Mapping):
        raise OptionError(
            f"p={given!r} is no schedule", remedy='for example p={"start": 0.0, "end": 0.1, "steps": 1000}'
        )
    known = list(Curve.__dataclass_fields__)
    for key in given:
        if key not in known:
            listed = f"it has {', '.join(known)}"
            raise OptionError(
                f"a schedule has no {key!r}", remedy=f"{nearest(str(key), known)} {listed}".strip()
            )
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

"""Checks of option values, shared by the variants: each raises with the option's name and range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.errors import OptionError, RateError, nearest


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """`value` is a finite number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r} is not a number")
    bounds = [
        ("above", above, above is None or value > above),
        ("at least", least, least is None or value >= least),
        ("at most", most, most is None or value <= most),
    ]
    if not (abs(value) < float("inf") and all(holds for _, _, holds in bounds)):
        wanted = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None)
        raise RateError(
            f"{name}={value!r} is out of range", remedy=f"give a number {wanted or 'that is finite'}"
        )


def check_axis(name: str, value: object, remedy: str = "for example -1, the last") -> None:
    """`value` is a whole number, of any sign."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{name}={value!r} is not a whole number", remedy=remedy)


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """`value` is a whole number within the bounds."""
    wanted = f"from {least} to {most}" if most is not None else f"of at least {least}"
    check_axis(name, value, remedy=f"give a whole number {wanted}")
    if not least <= value <= (value if most is None else most):
        raise RateError(f"{name}={value!r} is out of range", remedy=f"give a whole number {wanted}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        hint = nearest(str(value), choices)
        listed = " or ".join(repr(choice) for choice in choices)
        raise OptionError(f"{name}={value!r} is not {listed}", remedy=hint)


def check_switch(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is not True or False")

"""Limits of max-norm: selector -> bound, read and resolved against the layers of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from regraft.errors import NoMatchError, OptionError, RateError, RuleSyntaxError, WrongKindError
from regraft.find.insertion_points import places
from regraft.find.inspect import inspect
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import named_modules
from regraft.find.weights import KINDS
from regraft.training.norm.rows import unit_axis

Bound = float | str
"""A norm, or `"1.1x"`, relative to a row's norm when the limit was set."""
_BOUNDS = "a norm, 3.0; or one relative to each row's own, '1.1x'"
_RELATIVE = re.compile(r"(\d+(\.\d+)?)x|x(\d+(\.\d+)?)")


def read_limits(limits: Any) -> list[tuple[Selector, Bound | None]]:
    """Limits as the user wrote them, read.

    Raises:
        RegraftError: a selector or a bound that cannot be read.
    """
    if not isinstance(limits, Mapping) or not limits:
        raise RuleSyntaxError(f"{limits!r} is no set of limits", remedy="write {'Linear': 3.0}")
    read: list[tuple[Selector, Bound | None]] = []
    for key, bound in limits.items():
        selector = read_selector(key)
        where = f"limit for {selector.text!r}"
        if selector.position:
            raise RuleSyntaxError("a weight has no place before or after", where=where)
        read.append((selector, _bound(bound, where)))
    return read


def _bound(bound: Any, where: str) -> Bound | None:
    if bound is None:
        return None
    if isinstance(bound, str):
        found = _RELATIVE.fullmatch(bound.strip())
        if found is None:
            raise OptionError(
                f"{bound!r} is no bound", where=where, remedy="a norm, 3.0; or relative, '1.1x'"
            )
        if float(found[1] or found[3]) < 1:
            raise RateError(f"{bound!r} would shrink every row", where=where, remedy="a factor of 1 or more")
        return f"{float(found[1] or found[3]):g}x"
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise OptionError(f"{bound!r} is no bound", where=where, remedy="a norm, 3.0; or relative, '1.1x'")
    if not 0 < bound < float("inf"):
        raise RateError(f"{bound!r} is no norm to hold weights to", where=where, remedy="a number above 0")
    return float(bound)


def limited_sites(
    root: nn.Module, rules: list[tuple[Selector, Bound | None]], inputs: Any = None
) -> list[tuple[Site, Bound]]:
    """The weights to hold, each with the bound of the last limit that selects it.

    Raises:
        NoMatchError: a limit that matches nothing.
        WrongKindError: one that matches only what has no rows.
    """
    sites = _limitable(root, rules, inputs)
    decided: dict[int, tuple[int, Bound | None]] = {}
    for number, (selector, bound) in enumerate(rules):
        where = f"limit for {selector.text!r}"
        found = [index for index, site in enumerate(sites) if selector.matches(site)]
        if not found:
            layers = sorted({site.op for site in sites if _has_rows(site)})
            has = f"this model's layers with rows are {', '.join(layers) or 'none'}"
            raise NoMatchError("the limit matches nothing", where=where, remedy=has)
        fitting = [index for index in found if _has_rows(sites[index])]
        if not fitting and bound is not None:
            kinds = ", ".join(sorted({sites[index].op for index in found}))
            raise WrongKindError(
                f"{kinds} has no incoming weights of output units",
                where=where,
                remedy="max-norm is for Linear, Conv1D and convolution layers",
            )
        decided |= dict.fromkeys(fitting, (number, bound))
    latest: dict[int, tuple[int, Bound | None]] = {}
    for index, (number, bound) in decided.items():
        key = id(_weight(sites[index]))  # layers that share a weight have one bound
        latest[key] = max(latest.get(key, (-1, None)), (number, bound), key=lambda one: one[0])
    chosen = [(sites[index], latest[id(_weight(sites[index]))][1]) for index in sorted(decided)]
    return [(site, bound) for site, bound in chosen if bound is not None]


def _weight(site: Site) -> object:
    weight = site.owner._parameters.get(site.attribute or "weight")
    return site if weight is None else weight


def _limitable(root: nn.Module, rules: list[tuple[Selector, Bound | None]], inputs: Any) -> list[Site]:
    """Every module, and the weights that others multiply by, if a limit asks for matrices."""
    every = places(named_modules(root))
    if not any(selector.type in KINDS for selector, _ in rules):
        return every
    sites = inspect(root, inputs).sites
    lent = [site for site in sites if site.kind == "weight" and site.family == "Linear"]
    held = {id(site.owner) for site in lent if site.attribute == "weight"}
    return [*(site for site in every if id(site.module) not in held), *lent]


def _has_rows(site: Site) -> bool:
    return site.kind == "weight" or unit_axis(site.module) is not None

"""Rules: selector -> variant, read and resolved against the sites of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import (
    NoMatchError,
    RegraftError,
    RuleSyntaxError,
    WrongKindError,
    nearest,
    raise_all,
)
from regraft.find.inspect import Inspection
from regraft.find.selectors import Selector, read_selector
from regraft.planning.insertions import insertions
from regraft.planning.resolve import Decision, decide
from regraft.variants.parse import parse_variant
from regraft.variants.registry import spec
from regraft.variants.spec import Variant


@dataclass(frozen=True)
class Rule:
    """A selector and what it means: a variant, or None for "leave alone"."""

    selector: Selector
    variant: Variant | None


def read_rules(rules: Any) -> list[Rule]:
    """Rules as the user wrote them, a mapping or pairs, read.

    Raises:
        RegraftError: everything that cannot be read, together.
    """
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise RuleSyntaxError(
            f"{rules!r} is no set of rules", remedy="write {'Dropout': 'gaussian'} or a list of pairs"
        )
    read: list[Rule] = []
    problems: list[RegraftError] = []
    for pair in pairs:
        try:
            read.append(_read_pair(pair))
        except RegraftError as error:
            problems.append(error)
    raise_all(problems)
    return read


def _read_pair(pair: Any) -> Rule:
    if isinstance(pair, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise RuleSyntaxError(f"{pair!r} is no pair of a selector and a variant")
    key, value = pair
    if isinstance(value, str):
        return Rule(read_selector(key), parse_variant(value))
    if value is None or isinstance(value, Variant):
        return Rule(read_selector(key), value)
    raise RuleSyntaxError(
        f"{value!r} is no variant",
        where=f"rule for {key!r}",
        remedy="a string such as 'gaussian(p=0.2)', regraft.variant(...), or None to leave alone",
    )


def resolve(
    inspection: Inspection, rules: list[Rule], fused: str = "auto"
) -> tuple[list[Decision], list[RegraftError]]:
    """What the rules decide for each selected site, and every problem they have."""
    problems: list[RegraftError] = []
    decided: dict[int, int] = {}
    for index, rule in enumerate(rules):
        if rule.selector.position:
            continue
        try:
            for position in _matched(inspection, rule, index):
                decided[position] = index
        except RegraftError as error:
            problems.append(error)
    decisions: list[Decision] = []
    for position, index in sorted(decided.items()):
        variant = rules[index].variant
        if variant is None:
            continue
        try:
            site, text = inspection.sites[position], rules[index].selector.text
            decisions.append(decide(site, index, text, variant, fused))
        except RegraftError as error:
            problems.append(error)
    inserting = [(at, rule.selector, rule.variant) for at, rule in enumerate(rules) if rule.selector.position]
    inserted, more = insertions(inspection, inserting, fused)
    return [*decisions, *inserted], [*problems, *more]


def _matched(inspection: Inspection, rule: Rule, index: int) -> list[int]:
    """Positions of the sites a rule selects; an error if there are none that it can act on."""
    selector, sites = rule.selector, inspection.sites
    found = [
        position
        for position, site in enumerate(sites)
        if site.kind != "inserted" and selector.matches(site)  # rules are read against the original
    ]
    where = f"rule {index}: {selector.text!r}"
    if not found:
        raise _no_match(inspection, selector, where)
    if rule.variant is None:
        return found
    families = spec(rule.variant.name).families
    fitting = [position for position in found if sites[position].family in families]
    if not fitting:
        kinds = sorted({sites[position].op for position in found})
        raise WrongKindError(
            f"{rule.variant.name!r} cannot replace {', '.join(kinds)}: it takes the place of "
            f"{' or '.join(families)}",
            where=f"{where}, first at {sites[found[0]].path!r}",
            remedy="`regraft variants` lists what each variant replaces",
        )
    # "*@encoder.**" means what the variant fits there; a class or a predicate named each site itself.
    return fitting if selector.any_type else found


def _no_match(inspection: Inspection, selector: Selector, where: str) -> NoMatchError:
    sites = inspection.sites
    kinds = sorted({site.op for site in sites})
    paths = [path for site in sites for path in site.paths]
    word = selector.text.partition("@")[0] if selector.type != "*" else selector.text.rpartition("@")[2]
    hints = [nearest(word, [*kinds, *paths])]
    if selector.type in kinds:
        close = nearest(
            selector.text.partition("@")[2], [p for s in sites if s.op == selector.type for p in s.paths]
        )
        hints = [f"there are {selector.type} sites, but none at that path", close]
    elif any(selector.type == path for path in paths):
        hints = [f"{selector.type!r} is a path: write '*@{selector.type}'"]
    hints.append(f"this model has {', '.join(kinds)}" if kinds else "this model has no sites")
    if not inspection.probe.ran:
        hints.append(
            f"functional dropout is seen only by the probe, which did not run ({inspection.probe.reason})"
        )
    return NoMatchError("the rule matches nothing", where=where, remedy="; ".join(filter(None, hints)))

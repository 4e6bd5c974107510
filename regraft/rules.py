"""Rules: selector -> variant, read and resolved against the sites of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import (
    NoMatchError,
    RateError,
    RegraftError,
    RuleSyntaxError,
    WrongKindError,
    nearest,
    raise_all,
)
from regraft.find.inspection import Inspection
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.variants.module import check_rate, written_options
from regraft.variants.parse import parse_variant
from regraft.variants.registry import complete_options, spec
from regraft.variants.spec import DEFAULT_RATE, Spec, Variant


@dataclass(frozen=True)
class Rule:
    """A selector and what it means: a variant, or None for "leave alone"."""

    selector: Selector
    variant: Variant | None


@dataclass(frozen=True)
class Choice:
    """What a rule decided for one site: a variant with its rate, or the reason why not."""

    site: Site
    rule: int
    variant: Variant | None = None
    after: str = ""
    reason: str | None = None
    remedy: str = ""
    at_zero: bool = False


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


def resolve(inspection: Inspection, rules: list[Rule]) -> tuple[list[Choice], list[RegraftError]]:
    """What the rules decide for each selected site, and every problem they have."""
    problems: list[RegraftError] = []
    decided: dict[int, int] = {}
    for index, rule in enumerate(rules):
        try:
            for position in _matched(inspection, rule, index):
                decided[position] = index
        except RegraftError as error:
            problems.append(error)
    choices: list[Choice] = []
    for position, index in sorted(decided.items()):
        variant = rules[index].variant
        if variant is None:
            continue
        try:
            choices.append(_choose(inspection.sites[position], index, rules[index], variant))
        except RegraftError as error:
            problems.append(error)
    return choices, problems


def _matched(inspection: Inspection, rule: Rule, index: int) -> list[int]:
    """Positions of the sites a rule selects; an error if there are none that it can act on."""
    selector, sites = rule.selector, inspection.sites
    found = [position for position, site in enumerate(sites) if selector.matches(site)]
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
        close = nearest(selector.text.partition("@")[2], [p for s in sites if s.op == selector.type for p in s.paths])
        hints = [f"there are {selector.type} sites, but none at that path", close]
    elif any(selector.type == path for path in paths):
        hints = [f"{selector.type!r} is a path: write '*@{selector.type}'"]
    hints.append(f"this model has {', '.join(kinds)}" if kinds else "this model has no sites")
    if not inspection.probe.ran:
        hints.append(
            f"functional dropout is seen only by the probe, which did not run ({inspection.probe.reason})"
        )
    return NoMatchError("the rule matches nothing", where=where, remedy="; ".join(filter(None, hints)))


def _choose(site: Site, index: int, rule: Rule, variant: Variant) -> Choice:
    found = spec(variant.name)
    if site.family not in found.families:
        what = f"{variant.name!r} cannot replace {site.op}"
        return Choice(site, index, reason=what, remedy="narrow the rule, or choose another variant")
    if site.calls == 0 and site.obstacle is None:
        return Choice(
            site,
            index,
            reason="its forward was never called in the probe",
            remedy="its parent may read the rate or the weight instead; check the line that uses it",
        )
    if site.obstacle is not None:
        return Choice(site, index, reason=site.obstacle[0], remedy=site.obstacle[1])
    if variant.name == "off" and site.family not in ("Dropout", "DropPath"):
        return Choice(site, index, reason="there is no regularizer to take out", remedy="drop the rule")
    p = _rate(site, found, variant, f"rule {index}: {rule.selector.text!r}, at {site.path!r}")
    if p == 0 and not _sets_rate(variant) and _needs_rate(found, variant):
        example = f"{rule.selector.text!r}: '{variant.name}(p=0.1)'"
        return Choice(site, index, reason="its rate is 0", remedy=f"name one: {example}", at_zero=True)
    options = {key: value for key, value in variant.options.items() if key != "p"}
    if p is not None:
        options = {"p": p, **options}
    return Choice(site, index, Variant(variant.name, options), after=_after(site, found, options))


def _sets_rate(variant: Variant) -> bool:
    # A rate relative to 0 is still 0.
    p = variant.options.get("p")
    return p is not None and not isinstance(p, str)


def _needs_rate(found: Spec, variant: Variant) -> bool:
    return found.needs_rate is None or found.needs_rate(complete_options(found, variant.options))


def _rate(site: Site, found: Spec, variant: Variant, where: str) -> float | None:
    p = variant.options.get("p")
    if found.name == "off":
        return None
    if callable(p):
        return check_rate(p(site), where=where)
    if isinstance(p, str):
        base = DEFAULT_RATE if site.p is None else site.p
        rate = base * float(p[1:])
        if not 0 <= rate < 1:
            raise RateError(
                f"p={p!r} of a rate of {base:g} is {rate:g}, not in [0, 1)",
                where=where,
                remedy="a smaller factor",
            )
        return rate
    if p is not None:
        return float(p)
    return DEFAULT_RATE if site.p is None else site.p


def _after(site: Site, found: Spec, options: dict[str, Any]) -> str:
    name = found.module_for(site.family or "").__name__
    shape = ", ".join(map(str, site.shape)) if site.shape else ""
    shown = {**found.defaults, **{key: value for key, value in options.items() if key != "p"}}
    rate = options.get("p")
    inside = ", ".join(filter(None, [shape, written_options(rate, shown)]))
    return f"{name}({inside})"

"""Rules: selector -> variant, read and resolved against the sites of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regraft.errors import (
    NoMatchError,
    RegraftError,
    RuleSyntaxError,
    WrongKindError,
    nearest,
)
from regraft.find.balance import is_whole_class
from regraft.find.inspect import Inspection
from regraft.find.probe.dataflow import BLOCK, BRANCH, Dataflow
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.planning.insertions import insertions
from regraft.planning.resolve import Decision, decide
from regraft.record import original_class
from regraft.report.document import counted
from regraft.variants.registry import parse_variant, spec
from regraft.variants.spec import Variant


@dataclass(frozen=True)
class Rule:
    """A selector and what it means: a variant, or None for "leave alone".

    Attributes:
        problem: why the selector (then None) or the variant cannot be read.
    """

    selector: Selector | None
    variant: Variant | None
    problem: RegraftError | None = None


def read_rules(rules: Any) -> list[Rule]:
    """Rules as the user wrote them, a mapping or pairs, read.

    Raises:
        RuleSyntaxError: this is neither.
    """
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise RuleSyntaxError(
            f"{rules!r} is no set of rules", remedy="write {'Dropout': 'gaussian'} or a list of pairs"
        )
    return [_read_pair(pair) for pair in pairs]


def dataflow_for(rules: list[Rule]) -> Dataflow | None:
    """What the probe is to record of values for these rules; None if no rule depends on it."""
    fields = [rule.selector.field for rule in rules if rule.selector is not None and rule.selector.position]
    chosen = [spec(rule.variant.name) for rule in rules if rule.variant is not None]
    if fields or any(one.activations or one.attention or "Embedding" in one.families for one in chosen):
        return Dataflow(fields)
    return None


def _read_pair(pair: Any) -> Rule:
    if isinstance(pair, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return Rule(None, None, RuleSyntaxError(f"{pair!r} is no pair of a selector and a variant"))
    selector: Selector | None = None
    try:
        selector = read_selector(pair[0])
        return Rule(selector, _read_variant(*pair))
    except RegraftError as error:
        return Rule(selector, None, error)


def _read_variant(key: Any, value: Any) -> Variant | None:
    if isinstance(value, str):
        return parse_variant(value)
    if value is None or isinstance(value, Variant):
        return value
    remedy = "a string such as 'gaussian(p=0.2)', regraft.variant(...), or None to leave alone"
    p = value if isinstance(value, float) else getattr(value, "p", None)
    if isinstance(p, float):
        remedy = f"write 'dropout(p={p:g})', or the name of another variant"
    raise RuleSyntaxError(f"{value!r} is no variant", where=f"rule for {key!r}", remedy=remedy)


def resolve(
    inspection: Inspection, rules: list[Rule], fused: str = "auto"
) -> tuple[list[Decision], list[RegraftError]]:
    """What the rules decide for each selected site, and every problem that they have, in their order."""
    problems = [(index, rule.problem) for index, rule in enumerate(rules) if rule.problem is not None]
    decided: dict[int, tuple[int, Selector, Variant | None]] = {}
    inserting = []
    for index, rule in enumerate(rules):
        if rule.selector is None:
            continue
        if rule.selector.position:
            inserting.append((index, rule.selector, rule.variant))
            continue
        try:
            for position in _matched(inspection, rule.selector, rule.variant, index):
                decided[position] = (index, rule.selector, rule.variant)
        except RegraftError as error:
            problems.append((index, error))
    _whole_classes(inspection, decided)
    other_tables = _other_tables(inspection, decided)
    decisions: list[Decision] = []
    for position, (index, selector, variant) in sorted(decided.items(), key=lambda item: item[0]):
        if variant is None:
            continue
        try:
            site = inspection.sites[position]
            if position in other_tables and site.obstacle is None:
                site = replace(site, obstacle=other_tables[position])
            decisions.append(decide(site, index, selector.text, variant, fused, inspection.dataflow))
        except RegraftError as error:
            problems.append((index, error))
    inserted, more = insertions(inspection, inserting, fused) if inserting else ([], [])
    ordered = sorted([*problems, *more], key=lambda problem: problem[0])
    return [*decisions, *inserted], [error for _, error in ordered]


def _whole_classes(inspection: Inspection, decided: dict[int, tuple[int, Selector, Variant | None]]) -> None:
    """A variant in the place of a class's whole forward leaves no call inside it to decide on."""
    sites = inspection.sites
    chosen = [sites[position] for position, (_, _, variant) in decided.items() if variant is not None]
    whole = {id(site.module): site for site in chosen if is_whole_class(site)}
    for position in list(decided):
        if sites[position].kind == "call" and id(sites[position].module) in whole:
            del decided[position]


def _other_tables(
    inspection: Inspection, decided: dict[int, tuple[int, Selector, Variant | None]]
) -> dict[int, tuple[str, str]]:
    """The tables of a model that are not its tokens', where a rule means several; why each is left.

    A table of tokens looks up the model's input itself; those of positions and segments look up numbers that
    the model computes. Of two whose rows are added, the one that the model declares is the tokens'.
    """
    flow, by_rule = inspection.dataflow, dict[int, list[int]]()
    for position, (index, _, variant) in decided.items():
        site = inspection.sites[position]
        if variant is not None and variant.name == "neftune" and site.calls != 0:
            by_rule.setdefault(index, []).append(position)
    left: dict[int, tuple[str, str]] = {}
    for positions in by_rule.values():
        if len(positions) < 2:
            continue
        modules = {position: inspection.sites[position].module for position in positions}
        shown = {at for at, module in modules.items() if flow is not None and flow.looks_up_input(module)}
        declared = _declared_table(inspection.root)
        own = {at for at, module in modules.items() if module is declared}
        rivals = {
            at
            for at in shown or modules
            for other in (shown or modules)
            if at != other and (flow is None or flow.added_together(modules[at], modules[other]))
        }
        tokens = (shown - rivals) | own
        for at in positions:
            if at not in tokens:
                path = inspection.sites[at].path
                known = bool(tokens) and not (at in rivals and rivals.isdisjoint(own))
                left[at] = (
                    "it looks up positions or segments, and the noise is for the table of tokens"
                    if known
                    else "which of the tables is that of the tokens was not seen",
                    f"a rule that names it alone takes it: 'Embedding@{path}'",
                )
    return left


def _declared_table(root: nn.Module) -> nn.Module | None:
    """The table of tokens, of a model that says which it is, as those of Transformers do."""
    try:
        table = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return table if isinstance(table, nn.Module) else None


def _matched(inspection: Inspection, selector: Selector, variant: Variant | None, index: int) -> list[int]:
    """Positions of the sites a rule selects; an error if there are none that it can act on."""
    sites = inspection.sites
    found = [
        position
        for position, site in enumerate(sites)
        if site.kind != "inserted" and selector.matches(site)  # rules are read against the original
    ]
    where = f"rule {index}: {selector.text!r}"
    if not found:
        raise _no_match(inspection, selector, where)
    if variant is None:
        return found
    found_variant = spec(variant.name)
    families = found_variant.families
    fitting = [
        position
        for position in found
        if found_variant.fits(sites[position].family)
        and (sites[position].kind != "weight" or found_variant.weight_function is not None)
    ]
    if not fitting:
        kinds = sorted({sites[position].op for position in found})
        if all(found_variant.fits(sites[position].family) for position in found):
            raise WrongKindError(
                f"{variant.name!r} acts in a linear layer's own forward, and here others multiply",
                where=f"{where}, first at {sites[found[0]].path!r}",
                remedy="choose 'dropconnect' or 'mixout'",
            )
        raise WrongKindError(
            f"{variant.name!r} cannot replace {', '.join(kinds)}: it takes the place of "
            f"{' or '.join(families)}",
            where=f"{where}, first at {sites[found[0]].path!r}",
            remedy="`regraft variants` lists what each variant replaces",
        )
    # "*@encoder.**" means what the variant fits there; a class or a predicate named each site itself.
    return fitting if selector.any_type else found


def _wider(sites: list[Site], selector: Selector) -> list[str]:
    """`*` is one part of a path: the same with `**`, if that matches."""
    kind, at, path = selector.text.rpartition("@")
    wider = f"{kind}{at}{re.sub(r'[*]+', '**', path)}"
    if selector.paths is None or selector.text.startswith("re:") or wider == selector.text:
        return []
    matching = sum(read_selector(wider).matches(site) for site in sites)
    return [f"`*` is one part of a path: {wider!r} matches {counted(matching, 'site')}"] if matching else []


def _absent(inspection: Inspection, selector: Selector) -> list[str]:
    """What puts a dropout in where the model has none, or why those that it has are not matched."""
    hints = [finding.finding for finding in inspection.findings if "quantized" in finding.finding][:1]
    if selector.type not in ("Dropout", "DropPath") or any(
        site.family == selector.type for site in inspection.sites
    ):
        return hints
    vanished = [one for one in inspection.findings if "became nn.Identity" in one.finding]
    if selector.type == "DropPath" and vanished:
        return [f"they became nn.Identity at rate 0: {vanished[0].remedy}"]
    if selector.type == "DropPath":
        return [*hints, f"this model has no DropPath{_drop_path_place(inspection)}"]
    layers = [site for site in inspection.sites if site.family == "Linear" and site.calls != 0]
    place = f"after:Linear@{layers[-1].path}" if layers and layers[-1].path else "after:Linear"
    rule = f"{{'{place}': 'dropout(p=0.1)'}}"
    return [*hints, f"this model has no {selector.type}: {rule} puts one in"]


def _drop_path_place(inspection: Inspection) -> str:
    """Where a drop-path can be put in: after a block that adds to its input, or after a branch."""
    flow, places = inspection.dataflow, dict[str, str]()
    for named in inspection.modules:
        role = None if flow is None else flow.role(named.module)
        path = ".".join("*" if part.isdigit() else part for part in named.paths[0].split("."))
        if role == BLOCK:
            places.setdefault(BLOCK, f"after:{original_class(named.module).__name__}")
        elif role == BRANCH:
            places.setdefault(BRANCH, f"after:*@{path}")
    place = places.get(BLOCK) or places.get(BRANCH)
    return f": {{'{place}': 'droppath(p=0.1)'}} puts one in" if place else ""


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
    hints = [*_wider(sites, selector), *_absent(inspection, selector), *hints]
    hints.append(f"this model has {', '.join(kinds)}" if kinds else "this model has no sites")
    if not inspection.probe.ran:
        hints.append(
            f"functional dropout is seen only by the probe, which did not run ({inspection.probe.reason})"
        )
    return NoMatchError("the rule matches nothing", where=where, remedy="; ".join(filter(None, hints)))

"""Insertion rules: what is put before and after which module, and at which rate."""

from __future__ import annotations

from dataclasses import replace

from regraft.errors import NoMatchError, RegraftError, WrongKindError, nearest
from regraft.find.insertion_points import INSERTED, family_to_insert, insertable, means, only_added, operation
from regraft.find.inspect import Inspection
from regraft.find.probe.dataflow import BLOCK, BRANCH, Dataflow
from regraft.find.selectors import Selector
from regraft.find.site import Site
from regraft.planning.resolve import Decision, decide
from regraft.variants.registry import complete_options, spec
from regraft.variants.spec import DEFAULT_RATE, Variant

InsertRule = tuple[int, Selector, Variant | None]
"""The number of a rule, and what it says."""


def insertions(
    inspection: Inspection, rules: list[InsertRule], fused: str
) -> tuple[list[Decision], list[tuple[int, RegraftError]]]:
    """What the rules insert, and every problem with its rule's number; of two at one place the later wins."""
    sites = insertable(inspection.modules)
    problems: list[tuple[int, RegraftError]] = []
    decided: dict[tuple[int, str], InsertRule] = {}
    for rule in rules:
        try:
            found = _matched(sites, rule)
        except RegraftError as error:
            problems.append((rule[0], error))
            continue
        for position in found:
            op = operation(rule[1], sites[position])
            if rule[2] is None:  # of the whole place: its parts are left alone, too
                parts = [key for key in decided if key[0] == position and key[1].startswith(f"{op}#")]
                decided.update(dict.fromkeys(parts, rule))
            decided[position, op] = rule
    decisions = []
    rates = _growing(sites, decided, inspection.dataflow)
    for (position, op), (index, selector, variant) in sorted(decided.items(), key=lambda one: one[0]):
        if variant is None:
            continue
        p = rates.get((position, op))
        try:
            decisions.append(_decided(inspection, sites[position], op, (index, selector, variant), fused, p))
        except RegraftError as error:
            problems.append((index, error))
    return decisions, problems


def _matched(sites: list[Site], rule: InsertRule) -> list[int]:
    index, selector, variant = rule
    where = f"rule {index}: {selector.text!r}"
    if variant is not None:
        _check_fits(variant, where)
    found = [position for position, site in enumerate(sites) if means(selector, site)]
    if not found:
        raise NoMatchError("the rule matches nothing", where=where, remedy=_near(sites, selector))
    return found


def _near(sites: list[Site], selector: Selector) -> str:
    kinds = sorted({site.op for site in sites})
    paths = [path for site in sites for path in site.paths]
    if selector.paths is None and selector.type in paths:
        close = f"{selector.type!r} is a path: write '{selector.position}:*@{selector.type}'"
    else:
        word = selector.text.partition(":")[2].partition("#")[0]
        close = nearest(word.partition("@")[0], kinds) or nearest(word.rpartition("@")[2], paths)
    return "; ".join(filter(None, [close, f"this model has {', '.join(kinds)}"]))


def _check_fits(variant: Variant, where: str) -> None:
    family = family_to_insert(variant.name)
    if family is None:
        raise WrongKindError(
            f"{variant.name!r} cannot be inserted: it takes the place of "
            f"{' or '.join(spec(variant.name).families)}",
            where=where,
            remedy="insert a variant of dropout or drop-path, for example 'dropout(p=0.2)'",
        )
    if spec(variant.name).adds_state(complete_options(spec(variant.name), variant.options)):
        raise WrongKindError(
            f"{variant.name!r} brings state of its own, and an insertion has no keys in the state dict",
            where=where,
            remedy="choose a variant without state, or write an nn.Dropout and graft that",
        )


def _growing(
    sites: list[Site], decided: dict[tuple[int, str], InsertRule], dataflow: Dataflow | None
) -> dict[tuple[int, str], float]:
    """Of drop-paths, the rate at each depth: from 0 at the first to the rule's own at the last.

    Stacks that are not fed by one another, as an encoder and a decoder, grow apart.
    """
    by_rule: dict[int, list[tuple[int, str]]] = {}
    for key, (index, _, variant) in decided.items():
        p = None if variant is None else variant.options.get("p", DEFAULT_RATE)
        if variant is not None and variant.name == "droppath" and isinstance(p, (int, float)):
            by_rule.setdefault(index, []).append(key)
    rates = {}
    for keys in by_rule.values():
        variant = decided[keys[0]][2]
        assert variant is not None
        last = float(variant.options.get("p", DEFAULT_RATE))
        depths = {_depth(sites[position].path): sites[position] for position, _ in sorted(keys, reverse=True)}
        ordered = list(dict.fromkeys(_depth(sites[position].path) for position, _ in sorted(keys)))
        parts = _lines([depths[depth] for depth in ordered], dataflow)
        for position, op in keys:
            part, at = parts[ordered.index(_depth(sites[position].path))]
            count = sum(one == part for one, _ in parts)
            rates[position, op] = last if count == 1 else last * at / (count - 1)
    return rates


def _lines(blocks: list[Site], dataflow: Dataflow | None) -> list[tuple[int, int]]:
    """Of each block in order, the number of the line of blocks that it is in, and its place there.

    A block begins another line where it is not fed by the one before it in another stack.
    """
    lines: list[tuple[int, int]] = []
    for before, block in zip([None, *blocks], blocks, strict=False):
        line, at = lines[-1] if lines else (0, -1)
        if before is not None and _stack(before) != _stack(block) and not _feeds(before, block, dataflow):
            line, at = line + 1, -1
        lines.append((line, at + 1))
    return lines


def _stack(block: Site) -> str:
    return _depth(block.path).rpartition(".")[0]


def _feeds(before: Site, block: Site, dataflow: Dataflow | None) -> bool:
    """Whether what goes into a block depends on what came out of another; True where that was not seen."""
    if dataflow is None:
        return True
    given, made = dataflow.inputs_of(block.module)[:1], dataflow.outputs_of(before.module)[:1]
    return not given or not made or given[0].depends_on(made[0])


def _depth(path: str) -> str:
    """The block that a path lies in: up to its last number. The branches of a block are of one depth."""
    parts = path.split(".")
    last = max((at for at, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def _decided(
    inspection: Inspection, place: Site, op: str, rule: InsertRule, fused: str, p: float | None
) -> Decision:
    index, selector, variant = rule
    assert variant is not None
    probe, calls = inspection.probe, place.calls
    if place.kind == "module" and probe.covers(place.module):
        calls = probe.counts.get(id(place.module), 0)
    site = replace(
        place,
        kind=INSERTED,
        op=op,
        position=selector.position,
        place=place.op,
        field=selector.field,
        family=family_to_insert(variant.name),
        calls=calls,
        source=probe.lines.get(id(place.module)),
    )
    if site.obstacle is None:
        site = replace(site, obstacle=_obstacle(inspection, place, selector, variant))
    role = None
    if selector.position == "after" and variant.name == "droppath":
        role = _role(inspection, place, variant)
        if role is None and site.obstacle is None and site.calls != 0:
            site = replace(site, obstacle=_unclear(inspection, place, selector))
    if p == 0 and site.obstacle is None:
        remedy = "nothing: the rates grow with the depth, from 0; a function as p sets each"
        return Decision(site, index, reason="the first of the growing rates is 0", remedy=remedy)
    if p is not None:
        variant = Variant(variant.name, {**variant.options, "p": p})
    dataflow = inspection.dataflow
    decision = decide(site, index, selector.text, variant, fused, dataflow)
    residual = role == BLOCK and decision.reason is None
    wrote = residual and dataflow is not None and dataflow.wrote(place.module)
    return replace(decision, residual=residual, in_place=wrote)


def _role(inspection: Inspection, place: Site, variant: Variant) -> str | None:
    """Whether a drop-path drops what a block adds to its input, or a branch's whole result.

    The rule says it, by `adds`; else the probe has seen it. None if neither.
    """
    adds = variant.options.get("adds")
    if adds is not None:
        return BLOCK if adds else BRANCH
    if place.kind == "node":
        return BRANCH if only_added(place) else None
    return None if inspection.dataflow is None else inspection.dataflow.role(place.module)


def _unclear(inspection: Inspection, place: Site, selector: Selector) -> tuple[str, str]:
    """Why a drop-path is not inserted where it might lose whole examples, and what to write."""
    remedy = "say it: 'droppath(adds=True)' drops what it adds to its input, adds=False its whole output"
    if inspection.dataflow is None:
        return (
            "whether it adds to its input is seen by the probe, which did not run",
            f"give inputs=; or {remedy}",
        )
    branches = [
        name
        for name, child in place.module.named_children()
        if place.kind == "module" and inspection.dataflow.role(child) == BRANCH
    ]
    if branches:
        remedy = f"insert it after its branch, 'after:*@PATH.{branches[-1]}'; or {remedy}"
    return (
        "it was not seen to add to its input, nor is its output only added to something: without it whole "
        "examples might be lost",
        remedy,
    )


def _obstacle(
    inspection: Inspection, place: Site, selector: Selector, variant: Variant
) -> tuple[str, str] | None:
    """What the probe saw flow there that cannot be dropped."""
    if place.kind == "node":
        return None  # the probe sees modules
    into, out = inspection.probe.flows.get(id(place.module), (None, None))
    if selector.position == "before" and place.op == "Embedding":
        return "its input is token numbers", f"'after:Embedding@{place.path}'"
    flow = inspection.dataflow
    if selector.position == "after" and flow is not None and flow.unread(place.module, selector.field):
        parts = [f"'{selector.text.partition('#')[0]}#{part}'" for part in flow.read_parts(place.module)]
        return (
            "nothing reads that value: what is dropped there changes nothing",
            f"name the part that is read: {', '.join(parts)}" if parts else "drop what is read",
        )
    if selector.field:
        return None
    seen = into if selector.position == "before" else out
    if seen is not None and not seen[1]:
        side = "input" if selector.position == "before" else "output"
        return f"its {side} is whole numbers, and cannot be dropped", "after the embedding: 'after:Embedding'"
    if variant.options.get("adds") and into and out and into[0] != out[0]:
        return "its output has another shape than its input: it is no residual block", "name its branches"
    return None

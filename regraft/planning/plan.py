"""Planning: rules x sites -> plan. Pure: it reads a model and changes nothing.

The module is not called `plan` because `regraft.plan` is the function.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn
from torch.nn.parameter import is_lazy

from regraft.errors import FileError, MisfitError, OptionError, RegraftError, WrongKindError, raise_all
from regraft.find.balance import NOISE, balance_of_grafts, left
from regraft.find.graph_nodes import node_marks, owner_path
from regraft.find.insertion_points import INSERTED, family_to_insert
from regraft.find.inspect import Inspection, inspect_flow
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site, grafted_site
from regraft.find.weights import matrices
from regraft.ops import FAMILIES, FUSED, KEEPS_LAW
from regraft.planning.resolve import Decision, acts_in_eval
from regraft.planning.rules import Rule, dataflow_for, read_rules, resolve
from regraft.record import original_class
from regraft.report.document import counted
from regraft.report.view import SCHEMA, View
from regraft.variants.module import written_options
from regraft.variants.registry import OF_RULES, check_options, parse_variant, spec
from regraft.variants.spec import DEFAULT_RATE
from regraft.variants.strength import strength

Rules = Mapping[Any, Any] | Sequence[tuple[Any, Any]]
"""Selector -> variant, in order; a mapping or a list of pairs."""


@dataclass(frozen=True)
class Edit:
    """One site that gets a variant. The attributes, all but `site`, are the keys of the JSON.

    `before` and `after` say in words what the other attributes say; nothing reads them.

    Attributes:
        options: the variant's, as the rule gives them; "p" is a rate, or a factor of the rate that each call
            carries ("x2"), and is left out where the call's own rate stays.
        p: the rate of the site before the edit, None where there is none or it is not known.
        methods: of a call site, the owner's methods that run it.
        node: of a node in a graph, its name.
        position: of an insertion, "before" or "after"; `place` is what it is put there of, `field` the
            argument or part of the output that it is on.
        residual: of an insertion, is what the module adds to its input dropped, and not its whole output?
        in_place: of such an insertion, does the module write to its input?
        alone: of a call, does nothing else drop in its module, so that what does later is another way to do
            the same?
        fixes_eval: did the call drop in eval too, and does the graft end that?
        cost: what the graft costs beyond the variant itself.
        strength: the variance of the site's noise before and after, where it is known and changes.
        role: "router" of a product whose result chooses.
        reader: of a weight that is lent, the path of the module that multiplies by it; `holder` leads from
            there to the module that has it, as its `attribute`.
        site: where in a model it is; None of a plan that was read, until it is applied.
    """

    path: str
    paths: list[str]
    kind: str
    op: str
    type: str
    before: str
    after: str
    variant: str
    options: dict[str, Any]
    rule: int
    calls: int | None
    source: str | None
    family: str
    shape: list[int] | None = None
    p: float | None = None
    methods: list[str] = dataclasses.field(default_factory=list)
    node: str = ""
    position: str = ""
    place: str = ""
    field: str = ""
    residual: bool = False
    in_place: bool = False
    alone: bool = False
    fixes_eval: bool = False
    cost: str | None = None
    strength: str | None = None
    role: str = ""
    reader: str = ""
    holder: str = ""
    attribute: str = ""
    site: Site | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The edit as plain values, which nothing else holds."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name != "site"}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "site": None}  # a copy or a pickle of a plan holds no model

    def with_options(self, options: Mapping[str, Any]) -> Edit:
        """The edit with other options of its variant, and `after` to match."""
        return _told(replace(self, options=dict(options)))


@dataclass(frozen=True)
class Skip:
    """One selected site that gets none, why, and what would help."""

    path: str
    paths: list[str]
    kind: str
    op: str
    type: str
    calls: int | None
    source: str | None
    reason: str
    remedy: str
    rule: int


def _edit_of(decision: Decision, callers: Counter[int]) -> Edit:
    site, variant = decision.site, decision.variant
    assert variant is not None
    assert site.family is not None
    edit = Edit(
        **_place(site),
        before=site.written,
        after="",
        variant=variant.name,
        options=dict(variant.options),
        rule=decision.rule,
        family=site.family,
        shape=list(site.shape) if site.shape else None,
        p=None if site.p is None else float(site.p),
        methods=sorted(site.call.methods) if site.call else [],
        **{name: getattr(site, name) for name in ("node", "position", "place", "field")},
        residual=decision.residual,
        in_place=decision.in_place,
        alone=site.kind == "call" and callers[id(site.module)] == 1,
        fixes_eval=(site.draws_in_eval or site.baked is not None) and not acts_in_eval(variant),
        cost=decision.cost,
        role=site.role,
        reader=site.reader,
        holder=site.holder,
        attribute=site.attribute,
        site=site,
    )
    return _told(edit)


def _told(edit: Edit) -> Edit:
    """The edit with what a reader is told of it, which follows from its other fields."""
    return replace(edit, after=rendered(edit), strength=_strength(edit))


def _strength(edit: Edit) -> str | None:
    p = _rate(edit)
    # What a class with a law of its own did before is not known, and alpha dropout is no factor.
    drops = edit.p is not None and edit.op in FAMILIES and "alpha" not in edit.op.lower()
    known = edit.kind == INSERTED or drops
    if edit.family not in NOISE or not known or (p is None and spec(edit.variant).rated):
        return None
    change = strength(edit.p, edit.variant, p, {**spec(edit.variant).defaults, **edit.options})
    return str(change) if change and change.before != change.after else None


def _skip_of(decision: Decision) -> Skip:
    reason = decision.reason or ""
    return Skip(**_place(decision.site), reason=reason, remedy=decision.remedy, rule=decision.rule)


def _place(site: Site) -> dict[str, Any]:
    names = ("path", "kind", "op", "type", "calls", "source")
    return {"paths": list(site.paths), **{name: getattr(site, name) for name in names}}


def plain(view: Any) -> dict[str, Any]:
    """The fields of a plan or a report as plain values, which nothing else holds."""
    # A copy has no sites: see `Edit.__getstate__`.
    return asdict(copy.deepcopy(view), dict_factory=lambda items: {k: v for k, v in items if k != "site"})


def rendered(edit: Edit) -> str:
    """The site after the edit, as a diff shows it: `GaussianDropout(p=0.1)`."""
    noise = _noise(edit)
    if edit.kind != INSERTED:
        return noise
    place = f"{edit.place}({', '.join(map(str, edit.shape))})" if edit.shape else edit.place
    if edit.position == "before":
        return f"{noise}, then {place}"
    return f"{place}, then {noise}" + (" on what it adds" if edit.residual else "")


def _noise(edit: Edit) -> str:
    found, p = spec(edit.variant), _rate(edit)
    if found.name == "off":
        return "nothing"
    called = edit.kind in ("call", "node")
    if edit.kind == "weight":
        options = {key: value for key, value in edit.options.items() if key != "p"}
        inside = written_options(p, {**found.defaults, **options})
        return f"{edit.op}({', '.join(map(str, edit.shape or ()))}) under {found.name}({inside})"
    if found.name == "dropout" and (called or edit.op in FUSED | KEEPS_LAW):
        return edit.op if p is None else f"{edit.op}(p={p:g})"
    title = found.function_for(edit.family) if called else found.module_for(edit.family)
    options = {key: value for key, value in edit.options.items() if key != "p"}
    shape = ", ".join(map(str, edit.shape)) if edit.shape and edit.kind != INSERTED else ""
    inside = ", ".join(filter(None, [shape, written_options(p, {**found.defaults, **options})]))
    return f"{title.__name__}({inside})" if inside or edit.kind == "module" else title.__name__


def _rate(edit: Edit) -> float | None:
    """The rate that the site has after the edit; None where there is none or it is not known."""
    p = edit.options.get("p")
    if not spec(edit.variant).rated:
        return None
    if isinstance(p, (int, float)):
        return p
    unknown = edit.kind in ("call", "node") and edit.p is None
    base = None if unknown else DEFAULT_RATE if edit.p is None else edit.p
    return base if base is None or p is None else base * float(p[1:])


@dataclass(frozen=True, repr=False)
class Plan(View):
    """The edits that a set of rules means for one model, and what is skipped and why: a value.

    Attributes:
        model: the class name of the model it was made for.
        rules: pairs of a selector and a variant, as text.
        grafted: the edits.
        skipped: selected sites that get no variant, with reason and remedy.
        fingerprint: of each selected site, by path, what a model must have there for the plan to fit.
        notes: what a reader should know first.
        probe: how the sites were probed.
        boundaries: modules inside a call site's owner that drop by themselves and are to be left alone.
        balance: how many draws the probe saw, and what becomes of them; how many sites are unconfirmed.
        left: the draws that no variant takes, with module, line and remedy.
    """

    model: str
    rules: list[list[str | None]]
    grafted: list[Edit]
    skipped: list[Skip]
    fingerprint: dict[str, str]
    notes: list[str] = dataclasses.field(default_factory=list)
    probe: dict[str, Any] = dataclasses.field(default_factory=dict)
    boundaries: list[str] = dataclasses.field(default_factory=list)
    balance: dict[str, Any] = dataclasses.field(default_factory=dict)
    left: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values; `Plan.from_json` reads them back."""
        return {"schema": SCHEMA, "view": "plan", **plain(self)}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            FileError: the text is no JSON, no plan, or of a schema that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(f"this is no JSON: {error}", remedy="give what plan.to_json() wrote") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or "fingerprint" not in values:
            found = values.get("schema") if isinstance(values, dict) else None
            raise FileError(
                "this JSON is no plan that this version can read",
                where=f"schema {found!r}, expected {SCHEMA}",
                remedy="give what plan.to_json() wrote",
            )
        known = {one.name for one in dataclasses.fields(cls)}
        try:
            values["grafted"] = [Edit(**edit) for edit in values["grafted"]]
            values["skipped"] = [Skip(**skip) for skip in values["skipped"]]
            plan = cls(**{key: value for key, value in values.items() if key in known})
            raise_all(list(_problems(plan)))
            return replace(plan, grafted=[edit.with_options(edit.options) for edit in plan.grafted])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, RegraftError):
                raise
            raise FileError(f"this JSON is no whole plan: {error}") from None

    def located(self, inspection: Inspection) -> Plan:
        """The plan with the sites of its edits in the model that was inspected.

        A note lists the sites that its rules match in this model and that it does not name.

        Raises:
            MisfitError: every difference between the model and the one the plan was made for.
        """
        actual = fingerprint(inspection, self.fingerprint)
        differ = [
            f"{path or '(the model)'}: the plan has {mark}, this model {actual.get(path) or 'nothing'}"
            for path, mark in self.fingerprint.items()
            if actual.get(path) != mark
        ]
        by_path = {path: named for named in inspection.modules for path in named.paths}
        known = {(one.path, one.kind, one.op): one for one in inspection.sites if one.kind != INSERTED}
        edits = []
        for edit in self.grafted:
            owner = edit.path.removesuffix(edit.node).removesuffix(".") if edit.node else edit.path
            owner = edit.reader if edit.kind == "weight" else owner
            site = known.get((edit.path, edit.kind, edit.op))
            seen_by_probe = edit.kind != "module" or edit.op not in FAMILIES
            if site is None and seen_by_probe and owner in by_path:
                paths = [edit.reader] if edit.kind == "weight" else edit.paths
                site = grafted_site(by_path[owner].module, paths, edit.to_dict())
            if site is not None:
                edits.append(replace(edit, site=site))
            elif actual.get(edit.path) == self.fingerprint.get(edit.path):
                differ.append(f"{edit.path}: the plan has {edit.op}, which this model has not")
        if differ:
            raise MisfitError(
                f"the plan was made for another {self.model}; {len(differ)} sites differ:\n    "
                + "\n    ".join(differ[:20])
                + ("" if len(differ) <= 20 else f"\n    and {len(differ) - 20} more"),
                remedy="make a new one: regraft.plan(model, rules)",
            )
        return replace(self, grafted=edits, notes=[*self.notes, *self._unnamed(inspection)])

    def _unnamed(self, inspection: Inspection) -> list[str]:
        """What the rules match in this model, and no edit, no skip and no other rule speaks of."""
        lines: list[Edit | Skip] = [*self.grafted, *self.skipped]
        named = {path for line in lines for path in line.paths}
        selectors = [(_readable(text), variant) for text, variant in self.rules]
        missed: dict[int, list[str]] = {}
        for site in inspection.sites:
            matching = [i for i, (one, _) in enumerate(selectors) if one is not None and one.matches(site)]
            if site.kind == INSERTED or not matching or not named.isdisjoint(site.paths):
                continue
            name = (selectors[matching[-1]][1] or "").partition("(")[0]
            if name and site.family in spec(name).families:
                missed.setdefault(matching[-1], []).append(site.path)
        return [
            f"{counted(len(paths), 'site')} that {self.rules[rule][0]!r} matches in this model "
            f"{'is' if len(paths) == 1 else 'are'} not in the plan and stay as they are: "
            + ", ".join(paths[:5])
            + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
            for rule, paths in missed.items()
        ]


def _readable(text: str | None) -> Selector | None:
    """The selector that a rule's text stands for; None of a predicate, which has only a name."""
    named = text is None or text.removeprefix("before:").removeprefix("after:").startswith("<")
    return None if named else read_selector(text)


def _problems(plan: Plan) -> Iterator[RegraftError]:
    """What does not go together in a plan that was read, and perhaps edited by hand."""
    for index, edit in enumerate(plan.grafted):
        where = f"grafted[{index}], at {edit.path!r}"
        try:
            _check_edit(edit)
            if not 0 <= edit.rule < len(plan.rules):
                raise FileError(f"there is no rule {edit.rule}", remedy=f"give one of {len(plan.rules)}")
            _check_rule(edit, *plan.rules[edit.rule])
        except RegraftError as error:
            error.where = f"{where}: {error.where}".removesuffix(": ")
            yield error


def _check_edit(edit: Edit) -> None:
    hints = get_type_hints(Edit)
    for name, value in edit.to_dict().items():
        if not _is_a(value, hints[name]):
            raise FileError(f"{name} is {value!r}", remedy=f"it is of type {Edit.__annotations__[name]}")
    found = spec(edit.variant)
    check_options(found, edit.options)
    fits = found.fits(edit.family)
    if edit.kind == INSERTED:
        fits = edit.family == family_to_insert(edit.variant)
        text = f"{edit.position}:{edit.place}" + (f"#{edit.field}" if edit.field else "")
        if edit.position not in ("before", "after") or edit.op != text:
            raise FileError(f"op is {edit.op!r}", remedy=f"its position, place and field say {text!r}")
    elif edit.kind not in ("module", "call", "node", "weight"):
        raise FileError(f"kind is {edit.kind!r}", remedy="'module', 'call', 'node', 'weight' or 'inserted'")
    elif edit.kind == "call" and FAMILIES.get(edit.op) != edit.family:
        raise FileError(f"no call is of op {edit.op!r} and family {edit.family!r}")
    if not fits:
        raise WrongKindError(f"{edit.variant!r} cannot take the place of {edit.op} ({edit.family})")


def _is_a(value: Any, hint: Any) -> bool:
    """Is the value, read from JSON, of the type that an annotation names?"""
    inside, origin = get_args(hint), get_origin(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_a(each, inside[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict)
    if inside:
        return any(_is_a(value, each) for each in inside)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _check_rule(edit: Edit, text: str | None, variant: str | None) -> None:
    """Raise unless an edit is one that its rule can have meant: rules are what a report prints."""
    says = f"rule {edit.rule} says {text!r}: {variant!r}"
    remedy = "edits are what is carried out: change both, or add a rule of its own for this site"
    selector = _readable(text)
    if selector is not None and not selector.path_matches(tuple(edit.paths)):
        raise FileError(f"{says}, which does not mean this path", remedy=remedy)
    if variant is None or variant.partition("(")[0] != edit.variant:
        raise FileError(f"{says}, and the edit {edit.variant!r}", remedy=remedy)
    if "<" in variant:
        return  # a function, of which the text has the name
    for name, value in parse_variant(variant).options.items():
        grows = edit.kind == INSERTED and edit.variant == "droppath"
        relative = name == "p" and (isinstance(value, str) or grows)
        if name not in OF_RULES and not relative and edit.options.get(name) != value:
            raise FileError(f"{says}, and the edit {name}={edit.options.get(name)!r}", remedy=remedy)


def _marked(site: Site) -> str:
    """What a plan has to find again: the site's module, or the weight that is lent."""
    return f"{site.path}.weight" if site.kind == "weight" and site.attribute == "weight" else site.path


def fingerprint(inspection: Inspection, paths: Iterable[str]) -> dict[str, str]:
    """Of each path, what a plan needs to find there again: class, operation and shape.

    Only what can be seen without running the model, so that a plan can be checked in a moment.
    """
    ops = {site.path: site for site in inspection.sites if site.kind == "module"}
    types = {path: original_class(named.module) for named in inspection.modules for path in named.paths}
    nodes = node_marks(inspection.modules)
    weights = {
        f"{path}.{name}".removeprefix("."): f"{types[path].__name__}.{name}{list(weight.shape)}"
        for named in inspection.modules
        for path in named.paths
        for name, weight in named.module._parameters.items()
        if weight is not None and not is_lazy(weight)
    }
    marks = {}
    for path in paths:
        if path in nodes or (path in weights and path not in types):
            marks[path] = nodes.get(path) or weights[path]
            continue
        if path not in types:
            continue
        site = ops.get(path)
        inside = f"/{site.op}{list(site.shape) if site.shape else ''}" if site else ""
        marks[path] = f"{types[path].__name__}{inside}"
    return marks


def plan(model: nn.Module, rules: Rules, inputs: Any = None, *, fused: str = "auto") -> Plan:
    """What a set of rules means for a model, as a value. Changes nothing, not even the random state.

    Args:
        model: any module. If it is grafted already, the plan is made against the original.
        rules: selector -> variant, later ones win; `None` leaves a site alone.
        inputs: for the probe, see `regraft.inspect`.
        fused: what a variant with its own noise does at fused attention: "auto" writes it out unless one
            call's scores would take more than 1 GiB, "write" always does, "keep" skips the site.

    Raises:
        RegraftError: all problems of all rules together (also a ValueError); a single one as itself.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> plan = regraft.plan(net, {"Dropout": "gaussian"})
        >>> [(edit.path, edit.before, edit.after) for edit in plan.grafted]
        [('1', 'Dropout(p=0.1)', 'GaussianDropout(p=0.1)')]
    """
    read = read_rules(rules)
    return plan_of(inspect_flow(model, inputs, dataflow_for(read)), read, fused)


def plan_of(inspection: Inspection, rules: list[Rule], fused: str = "auto") -> Plan:
    """The plan for a model that has been inspected."""
    if fused not in ("auto", "write", "keep"):
        raise OptionError(f"fused={fused!r}", remedy="'auto', 'write' or 'keep'")
    decisions, problems = resolve(inspection, rules, fused)
    raise_all(problems)
    callers = Counter(id(site.module) for site in inspection.sites if site.kind == "call")
    edits = [_edit_of(decision, callers) for decision in decisions if decision.reason is None]
    skips = [_skip_of(decision) for decision in decisions if decision.reason is not None]
    selected = [_marked(decision.site) for decision in sorted(decisions, key=lambda one: one.variant is None)]
    grafted = [decision.site for decision in decisions if decision.reason is None]
    counts, unselected = matrices(
        inspection.weights,
        [site for site in grafted if site.family == "Linear"],
        [decision.site for decision in decisions if decision.site.family == "Linear"],
    )
    return Plan(
        model=type(inspection.root).__name__,
        rules=[
            [rule.selector.text, None if rule.variant is None else str(rule.variant)]
            for rule in rules
            if rule.selector is not None
        ],
        grafted=edits,
        skipped=skips,
        fingerprint=fingerprint(inspection, selected),
        notes=[*inspection.notes, *_notes(edits, skips, decisions), *_unseen(inspection, decisions)],
        probe=inspection.probe.to_dict(),
        boundaries=_boundaries(inspection, edits),
        balance={**balance_of_grafts(inspection.sites, inspection.probe, grafted), **counts},
        left=[*left(inspection.sites, inspection.modules, inspection.probe, grafted), *unselected],
    )


def _boundaries(inspection: Inspection, edits: list[Edit]) -> list[str]:
    """Modules below the owner of a call graft that drop by themselves: its mode must not reach them."""
    owners = {path for edit in edits if edit.kind == "call" for path in edit.paths[:1]}
    return sorted(
        {
            path
            for site in inspection.sites
            for path in [owner_path(site)]
            if site.family in ("Dropout", "DropPath")
            and path not in owners
            and any(not owner or path.startswith(f"{owner}.") for owner in owners)
        }
    )


def _notes(edits: list[Edit], skips: list[Skip], decisions: list[Decision]) -> list[str]:
    at_zero = [decision for decision in decisions if decision.at_zero]
    if not edits and skips and len(at_zero) == len(skips):
        return [
            f"every selected site is at rate 0, so nothing was grafted: {at_zero[0].remedy}, "
            "or build the model with rates above 0"
        ]
    return []


def _unseen(inspection: Inspection, decisions: list[Decision]) -> list[str]:
    """A note where no forward has shown which matrices multiply."""
    about = any(decision.site.family == "Linear" for decision in decisions)
    if not about or inspection.probe.ran:
        return []
    reason = inspection.probe.reason
    return [
        "weights that other modules multiply by (attention projections, experts, recurrent layers) are seen "
        f"only by the probe, which did not run: {reason}"
    ]

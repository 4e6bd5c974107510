"""The document of a view, before it is text, Markdown or HTML: a headline, notes and sections."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, TypeVar

from regraft.errors import RegraftError
from regraft.report.fold import fold, fold_rows, skeleton

Facts = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)
ROOT = "(the model itself)"
"""Printed for the empty path."""
BRACES = re.compile(r"(\{[^{}]*\})")
"""What the renderers set apart in a folded path."""
_NUMBER = re.compile(r"x?[0-9.,]+[kMB]?")
_LAYERS = ("Linear", "Conv1D", "Embedding", "Bilinear")
_EACH = "a rule for each site"
"""In place of the rules of a saved plan, which names each of its sites."""
_VERDICTS = {True: "pass", False: "FAIL", None: "not checked"}
_BALANCE = {
    "grafted": "grafted",
    "sites": "at sites",
    "untouched": "at sites left alone",
    "other": "of other known kinds",
    "unrecognized": "unrecognized",
}


@dataclass(frozen=True)
class Row:
    """One row of a table: sites that read the same and differ in the integers of their paths alone."""

    path: str  # folded; "" for the model itself
    count: int  # sites
    cells: Mapping[str, str]  # by heading; the same headings in every row of a table
    aliases: str  # other names of the same modules, folded


@dataclass(frozen=True)
class Section:
    """A table, or a list of facts, under a title."""

    kind: str  # "change", "skipped", "mended", "left", "keys", "sites", "finding", "check" or "balance"
    title: str  # of a change, the rule
    rows: Sequence[Row] = ()
    text: str = ""  # the reason, the finding
    remedy: str = ""
    before: str = ""  # of a change, as the next two
    after: str = ""
    costs: tuple[str, ...] = ()  # what it costs and how strong it is
    items: tuple[str, ...] = ()  # facts in a list

    @property
    def count(self) -> int:
        """How many sites the rows stand for."""
        return sum(row.count for row in self.rows)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, the path first, without the columns that are empty."""
        heads = ["name" if self.kind == "keys" else "site", "sites", *self.rows[0].cells]
        table = [
            [visible(row.path) or ROOT, f"x{row.count:,}" if row.count > 1 else "", *row.cells.values()]
            for row in self.rows
        ]
        kept = [at for at, column in enumerate(zip(*table, strict=True)) if any(column)]
        return [heads[at] for at in kept], [[visible(line[at]) for at in kept] for line in table]


@dataclass(frozen=True)
class Document:
    """A whole view."""

    headline: str  # the figures, in one phrase
    facts: Sequence[str] = ()  # short phrases on how they were obtained
    notes: Sequence[str] = ()  # what to know first
    answer: str = ""  # of an inspection: does the model regularize?
    paste: str = ""  # a line of code
    sections: Sequence[Section] = ()
    view: str = ""
    model: str = ""


def numeric_columns(table: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column, whether it holds numbers alone; the first holds paths."""
    columns = list(zip(*table, strict=True))[1:]
    return [False, *(all(_NUMBER.fullmatch(cell) for cell in column if cell) for column in columns)]


def visible(text: str) -> str:
    """The text with every character escaped that could command a terminal or reverse the reading order.

    Names come from the model, and a model can come from anyone.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 site`, `26 sites`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def rule_text(selector: object, variant: object) -> str:
    """A rule as Python writes it in a dictionary, in double quotes as the documentation does."""
    written = "None" if variant is None else json.dumps(str(variant), ensure_ascii=False)
    return f"{json.dumps(str(selector), ensure_ascii=False)}: {written}"


def size(parameters: int) -> str:
    """A number of parameters in short: `768`, `590.6k`, `85.6M`, `1.3B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def shape_cell(site: Facts) -> str:
    """The shape of a layer: `768 -> 1000` from in to out, and of a weight `64 x 3, kernel 7x7`."""
    shape = list(map(str, site.get("shape") or ()))
    if site.get("kind") != "weight":
        return " -> ".join(shape)
    if site["op"].startswith("Conv") and len(shape) > 2:
        return f"{' x '.join(shape[:2])}, kernel {'x'.join(shape[2:])}"
    return " x ".join(shape)


def calls_cell(calls: int | None, *, probed: bool = True) -> str:
    """How often a site runs in a forward; nothing where that is once."""
    if calls is None:
        return "not probed" if probed else ""
    return {0: "never runs", 1: ""}.get(calls, f"{calls} calls")


def kind_cell(row: Facts) -> str:
    """The kind of a site, unless it is a module."""
    kind = row.get("kind") or "module"
    return "" if kind == "module" else str(kind)


def grouped(rows: Iterable[Facts], key: Callable[[Facts], Key]) -> dict[Key, list[Facts]]:
    """The rows by their key, in the order of the first of each."""
    groups: dict[Key, list[Facts]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def folded(rows: Sequence[Facts], cells: Callable[[Facts], dict[str, str]] = lambda _: {}) -> list[Row]:
    """The rows of a table: those with the same cells and source are folded where their paths allow it."""

    def all_cells(row: Facts) -> dict[str, str]:
        return {**cells(row), "source": row.get("source") or ""}

    def alike(row: Facts) -> Hashable:
        return tuple(all_cells(row).values()), tuple(map(skeleton, row.get("paths") or ()))

    table = []
    for path, group in fold_rows(rows, path=lambda row: row["path"], alike=alike):
        others = [other for row in group for other in row.get("paths") or () if other != row["path"]]
        table.append(Row(path, len(group), all_cells(group[0]), ", ".join(fold(others))))
    return table


def document_of(view: Facts) -> Document:
    """The document of the dictionary that a view's `to_dict` returns.

    Raises:
        RegraftError: the dictionary is of no known view.
    """
    page = _PAGES.get(view.get("view", ""))
    if page is None:
        raise RegraftError(f"a view of the kind {view.get('view')!r} cannot be shown")
    document = page(view)
    facts, notes = _probe(view.get("probe") or {})
    return replace(
        document,
        view=view["view"],
        model=document.model or view.get("model", ""),
        facts=[*facts, *document.facts],
        notes=[*view.get("notes", []), *notes],
        sections=[*document.sections, *_left_and_balance(view)],
    )


def _probe(probe: Facts) -> tuple[list[str], list[str]]:
    """How the probe ran, as a fact, or why it did not, as a note."""
    if probe.get("ran"):
        how = {"fake tensors": "on fake tensors", "real forward": "by a real forward"}
        seconds = probe.get("seconds")
        took = f" in {seconds:.1f} s" if seconds and seconds >= 0.05 else ""
        return [f"probed {how.get(probe['how'], '')}".strip() + took], []
    if probe.get("reason"):
        return [], [f"not probed, so it is unknown which sites run: {probe['reason']}"]
    return [], []


def _probed(view: Facts) -> bool:
    return bool((view.get("probe") or {}).get("ran"))


def _inspection(view: Facts) -> Document:
    """Does the model regularize, with what, and where?"""
    sites = view.get("sites", [])
    noise, layers = ([site for site in sites if is_layer(site) == layer] for layer in (False, True))
    headline = [counted(len(noise), "regularizer")]
    for op, count in Counter(site["op"] for site in layers).most_common():
        parameters = sum(site.get("parameters") or 0 for site in layers if site["op"] == op)
        headline.append(counted(count, op) + (f" ({size(parameters)} parameters)" if parameters else ""))
    places = {(site["dtype"], site.get("device")) for site in sites if site.get("dtype")}
    facts = [f"{dtype} on {device}" if device else str(dtype) for dtype, device in places]
    said = view.get("summary") or {"answer": answer_of(sites), "paste": ""}
    by_op = grouped([*noise, *layers], lambda site: str(site["op"]))
    return Document(
        ", ".join(headline),
        facts=facts if len(facts) < 2 else ["in several dtypes or on several devices"],
        answer=said["answer"],
        paste=said["paste"],
        sections=[
            *_by_text("finding", view.get("findings", []), "finding"),
            *(_sites_of_one_kind(op, rows, _probed(view)) for op, rows in by_op.items()),
        ],
    )


def is_layer(site: Facts) -> bool:
    """True for a layer with weights, false for a regularizer."""
    return site.get("op") in _LAYERS or bool(site.get("shape"))


def _sites_of_one_kind(op: str, rows: Sequence[Facts], probed: bool) -> Section:
    title = [counted(len(rows), "site")]
    for words, name in (("never run", "calls"), ("at rate 0", "p")):
        if zero := sum(site.get(name) == 0 for site in rows):
            title.append(f"{zero if zero < len(rows) else 'all'} {words}")
    rates = _rate_texts(rows, lambda site: [] if site.get("p") is None else [float(f"{site['p']:.2g}")])

    def cells(site: Facts) -> dict[str, str]:
        return {
            "rate": "".join(rates[id(site)]),
            "shape": shape_cell(site),
            "parameters": size(site["parameters"]) if site.get("parameters") else "",
            "grafted": site.get("variant") or "",
            "kind": kind_cell(site),
            "calls": site.get("note") or calls_cell(site.get("calls"), probed=probed),
        }

    return Section("sites", f"{op}: {', '.join(title)}", folded(rows, cells))


def answer_of(sites: Sequence[Facts], draws: int = 0, unknown: int = 0) -> str:
    """Whether the model regularizes at all.

    That it does not is said only of a training forward that drew nothing, and of a model without `unknown`
    parts, which are no torch layers and may draw where they are told to.
    """
    noise = [site for site in sites if not is_layer(site)]
    grafted = sum(bool(site.get("variant")) for site in noise)
    running = [site for site in noise if site.get("calls") != 0]
    active = [site for site in running if site.get("p")]
    sole = len(noise) == 1
    if grafted:
        verb = "carries" if grafted == 1 else "carry"
        return f"{grafted} of {counted(len(noise), 'dropout site')} {verb} a regraft variant."
    if active:
        rates = sorted({site["p"] for site in active})
        span = f"p = {rates[0]:.2g}" if len(rates) == 1 else f"p = {rates[0]:.2g} to {rates[-1]:.2g}"
        if not any(site.get("calls") for site in active):
            return f"{counted(len(active), 'dropout site')} ({span}); not probed."
        verb = "runs" if len(active) == 1 else "run"
        return (
            f"This model regularizes: {len(active)} of {counted(len(noise), 'dropout site')} {verb}, {span}."
        )
    if draws:
        return f"A training forward draws {counted(draws, 'time')}, at no dropout that regraft knows."
    if unknown:
        return f"No draw was seen; {counted(unknown, 'part')} of the model may draw and cannot be grafted."
    if not noise:
        why = "it has no dropout"
    elif running:
        why = f"{'its only dropout site has' if sole else f'all its {len(noise)} dropout sites have'} rate 0"
    else:
        why = f"{'its only dropout site never' if sole else f'none of its {len(noise)} dropout sites'} runs"
    return f"This model does not regularize: {why}."


def _changes(view: Facts) -> Document:
    """What a plan would change, or a report has changed, as a diff; what is skipped, with the reason."""
    grafted, skipped = view.get("grafted", []), view.get("skipped", [])
    mended, keys = view.get("mended", []), view.get("state_keys", [])
    balance = view.get("balance")
    unconfirmed = balance.get("unconfirmed", 0) if isinstance(balance, Mapping) else 0
    headline = [f"{counted(len(grafted), 'site')} {'to graft' if view['view'] == 'plan' else 'grafted'}"]
    headline += [f"{unconfirmed} of them unconfirmed (give inputs=)"] if unconfirmed else []
    headline += [f"{len(skipped)} skipped", *([f"{len(mended)} mended"] if mended else [])]
    return Document(
        ", ".join(headline),
        facts=["no new state-dict keys"] if view["view"] == "report" and grafted and not keys else [],
        sections=[
            *_change_sections(grafted, view.get("rules", []), _probed(view)),
            *_by_text("skipped", skipped, "reason", "skipped {}"),
            *_by_text("mended", mended, "what", "mended {}"),
            *_names(keys, counted(len(keys), "new key") + " in the state dict"),
        ],
    )


def _change_sections(rows: Sequence[Facts], rules: Sequence[Any] = (), probed: bool = True) -> list[Section]:
    """Rows with `before` and `after`, those alike in one section."""
    rates = _rate_texts(rows, _rates, lambda row: (row.get("rule"), _texts(row, ["#"] * len(_rates(row)))))

    def rule_of(row: Facts) -> str:
        rule = row.get("rule")
        return rule_text(*rules[rule]) if rule is not None and 0 <= rule < len(rules) else ""

    def alike(row: Facts) -> tuple[Any, ...]:
        shared = _EACH if f'@{row["path"]}": ' in (rule := rule_of(row)) else rule
        ranges = any(".." in rate for rate in rates[id(row)])
        return shared, *_texts(row, rates[id(row)]), row.get("cost"), ranges or row.get("strength")

    def cells(row: Facts) -> dict[str, str]:
        return {
            "kind": kind_cell(row),
            "calls": calls_cell(row.get("calls"), probed=probed) if "calls" in row else "",
        }

    sections = []
    for (shared, before, after, cost, _), group in grouped(rows, alike).items():
        title = rule_of(group[0]) if len(group) == 1 else shared
        # Of a range of rates, the strengths at its ends.
        strengths = [row["strength"] for row in (group[0], group[-1]) if row.get("strength")]
        notes = {"cost": cost, "strength": " .. ".join(dict.fromkeys(strengths))}
        costs = tuple(f"{name}: {text}" for name, text in notes.items() if text)
        table = folded(group, cells)
        sections.append(Section("change", title, table, before=before, after=after, costs=costs))
    return sections


def _rates(row: Facts) -> list[float]:
    """The row's own rate and the one that it is given, as far as they are numbers."""
    rates = [row.get("p"), (row.get("options") or {}).get("p")]
    return [rate for rate in rates if isinstance(rate, (int, float))]


def _texts(row: Facts, written: Sequence[str]) -> tuple[str, ...]:
    """Before and after, with the row's rates as `written`."""
    words = {f"{rate:g}": text for rate, text in zip(_rates(row), written, strict=True)}
    sides = row.get("before") or "", row.get("after") or ""
    if not words:
        return sides
    rate = re.compile(rf"\bp=({'|'.join(map(re.escape, words))})(?![0-9.])")
    return tuple(rate.sub(lambda match: f"p={words[match[1]]}", text) for text in sides)


def _rate_texts(
    rows: Sequence[Facts],
    rates_of: Callable[[Facts], Sequence[float]],
    alike: Callable[[Facts], Hashable] = lambda _: None,
) -> dict[int, list[str]]:
    """The rates of each row as text, by the row's id: as a range where they differ at nearly every depth.

    Twelve lines that differ in the rate of DropPath alone say less than `p=0.01..0.1` does.
    """
    texts = {id(row): [f"{rate:g}" for rate in rates_of(row)] for row in rows}
    for group in grouped(rows, lambda row: (skeleton(row["path"]), len(rates_of(row)), alike(row))).values():
        if 2 < (distinct := len({tuple(texts[id(row)]) for row in group})) and 2 * distinct >= len(group):
            ends = [(min(column), max(column)) for column in zip(*map(rates_of, group), strict=True)]
            spans = [f"{low:g}" if low == high else f"{low:.2g}..{high:.2g}" for low, high in ends]
            texts |= dict.fromkeys(map(id, group), spans)
    return texts


def _by_text(
    kind: str, rows: Sequence[Facts], text: str, title: str = "{}", noun: str = "site"
) -> list[Section]:
    """A section for all rows that say the same in `text` and have the same remedy."""

    def count(group: list[Facts]) -> str:
        ops = {row.get("op") or "" for row in group}
        return counted(len(group), noun if len(ops) > 1 else f"{ops.pop()} {noun}".strip())

    def cells(row: Facts) -> dict[str, str]:
        return {"operation": row.get("op") or "", "kind": kind_cell(row)}

    groups = grouped(rows, lambda row: (row.get(text) or "", row.get("remedy") or ""))
    return [
        Section(kind, title.format(count(group)), folded(group, cells), said, remedy)
        for (said, remedy), group in groups.items()
    ]


def _names(names: Sequence[str], title: str) -> list[Section]:
    """Names of tensors or settings."""
    return [Section("keys", title, folded([{"path": name} for name in names]))] if names else []


def _left_and_balance(view: Facts) -> list[Section]:
    """The end of a page: what was left as it is, and whether every draw and product is accounted for."""
    rows = [
        {**row, "path": path, "what": row.get("name") or row["what"], "paths": (), "op": "", "kind": ""}
        for row in view.get("left") or ()
        for path in row.get("paths") or [row.get("path", "")]
    ]
    sections = _by_text("left", rows, "what", "left as it is: {}", "place")
    items = _balance_items(view.get("balance") or {})
    if len(items) == 1:
        sections.append(Section("balance", "balance", text=items[0]))
    elif items:
        sections.append(Section("balance", "balance", items=items))
    return sections


def _balance_items(balance: Mapping[str, Any]) -> tuple[str, ...]:
    """The balance in sentences: of draws, of unconfirmed sites, and whatever else is counted."""
    facts, items = dict(balance), []
    if "draws" in facts:
        parts = [f"{number:,} {words}" for name, words in _BALANCE.items() if (number := facts.pop(name, 0))]
        seen = f"{counted(facts.pop('draws'), 'draw')} seen"
        items.append(f"{seen}: {', '.join(parts)}" if parts else seen)
    if unconfirmed := facts.pop("unconfirmed", 0):
        items.append(f"{counted(unconfirmed, 'site')} unconfirmed: no forward has shown what runs")
    if "matrices" in facts:
        matrices = facts.pop("matrices")
        left = ", ".join(f"{count:,} {kind}" for kind, count in matrices["left"].items())
        what = counted(matrices["multiply"], "matrix that multiplies", "matrices that multiply")
        items.append(f"{what}: {matrices['reached']:,} reached{f'; left: {left}' if left else ''}")
    return (*items, *(f"{name}: {value}" for name, value in facts.items()))


def _difference(view: Facts) -> Document:
    """Two models, site by site and weight by weight."""
    weights, uncompared = view["weights"], view.get("uncompared", [])
    headline = ", ".join(f"{len(view[word])} {word}" for word in ("changed", "added", "removed"))
    if not (view["changed"] or view["added"] or view["removed"] or weights["differ"]):
        headline = "no difference"
        headline += f" in what was compared, {len(uncompared)} not compared" if uncompared else ""
    fact = "weights not compared"
    if weights["compared"] is not None:
        how = "bit for bit" if weights["compared"] == "values" else "in shape"
        fact = f"{counted(weights['same'], 'tensor')} the same {how}, {len(weights['differ'])} not"
    one_sided = [
        Section("sites", f"{word}: {what}", folded(group, lambda row: {"kind": kind_cell(row)}))
        for word, side in (("removed", "before"), ("added", "after"))
        for what, group in grouped(view[word], itemgetter(side)).items()
    ]
    return Document(
        headline,
        model=view["model"] if view["model"] == view["other"] else f"{view['model']} and {view['other']}",
        facts=[fact],
        sections=[
            *_change_sections(view["changed"]),
            *one_sided,
            *_names(weights["differ"], f"{counted(len(weights['differ']), 'tensor')} not the same"),
            *_names(uncompared, f"{counted(len(uncompared), 'setting')} not compared"),
        ],
    )


def _verification(view: Facts) -> Document:
    """The promises, each with its outcome."""
    outcomes = Counter(check["passed"] for check in view["checks"])
    headline = [f"{outcomes[True]} of {counted(len(view['checks']), 'promise')} hold"]
    headline += [f"{outcomes[False]} FAILED"] if outcomes[False] else []
    headline += [f"{outcomes[None]} not checked"] if outcomes[None] else []
    sections = []
    for check in view["checks"]:
        title = f"{_VERDICTS[check['passed']]}: {check['promise']}"
        sections.append(Section("check" if check["passed"] else "finding", title, text=check["said"]))
    rules = ", ".join(rule_text(*rule) for rule in view["rules"])
    return Document(", ".join(headline), facts=[f"with {{{rules}}}"], sections=sections)


def _max_norm(view: Facts) -> Document:
    """Which weights `regraft.max_norm` bounds, and by what."""
    limited, skipped, first = view.get("limited", []), view.get("skipped", []), view.get("first")
    rows, over = (sum(weight[name] for weight in limited) for name in ("rows", "over"))
    facts = [f"{over:,} over their bound when it was set"]
    if first is not None:
        facts.append(f"{first['over']:,} of {first['rows']:,} scaled back at the first step")

    def title(weight: Facts) -> str:
        bound = weight["bound"]
        text = f"{bound.removesuffix('x')} times what it was" if isinstance(bound, str) else f"{bound:g}"
        return f"{weight['op']}: norm at most {text}"

    def cells(weight: Facts) -> dict[str, str]:
        return {"rows": f"{weight['rows']:,}", "over": f"{weight['over']:,}" if weight["over"] else ""}

    bounded = f"{counted(rows, 'row')} of {counted(len(limited), 'weight')} bounded after every step"
    groups = grouped(limited, title)
    return Document(
        f"{bounded}, {len(skipped)} skipped",
        facts=facts,
        sections=[
            *(Section("sites", bound, folded(group, cells)) for bound, group in groups.items()),
            *_by_text("skipped", skipped, "reason", "skipped {}", "weight"),
        ],
    )


def _advice(view: Facts) -> Document:
    """What `regraft.suggest` returns: each suggestion with its reason and its source."""
    advice = view.get("advice", [])
    rules = ", ".join(rule_text(*item["rule"]) for item in advice if item.get("rule"))
    parameters, examples = size(view.get("parameters", 0)), counted(view.get("examples", 0), "example")
    sections = []
    for item in advice:
        title = rule_text(*item["rule"]) if item.get("rule") else str(item.get("code"))
        sections.append(Section("sites", title, text=f"{item['reason']} ({item['source']})"))
    return Document(
        f"{counted(len(advice), 'suggestion')} for a {view.get('kind', 'model')} with {parameters} trainable "
        f"parameters and {examples}",
        facts=["suggestions only, nothing is applied"],
        answer="" if advice else "Nothing that has been published for such a model is missing here.",
        paste=f"regraft.apply(model, {{{rules}}})" if rules else "",
        sections=sections,
    )


_PAGES: dict[str, Callable[[Facts], Document]] = {
    "inspection": _inspection,
    "plan": _changes,
    "report": _changes,
    "max_norm": _max_norm,
    "advice": _advice,
    "diff": _difference,
    "verification": _verification,
}

"""The page of an inspection: does the model regularize, with what, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from regraft.report.document import (
    Document,
    Facts,
    Section,
    calls_cell,
    counted,
    folded,
    grouped,
    kind_cell,
    probe_facts,
    rate_texts,
    size,
)

_LAYERS = ("Linear", "Conv1D", "Embedding", "Bilinear")


def inspection_page(view: Facts) -> Document:
    """The page of an inspection."""
    sites = view.get("sites", [])
    noise = [site for site in sites if not is_layer(site)]
    layers = [site for site in sites if is_layer(site)]
    facts, notes = probe_facts(view)
    said = view.get("summary") or {"answer": answer_of(sites), "paste": ""}
    probed = bool((view.get("probe") or {}).get("ran"))
    return Document(
        view="inspection",
        model=view.get("model", ""),
        headline=_headline(noise, layers),
        facts=[*facts, *_places(sites)],
        notes=[*view.get("notes", []), *notes],
        answer=said["answer"],
        paste=said["paste"],
        sections=[
            *_finding_sections(view.get("findings", [])),
            *(_site_section(op, group, probed) for op, group in grouped([*noise, *layers], _op).items()),
        ],
    )


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


def is_layer(site: Facts) -> bool:
    """True for a layer with weights, false for a regularizer."""
    return site.get("op") in _LAYERS or bool(site.get("shape"))


def _op(site: Facts) -> str:
    return str(site["op"])


def _headline(noise: Sequence[Facts], layers: Sequence[Facts]) -> str:
    parts = [counted(len(noise), "regularizer")]
    for op, count in Counter(map(_op, layers)).most_common():
        parameters = sum(site.get("parameters") or 0 for site in layers if site["op"] == op)
        parts.append(counted(count, op) + (f" ({size(parameters)} parameters)" if parameters else ""))
    return ", ".join(parts)


def _places(sites: Sequence[Facts]) -> list[str]:
    places = {(site.get("dtype"), site.get("device")) for site in sites if site.get("dtype")}
    if len(places) > 1:
        return ["in several dtypes or on several devices"]
    return [f"{dtype} on {device}" if device else str(dtype) for dtype, device in places]


def _site_section(op: str, rows: Sequence[Facts], probed: bool) -> Section:
    never = sum(site.get("calls") == 0 for site in rows)
    zero = sum(site.get("p") == 0 for site in rows)
    said = [counted(len(rows), "site")]
    if never:
        said.append(f"{never} never {'runs' if never == 1 else 'run'}" if never < len(rows) else "never runs")
    if zero:
        said.append("all at rate 0" if zero == len(rows) else f"{zero} at rate 0")
    rates = rate_texts(rows, lambda site: [] if site.get("p") is None else [float(f"{site['p']:.2g}")])

    def cells(site: Facts) -> tuple[str, ...]:
        return (
            *(rates[id(site)] or [""]),
            " -> ".join(map(str, site.get("shape") or ())),
            size(site["parameters"]) if site.get("parameters") else "",
            site.get("variant") or "",
            kind_cell(site),
            site.get("note") or calls_cell(site.get("calls"), probed=probed),
        )

    columns = ("rate", "shape", "parameters", "grafted", "kind", "calls")
    return Section("sites", f"{op}: {', '.join(said)}", len(rows), folded(rows, cells), columns)


def _finding_sections(findings: Sequence[Facts]) -> list[Section]:
    groups = grouped(findings, lambda row: (row["finding"], row.get("remedy") or ""))
    return [
        Section("finding", f"{counted(len(rows), 'site')}", len(rows), folded(rows), (), finding, remedy)
        for (finding, remedy), rows in groups.items()
    ]

"""The page of an inspection: does the model regularize, with what, and where."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from regraft.report.changes import bare_lines, folded_lines, kind_cell
from regraft.report.fold import skeleton
from regraft.report.page import Block, Facts, Line, Page, calls_cell, counted, probe_facts, quoted, size

if TYPE_CHECKING:
    from collections.abc import Sequence

_LAYERS = ("Linear", "Conv1D", "Embedding", "Bilinear")
_ATTENTION = (
    "scaled_dot_product_attention",
    "MultiheadAttention",
    "LSTM",
    "GRU",
    "RNN",
    "Dropout",
    "dropout",
)


def inspection_page(view: Facts) -> Page:
    """The page of an inspection."""
    sites = view.get("sites", [])
    noise = [site for site in sites if not is_layer(site)]
    layers = [site for site in sites if is_layer(site)]
    probed = bool((view.get("probe") or {}).get("ran"))
    facts, notes = probe_facts(view)
    where = _where(sites)
    said = view.get("summary") or summary(sites)
    return Page(
        view="inspection",
        model=view.get("model", ""),
        headline=_headline(noise, layers),
        facts=[*facts, *([where] if where else [])],
        notes=[*view.get("notes", []), *notes],
        answer=said["answer"],
        paste=said["paste"],
        blocks=[*_finding_blocks(view.get("findings", [])), *_site_blocks([*noise, *layers], probed)],
    )


def summary(sites: Sequence[Facts]) -> dict[str, str]:
    """Does the model regularize at all, and a line to paste that changes it."""
    noise = [site for site in sites if not is_layer(site)]
    answer, paste = _answer(noise, [site for site in sites if is_layer(site)])
    return {"answer": answer, "paste": paste}


def is_layer(site: Facts) -> bool:
    """True for a layer with weights, false for a regularizer."""
    return site.get("op") in _LAYERS or bool(site.get("shape"))


def _headline(noise: Sequence[Facts], layers: Sequence[Facts]) -> str:
    parts = [counted(len(noise), "regularizer")]
    for op, count in Counter(site["op"] for site in layers).most_common():
        parameters = sum(site.get("parameters") or 0 for site in layers if site["op"] == op)
        unit = " parameters" if len(parts) == 1 else ""
        parts.append(counted(count, op) + (f" ({size(parameters)}{unit})" if parameters else ""))
    return ", ".join(parts)


def _where(sites: Sequence[Facts]) -> str:
    places = {(site.get("dtype"), site.get("device")) for site in sites if site.get("dtype")}
    if len(places) != 1:
        return "" if not places else "in several dtypes or on several devices"
    dtype, device = places.pop()
    return f"{dtype} on {device}" if device else str(dtype)


def _answer(noise: Sequence[Facts], layers: Sequence[Facts]) -> tuple[str, str]:
    """Does this model regularize at all? And the line that changes it."""
    if not noise:
        last = next(
            (site for site in reversed(layers) if site["op"] == "Linear" and site.get("calls") != 0), None
        )
        paste = _paste(f"Linear@{last['path']}".removesuffix("@"), "dropconnect(p=0.2)") if last else ""
        return "This model does not regularize: it has no dropout that could be switched on.", paste
    alive = [site for site in noise if site.get("calls") != 0]
    on = [site for site in alive if site.get("p")]
    # A line to paste must do something, so it names what is on, if anything is.
    chosen = on or alive or noise
    op = "Dropout" if any(site["op"] in _ATTENTION for site in chosen) else chosen[0]["op"]
    grafted = sum(bool(site.get("variant")) for site in noise)
    if grafted:
        said = f"{counted(grafted, 'site')} of {len(noise)} carry a regraft variant."
        return said, "regraft.revert(model)"
    if not alive:
        said = f"This model does not regularize: none of its {counted(len(noise), 'site')} ever runs."
        return said, ""
    if not on:
        what = f"all of its {counted(len(noise), 'site')} are" if len(noise) > 1 else "its only site is"
        return (
            f"This model does not regularize: {what} at rate 0.",
            _paste(op, "droppath(p=0.1)" if op == "DropPath" else "dropout(p=0.1)"),
        )
    verb = "run" if any(site.get("calls") for site in on) else "may run"
    rates = sorted({site["p"] for site in on})
    span = f"{rates[0]:.2g}" if len(rates) == 1 else f"{rates[0]:.2g} to {rates[-1]:.2g}"
    said = f"This model regularizes: {len(on)} of its {counted(len(noise), 'site')} {verb}, at p = {span}."
    return said, _paste(op, "droppath(p='x2')" if op == "DropPath" else "multisample")


def _paste(selector: str, variant: str) -> str:
    return f"regraft.apply(model, {{{quoted(selector)}: {quoted(variant)}}})"


def _site_blocks(sites: Sequence[Facts], probed: bool) -> list[Block]:
    by_op: dict[str, list[Facts]] = {}
    for site in sites:
        by_op.setdefault(site["op"], []).append(site)
    return [Block("sites", _title(op, rows), len(rows), _lines(rows, probed)) for op, rows in by_op.items()]


def _title(op: str, rows: Sequence[Facts]) -> str:
    never = sum(site.get("calls") == 0 for site in rows)
    zero = sum(site.get("p") == 0 for site in rows)
    said = [counted(len(rows), "site")]
    if never:
        said.append(f"{len(rows) - never} run, {never} never do" if never < len(rows) else "never run")
    if zero:
        said.append("all at rate 0" if zero == len(rows) else f"{zero} at rate 0")
    return f"{op}: {', '.join(said)}"


def _lines(rows: Sequence[Facts], probed: bool) -> list[Line]:
    leads = {id(site): _lead(site, rate) for site, rate in zip(rows, _rates(rows), strict=True)}
    return folded_lines(rows, lambda site: (leads[id(site)], _trail(site, probed)))


def _rates(rows: Sequence[Facts]) -> list[str]:
    """Each row's rate; a range where it differs nearly everywhere, as that of DropPath does."""
    rates = ["" if site.get("p") is None else f"{site['p']:.2g}" for site in rows]
    alike: dict[str, list[int]] = {}
    for index, site in enumerate(rows):
        if rates[index]:
            alike.setdefault(skeleton(site["path"]), []).append(index)
    for members in alike.values():
        distinct = sorted({rates[index] for index in members}, key=float)
        if len(distinct) > 2 and 2 * len(distinct) >= len(members):
            for index in members:
                rates[index] = f"{distinct[0]}..{distinct[-1]}"
    return rates


def _lead(site: Facts, rate: str) -> tuple[str, ...]:
    shape = " -> ".join(map(str, site.get("shape") or ()))
    parameters = size(site["parameters"]) if site.get("parameters") else ""
    return (f"p={rate}" if rate else "", shape, parameters)


def _trail(site: Facts, probed: bool) -> tuple[str, ...]:
    variant = f"= {site['variant']}" if site.get("variant") else ""
    return (variant, kind_cell(site), site.get("note") or calls_cell(site.get("calls"), probed=probed))


def _finding_blocks(findings: Sequence[Facts]) -> list[Block]:
    alike: dict[tuple[str, str], list[Facts]] = {}
    for row in findings:
        alike.setdefault((row["finding"], row.get("remedy") or ""), []).append(row)
    return [
        Block(
            "finding",
            f"found at {counted(len(rows), 'site')}",
            len(rows),
            bare_lines(rows),
            finding,
            remedy=remedy,
        )
        for (finding, remedy), rows in alike.items()
    ]

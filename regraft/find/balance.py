"""The balance: each draw of the probe's forward is at a site, or has a name, or is told as unrecognized."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from regraft.find.probe.ledger import Draw
from regraft.find.probe.run import Probe
from regraft.find.recognize import foreign
from regraft.find.site import Site
from regraft.find.walk import Named
from regraft.ops import FAMILIES, KINDS
from regraft.record import original_class

NOISE = ("Dropout", "DropPath")
Key = tuple[int, str, str]


def with_draws(sites: list[Site], probe: Probe) -> list[Site]:
    """The sites with the number of draws that each one made."""
    keys = {_key(site) for site in sites if site.family in NOISE}
    counts: dict[Key, int] = {}
    for draw in probe.draws:
        key = _key_of(draw, keys)
        if key is not None:
            counts[key] = counts.get(key, 0) + 1
    return [replace(site, draws=counts.get(_key(site), 0)) for site in sites]


def _key(site: Site) -> Key:
    if site.kind == "call" or (site.kind == "node" and site.call is not None):
        return id(site.module), site.op, site.call.node if site.call is not None else ""
    return id(site.module), "", site.path if site.kind == "node" else ""


def _key_of(draw: Draw, keys: Container[Key]) -> Key | None:
    """The site at which a draw was made; None if it is at none."""
    if draw.kind:
        return None
    if draw.call is not None:
        return id(draw.call.owner), draw.call.op, draw.call.node
    key = (id(draw.module), "", "")
    return key if key in keys else None


def is_known(site: Site) -> bool:
    """Whether the law by which the site drops is one that regraft knows."""
    return site.op in FAMILIES


def balance(sites: list[Site], probe: Probe) -> dict[str, int]:
    """How many draws there are, at sites and elsewhere; empty without a probe."""
    if not probe.ran:
        return {}
    at_sites = sum(site.draws for site in sites if is_known(site))
    named = sum(bool(draw.kind) for draw in probe.draws)
    unrecognized = len(probe.draws) - at_sites - named
    return {"draws": len(probe.draws), "sites": at_sites, "other": named, "unrecognized": unrecognized}


def balance_of_grafts(sites: list[Site], probe: Probe, grafted: list[Site]) -> dict[str, int]:
    """What becomes of each draw where `grafted` sites get a variant; `unconfirmed` ones were not probed."""
    unconfirmed = sum(site.calls is None for site in grafted)
    if not probe.ran:
        return {"unconfirmed": unconfirmed}
    whole = balance(sites, probe)
    taken = _taken(sites, grafted)
    at_sites = sum(site.draws for site in taken if is_known(site))
    unnamed = sum(site.draws for site in taken if not is_known(site))
    return {
        "draws": whole["draws"],
        "grafted": at_sites + unnamed,
        "untouched": whole["sites"] - at_sites,
        "other": whole["other"],
        "unrecognized": whole["unrecognized"] - unnamed,
        "unconfirmed": unconfirmed,
    }


def _taken(sites: list[Site], grafted: list[Site]) -> list[Site]:
    """The sites whose draws are a variant's: their own, or that of the whole class around a call."""
    keys = {_key(site) for site in grafted}
    whole = {id(site.module) for site in grafted if is_whole_class(site)}
    return [
        site for site in sites if _key(site) in keys or (site.kind == "call" and id(site.module) in whole)
    ]


def is_whole_class(site: Site) -> bool:
    """Whether a graft there takes the place of the forward of a class with a law of its own."""
    return site.kind == "module" and site.family in NOISE and not is_known(site)


def left(
    sites: list[Site], modules: list[Named], probe: Probe, grafted: list[Site] | None = None
) -> list[dict[str, Any]]:
    """The draws that are at no site, grouped: what they are, where, and what would help.

    With the sites that are `grafted`, also the draws at all others.
    """
    paths = {id(named.module): named.paths[0] for named in modules}
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    untouched = [] if grafted is None else sites
    done = {id(site) for site in _taken(sites, grafted or [])}
    for site in untouched:
        if site.draws and is_known(site) and id(site) not in done:
            selector = KINDS.get(site.op, site.op)
            row = rows.setdefault((site.op,), _row(site.op, site.source, f"a rule for '{selector}'"))
            _add(row, site.path, site.draws)
    for draw in probe.draws:
        if draw.kind:
            remedy = named_remedy(draw.kind)
            row = rows.setdefault((draw.kind, draw.source), _row(draw.kind, draw.source, remedy))
            _add(row, paths[id(draw.module)])
    taken = {id(site.module) for site in grafted or [] if is_whole_class(site)}
    unknown = unrecognized_draws(sites, modules, probe, taken)
    return [*rows.values(), *({k: v for k, v in row.items() if k != "finding"} for row in unknown)]


def unrecognized_draws(
    sites: list[Site], modules: list[Named], probe: Probe, taken: Container[int] = ()
) -> list[dict[str, Any]]:
    """Draws at no site that regraft knows the law of, and of no name; one row for each class and line.

    Those of the modules `taken`, by id, are left out.
    """
    paths = {id(named.module): named.paths[0] for named in modules}
    own = {id(site.module): site for site in sites if site.kind == "module" and site.family in NOISE}
    known = {_key(site) for site in sites if site.family in NOISE and is_known(site)}
    rows: dict[Any, dict[str, Any]] = {}
    for draw in probe.draws:
        if draw.kind or _key_of(draw, known) in known or id(draw.module) in taken:
            continue
        cls = original_class(draw.module).__name__
        remedy = _remedy(draw, own.get(id(draw.module)))
        new = _row(f"{cls}: {_said(draw)}", draw.source, remedy)
        row = rows.setdefault((cls, draw.source, draw.op), new)
        row["finding"] = f"{cls} draws random numbers that are no dropout regraft knows: {_said(draw)}"
        _add(row, paths[id(draw.module)])
    return list(rows.values())


def named_remedy(kind: str) -> str:
    """What to do about randomness that has a name."""
    if kind == "DropBlock":
        return "written as a module without weights it is a site"
    if kind in ("LayerDrop", "SpecAugment", "jitter"):
        return "its rate is a setting of the model's own"
    return "it stays as it is"


def _row(name: str, source: str | None, remedy: str) -> dict[str, Any]:
    return {"what": "draw", "name": name, "count": 0, "paths": [], "source": source or None, "remedy": remedy}


def _add(row: dict[str, Any], path: str, count: int = 1) -> None:
    row["count"] += count
    if path not in row["paths"]:
        row["paths"].append(path)


def _said(draw: Draw) -> str:
    """`bernoulli_ of [1, 8, 16] at p=0.1, on a weight`."""
    text = draw.op + (f" of {list(draw.shape)}" if draw.shape else "")
    text += "" if draw.p is None else f" at p={draw.p:g}"
    return text + (", on a weight" if draw.to_weight else "")


def _remedy(draw: Draw, site: Site | None) -> str:
    if (outside := foreign(draw.module)) is not None:
        return outside[1]
    if site is not None:
        return f"a rule on the class, {{'{site.op}': 'dropout(p=0.1)'}}, replaces its whole forward"
    if draw.to_weight:
        return "it stays as it is; a plain nn.Linear with 'dropconnect' or an nn.Embedding can be grafted"
    if draw.law == "elements" and draw.p is not None:
        return f"write it as F.dropout(x, {draw.p:g}, self.training), and it is a site"
    if not draw.shape:
        return "it stays as it is: drawn from a generator of Python or numpy"
    return "it stays as it is; a module of its own, without weights, could be grafted"

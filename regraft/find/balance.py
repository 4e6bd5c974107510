"""The balance: each draw of the probe's forward is at a site, or has a name, or is told as unrecognized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from regraft.find.probe.ledger import Draw
from regraft.find.probe.run import Probe
from regraft.find.site import Site
from regraft.find.walk import Named
from regraft.ops import FAMILIES
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


def _key_of(draw: Draw, keys: Iterable[Key]) -> Key | None:
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
    """How many draws there are, at sites and elsewhere."""
    at_sites = sum(site.draws for site in sites if is_known(site))
    named = sum(bool(draw.kind) for draw in probe.draws)
    return {
        "draws": len(probe.draws),
        "sites": at_sites,
        "other": named,
        "unrecognized": len(probe.draws) - at_sites - named,
    }


def left(sites: list[Site], modules: list[Named], probe: Probe) -> list[dict[str, Any]]:
    """The draws that are at no site, grouped: what they are, where, and what would help."""
    paths = {id(named.module): named.paths[0] for named in modules}
    rows: dict[str, dict[str, Any]] = {}
    for draw in probe.draws:
        if draw.kind:
            row = rows.setdefault(draw.kind, _row(draw.kind, draw, "set its rate in the model's config"))
            _add(row, paths[id(draw.module)])
    unknown = unrecognized_draws(sites, modules, probe)
    return [*rows.values(), *({k: v for k, v in row.items() if k != "finding"} for row in unknown)]


def unrecognized_draws(sites: list[Site], modules: list[Named], probe: Probe) -> list[dict[str, Any]]:
    """Draws at no site that regraft knows the law of, and of no name; one row for each class and line."""
    paths = {id(named.module): named.paths[0] for named in modules}
    own = {id(site.module): site for site in sites if site.kind == "module" and site.family in NOISE}
    known = {_key(site) for site in sites if site.family in NOISE and is_known(site)}
    rows: dict[Any, dict[str, Any]] = {}
    for draw in probe.draws:
        if draw.kind or _key_of(draw, known) in known:
            continue
        cls = original_class(draw.module).__name__
        site = own.get(id(draw.module))
        row = rows.setdefault(
            (cls, draw.source, draw.op), _row(f"{cls}: {_said(draw)}", draw, _remedy(draw, site))
        )
        row["finding"] = f"{cls} draws random numbers that are no dropout regraft knows: {_said(draw)}"
        _add(row, paths[id(draw.module)])
    return list(rows.values())


def _row(name: str, draw: Draw, remedy: str) -> dict[str, Any]:
    source = draw.source or None
    return {"what": "draw", "name": name, "count": 0, "paths": [], "source": source, "remedy": remedy}


def _add(row: dict[str, Any], path: str) -> None:
    row["count"] += 1
    if path not in row["paths"]:
        row["paths"].append(path)


def _said(draw: Draw) -> str:
    """`bernoulli_ of [1, 8, 16] at p=0.1, on a weight`."""
    text = draw.op + (f" of {list(draw.shape)}" if draw.shape else "")
    text += "" if draw.p is None else f" at p={draw.p:g}"
    return text + (", on a weight" if draw.to_weight else "")


def _remedy(draw: Draw, site: Site | None) -> str:
    if site is not None:
        return f"a rule on the class, {{'{site.type}': 'dropout(p=0.1)'}}, replaces its whole forward"
    if draw.to_weight:
        return "it stays as it is; a plain nn.Linear with 'dropconnect' or an nn.Embedding can be grafted"
    if draw.law == "elements" and draw.p is not None:
        return f"write it as F.dropout(x, {draw.p:g}, self.training), and it is a site"
    if not draw.shape:
        return "it stays as it is: drawn from a generator of Python or numpy"
    return "it stays as it is; a module of its own, without weights, could be grafted"

"""What the probe adds to the sites: how often each one runs, and the calls that are no modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from regraft.find.balance import with_draws
from regraft.find.bytecode_scan import written_calls
from regraft.find.graph_nodes import probed_nodes
from regraft.find.probe.run import Probe
from regraft.find.recognize import op_of, own_name, owner_obstacle
from regraft.find.site import Called, Site
from regraft.find.walk import Named
from regraft.ops import FAMILIES
from regraft.record import grafts_of, original_class


def probed_sites(sites: list[Site], modules: list[Named], probe: Probe) -> list[Site]:
    """The sites with their calls, and the call sites, in the order in which the modules were registered.

    A dead twin (a dropout that is never called, but whose rate a call uses) and that call are one site.
    """
    order = {id(named.module): position for position, named in enumerate(modules)}
    names = {id(named.module): named for named in modules}
    drawn = {(id(called.owner), called.op) for called in probe.eval_called}
    placed: list[tuple[int, Site]] = []
    merged: set[int] = set()
    for called in probe.called:
        if called.node:
            continue
        twins = [
            names[id(twin)]
            for twin in probe.twins.get((id(called.owner), called.op), [])
            if not probe.counts.get(id(twin))
        ]
        merged |= {id(twin.module) for twin in twins}
        first = min(order[id(twin.module)] for twin in twins) if twins else order[id(called.owner)]
        site = _call_site(names[id(called.owner)], called, twins, drew=(id(called.owner), called.op) in drawn)
        users = probe.twins.get((id(called.owner), called.op), [])
        placed.append((first, replace(site, rate_from=tuple(users))))
    placed += [(order[id(site.module)], site) for site in _written_sites(modules, probe)]
    if not probe.ran:
        placed += [(order[id(site.module)], site) for site in sites]
        return [site for _, site in sorted(placed, key=lambda pair: pair[0])]
    placed += [(order[id(site.module)], site) for site in _unnamed_sites(sites, names, probe)]
    nodes = probed_nodes([site for site in sites if site.kind == "node"], modules, probe)
    placed += [(order[id(site.module)], site) for site in nodes]
    for site in sites:
        if site.kind != "node" and id(site.module) not in merged:
            placed.append((order[id(site.module)], _with_calls(site, probe)))
    return with_draws([site for _, site in sorted(placed, key=lambda pair: pair[0])], probe)


def _unnamed_sites(sites: list[Site], names: dict[int, Named], probe: Probe) -> Iterator[Site]:
    """Modules without weights that draw by a law of their own: a rule on the class takes their place."""
    known = {id(site.module) for site in sites}
    drawing = {id(draw.module): draw.module for draw in probe.draws if draw.call is None and not draw.kind}
    for key, module in drawing.items():
        given, returned = probe.flows.get(key, (None, None))
        if key in known or module._modules or module._parameters or given is None or given != returned:
            continue
        cls, named = original_class(module), names[key]
        if cls.__module__.startswith(("torch.nn.", "torch.jit")):
            continue
        graft = grafts_of(module).get("variant")
        yield Site(
            path=named.paths[0],
            paths=tuple(named.paths),
            kind="module",
            op=own_name(cls),
            type=cls.__name__,
            p=None,
            calls=probe.counts.get(key, 0),
            source=None,
            family="Dropout",
            module=module,
            training=module.training,
            variant=graft.edit["after"] if graft else None,
            obstacle=owner_obstacle(module),
        )


def _written_sites(modules: list[Named], probe: Probe) -> Iterator[Site]:
    """Calls that the code of a module names, where the probe has not run the module."""
    for named in modules:
        module = named.module
        if probe.counts.get(id(module)) or op_of(module) in FAMILIES:
            continue
        for op, methods in written_calls(original_class(module)).items():
            site = _call_site(named, Called(module, op, methods=set(methods)), [], drew=False)
            yield replace(site, p=None, calls=0 if probe.covers(module) else None)


def _with_calls(site: Site, probe: Probe) -> Site:
    key = id(site.module)
    if not probe.covers(site.module):
        return site
    drew = any(called.owner is site.module for called in probe.eval_called)
    drew = drew or any(draw.module is site.module for draw in probe.eval_draws)
    calls = probe.counts.get(key, 0)
    site = replace(site, calls=calls, source=probe.lines.get(key) or None, draws_in_eval=drew)
    if calls == 0 and key in probe.read and site.obstacle is None:
        return replace(site, obstacle=_BYPASSED)
    return site


_BYPASSED = (
    "its forward never runs: its parent reads its weight",
    "a module in its place would be bypassed; write the parent with a call of it",
)


def _call_site(owner: Named, called: Called, twins: list[Named], *, drew: bool) -> Site:
    module: nn.Module = owner.module
    graft = grafts_of(module).get(f"calls:{called.op}")
    running = [source for source, rate in zip(called.sources, called.rates, strict=True) if rate != 0]
    return Site(
        path=owner.paths[0],
        paths=(*owner.paths, *(path for twin in twins for path in twin.paths)),
        kind="call",
        op=called.op,
        type=original_class(module).__name__,
        p=called.p,
        calls=len(called.rates),
        source=next(iter(running or called.sources), None) or None,
        family=FAMILIES[called.op],
        module=module,
        training=module.training,
        variant=graft.edit["after"] if graft else None,
        draws_in_eval=drew,
        obstacle=owner_obstacle(module),
        call=called,
    )

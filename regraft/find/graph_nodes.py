"""Node sites: functional dropouts, drop-paths and linears that an `fx.GraphModule` has as graph nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from regraft.find.frames import line_of_trace
from regraft.find.graph_calls import GraphNode, graph_node, graph_nodes
from regraft.find.probe.run import Probe
from regraft.find.recognize import owner_obstacle
from regraft.find.site import Called, Site, site_at
from regraft.find.walk import Named
from regraft.ops import DROP_PATH, FAMILIES, LINEAR
from regraft.record import Graft, grafts_of


def node_sites(modules: list[Named]) -> list[Site]:
    """The nodes of all graphs that drop or are linear, not yet probed."""
    return [
        _site(named, found, found.called.op)
        for named in modules
        for found in graph_nodes(named.module)
        if found.called.op
    ]


def probed_nodes(sites: list[Site], modules: list[Named], probe: Probe) -> list[Site]:
    """The node sites with what the probe saw of them, and the nodes whose function drops inside.

    A node runs once in each forward of its graph.
    """
    seen = {_key(called): called for called in probe.called if called.node}
    drawn = {_key(called) for called in probe.eval_called}
    made = []
    for site in sites:
        called = seen.pop((id(site.module), site.path.rpartition(".")[2], site.op), None)
        made.append(replace(site, calls=probe.counts.get(id(site.module), 0), call=called))
    named = {id(one.module): one for one in modules}
    for key, called in seen.items():
        owner = named[id(called.owner)]
        found = graph_node(owner.module, called.node)
        if found is not None and not found.called.op:
            made.append(_opaque(owner, found, called, drew=key in drawn))
    return made


def _key(called: Called) -> tuple[int, str, str]:
    return id(called.owner), called.node, called.op


def _opaque(owner: Named, found: GraphNode, called: Called, *, drew: bool) -> Site:
    running = [source for source, rate in zip(called.sources, called.rates, strict=True) if rate != 0]
    return replace(
        _site(owner, found, called.op),
        p=called.p,
        calls=len(called.rates),
        source=(running or called.sources)[0],
        draws_in_eval=drew,
        call=called,
    )


def _site(owner: Named, found: GraphNode, op: str) -> Site:
    module = owner.module
    weight = _weight(module, found) if op == LINEAR else None
    graft = node_graft_of(found, op)
    return site_at(
        owner,
        "node",
        op,
        node=found.called.name,
        weight=weight,
        p=found.called.p,
        source=line_of_trace(found.node.stack_trace),
        family=FAMILIES[op],
        shape=None if weight is None else tuple(reversed(weight.shape)),
        variant=None if graft is None else graft.edit["after"],
        draws_in_eval=bool(found.baked) and found.called.p != 0,
        baked=found.baked,
        obstacle=_obstacle(module, found),
    )


def node_path(owner: str, name: str) -> str:
    """The path of a node: its owner's, and its name."""
    return f"{owner}.{name}" if owner else name


def node_graft_of(found: GraphNode, op: str) -> Graft | None:
    """The graft at a node."""
    return None if found.module is None else grafts_of(found.module).get(f"calls:{op}")


def _obstacle(module: nn.Module, found: GraphNode) -> tuple[str, str] | None:
    if not found.node.users:
        return "nothing in the graph uses its result", "use what it returns, or erase the node"
    return owner_obstacle(module)


def _weight(owner: nn.Module, found: GraphNode) -> Tensor | None:
    """The weight of a linear node, where the graph reads it off a module."""
    argument: Any = found.node.args[1] if len(found.node.args) > 1 else found.node.kwargs.get("weight")
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    path, _, name = str(argument.target).rpartition(".")
    tensor = getattr(owner.get_submodule(path), name, None)
    return tensor if isinstance(tensor, Tensor) and tensor.dim() == 2 else None


def node_marks(modules: list[Named]) -> dict[str, str]:
    """Of every node that calls a function, by path, what a plan made for it needs to find again."""
    marks = {}
    for named in modules:
        for found in graph_nodes(named.module):
            weight = _weight(named.module, found) if found.called.op == LINEAR else None
            shape = "" if weight is None else str(list(reversed(weight.shape)))
            for path in named.paths:
                name = getattr(found.called.function, "__name__", "function")
                marks[node_path(path, found.called.name)] = f"node {name}{shape}"
    return marks


def nodes_fixed_by_tracing(modules: list[Named], known: set[str]) -> Iterator[tuple[str, str, str | None]]:
    """Path, fault and line of the nodes, but for the `known`, that do in eval what they do in training."""
    for named in modules:
        if not isinstance(named.module, fx.GraphModule):
            continue
        calls = {one.node: one for one in graph_nodes(named.module)}
        drawn = [one.node.args[1:2] for one in calls.values() if one.called.op == DROP_PATH]
        masks = {argument for args in drawn for argument in args if isinstance(argument, fx.Node)}
        for node in named.module.graph.nodes:
            path = node_path(named.paths[0], node.name)
            found = calls.get(node)
            if path in known or node in masks:
                continue
            name = getattr(node.target, "__name__", str(node.target))
            if name in ("bernoulli", "bernoulli_") and node.op != "call_module":
                yield path, f"{name} draws in eval as in training", line_of_trace(node.stack_trace)
            elif found is not None and found.baked and found.module is None:
                yield path, f"{name} has training=True in eval too", line_of_trace(node.stack_trace)


def owner_path(site: Site) -> str:
    """The path of the module in whose forward a site runs."""
    return site.path.rpartition(".")[0] if site.kind == "node" else site.path

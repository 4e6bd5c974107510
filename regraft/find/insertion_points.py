"""Insertions: places before and after modules, where a model has no regularizer and one can be put."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn.modules.container import ModuleDict, ModuleList, ParameterDict, ParameterList

from regraft.errors import RuleSyntaxError
from regraft.find.graph_calls import graph_nodes, standing_in
from regraft.find.modules import module_sites
from regraft.find.recognize import op_of, own_parameter, owner_obstacle
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site, grafted_site, site_at
from regraft.find.walk import Named
from regraft.record import grafts_of, original_class
from regraft.variants.registry import spec

INSERTED = "inserted"
SLOT = "insert"
_CONTAINERS = (ModuleList, ModuleDict, ParameterList, ParameterDict)


def after(selector: Any, field: str | None = None) -> Selector:
    """A rule's key: put a dropout behind each module that the selector matches, on what it returns.

    Args:
        selector: a string, a class, or a function of a `Site`, as any rule's key; of any module.
        field: which part of an output of several: a name, or a number as text. By default the first
            tensor that is more than a single number.

    Raises:
        RuleSyntaxError: a key that cannot be read.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = regraft.apply(net, {regraft.after(nn.ReLU): "dropout(p=0.5)"})
        >>> [(edit.path, edit.after) for edit in report.grafted]
        [('1', 'ReLU, then Dropout(p=0.5)')]
    """
    return _placed("after", selector, field)


def before(selector: Any, field: str | None = None) -> Selector:
    """A rule's key: put a dropout in front of each module that the selector matches, on its input.

    Args:
        selector: as of `regraft.after`.
        field: which argument of its forward, by name. By default the first tensor.

    Raises:
        RuleSyntaxError: a key that cannot be read.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = regraft.apply(net, {regraft.before("Linear@0"): "dropout(p=0.1)"})
        >>> [(edit.path, edit.after) for edit in report.grafted]
        [('0', 'Dropout(p=0.1), then Linear(4, 8)')]
    """
    return _placed("before", selector, field)


def _placed(position: str, selector: Any, field: str | None) -> Selector:
    found = read_selector(selector)
    if found.position:
        raise RuleSyntaxError(f"{found.text!r} says where already", where=f"regraft.{position}")
    if field is not None and not (isinstance(field, str) and field):
        raise RuleSyntaxError(f"field={field!r} is no name", where=f"regraft.{position}")
    text = f"{position}:{found.text}" + (f"#{field}" if field else "")
    return replace(found, text=text, position=position, field=field or "")


def places(modules: list[Named]) -> list[Site]:
    """A site for each module, named by its operation or else by its class; not probed."""
    return [
        site_at(
            named,
            "module",
            op_of(named.module) or original_class(named.module).__name__,
            weight=own_parameter(named.module, "weight"),
        )
        for named in modules
    ]


def insertable(modules: list[Named]) -> list[Site]:
    """Every module whose forward can be called, and every node that calls a function, as a site."""
    shapes = {id(site.module): site for site in module_sites(modules)}
    found = []
    for place in places(modules):
        if isinstance(place.module, _CONTAINERS) or standing_in(place.module) is not None:
            continue
        known = shapes.get(id(place.module))
        shape, calls = (known.shape, known.calls) if known else (None, None)
        found.append(replace(place, shape=shape, calls=calls, obstacle=owner_obstacle(place.module)))
    for named in modules:
        for one in graph_nodes(named.module):
            op = getattr(one.called.function, "__name__", "function")
            calls = None if one.node.users else 0
            found.append(site_at(named, "node", op, node=one.called.name, calls=calls))
    return found


def means(selector: Selector, place: Site) -> bool:
    """Does the selector mean the place? A function in a graph is meant only where it is named itself.

    Among all that lies on a path there are sizes and indices too, and no dropout fits behind those.
    """
    if place.kind == "node" and selector.any_type:
        return selector.text.endswith(tuple(place.paths)) and selector.means(place)
    return selector.means(place)


def operation(selector: Selector, place: Site) -> str:
    """How an insertion is named: `after:Linear`, `after:LlamaModel#last_hidden_state`."""
    return f"{selector.position}:{place.op}" + (f"#{selector.field}" if selector.field else "")


def only_added(place: Site) -> bool:
    """Whether all that is done with the result of a node is to add it to something else."""
    node = next(one.node for one in graph_nodes(place.module) if one.called.name == place.node)
    return bool(node.users) and all(
        getattr(user.target, "__name__", "") in ("add", "iadd", "add_") for user in node.users
    )


def family_to_insert(variant: str) -> str | None:
    """The family that a variant has where it is inserted; None if it cannot be."""
    if variant in ("off", "droppath"):
        return "DropPath" if variant == "droppath" else None
    families = spec(variant).families
    return next((one for one in ("Dropout", "DropPath") if one in families), None)


def inserted_sites(modules: list[Named]) -> list[Site]:
    """What has been inserted, as sites."""
    sites = []
    for place in places([named for named in modules if grafts_of(named.module)]):
        in_graph = standing_in(place.module) is not None
        for graft in grafts_of(place.module).values():
            if graft.slot.kind == SLOT:
                paths = graft.edit["paths"] if in_graph else place.paths
                sites.append(grafted_site(place.module, paths, graft.edit))
    return sites

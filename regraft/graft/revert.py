"""`regraft.revert`: the way back to a plain model, with its weights as trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from regraft.errors import NoMatchError
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site, grafted_site
from regraft.find.walk import Named, inner_model, named_modules, one_at_a_time
from regraft.graft.calls import BOUNDARY
from regraft.graft.graph_nodes import all_or_nothing, compiled_once, placed_grafts
from regraft.planning.resolve import acts_in_eval
from regraft.record import Graft, Slot, grafts_of
from regraft.variants.spec import Variant


@one_at_a_time
def revert(model: nn.Module, selector: Any = None) -> nn.Module:
    """Undo every graft of a model, in place, and nothing else; returns the model.

    Classes, attributes, hooks and state-dict keys become the original's; weights stay as trained, and
    what was changed since by others (a dtype, a training flag, `weight_norm`, `fully_shard`) stays too.
    A second revert does nothing.

    Args:
        model: a grafted model, or a deep copy of one.
        selector: undo only the grafts at the sites it matches, for example "Linear@head".

    Raises:
        NoMatchError: the selector matches no graft (also a LookupError).
        RevertError: something unknown stands on top of a graft; nothing was changed.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(net, {"Dropout": "gaussian"})
        >>> regraft.revert(net)[1]
        Dropout(p=0.1, inplace=False)
    """
    root, _ = inner_model(model)
    modules = named_modules(root)
    wanted = None if selector is None else read_selector(selector)
    by_path = {path: named.module for named in modules for path in named.paths}
    chosen = [
        (named.module, slot)
        for named, slot, graft in placed_grafts(modules)
        if wanted is None or (graft.edit and wanted.matches(_site(named, graft, by_path)))
    ]
    if wanted is not None:
        if not chosen:
            raise _nothing(modules, wanted)
        chosen += _idle_boundaries(modules, {(id(module), slot) for module, slot in chosen})
    with all_or_nothing() as changes:
        with compiled_once():
            for module, slot in chosen:
                changes.set(module, slot, None)
        return model


def _site(named: Named, graft: Graft, by_path: dict[str, nn.Module]) -> Site:
    """The site of a graft, with the dead twins that it was selected by."""
    others = graft.edit["paths"] if graft.edit["kind"] == "call" else []
    twins = [path for path in others if path in by_path and path not in named.paths]
    site = grafted_site(named.module, [*named.paths, *twins], graft.edit)
    return replace(site, rate_from=tuple(by_path[path] for path in twins))


def _idle_boundaries(modules: list[Named], gone: set[tuple[int, Slot]]) -> list[tuple[nn.Module, Slot]]:
    """Boundaries that nothing needs any more once the grafts `gone` are taken out."""
    left = [
        (named, graft)
        for named, slot, graft in placed_grafts(modules)
        if graft.edit and (id(named.module), slot) not in gone
    ]
    owners = [path for named, graft in left if graft.edit["kind"] == "call" for path in named.paths]
    acting = [path for named, graft in left if _acts_in_eval(graft) for path in named.paths]
    idle = []
    for named in modules:
        graft = grafts_of(named.module).get(str(BOUNDARY))
        if graft is None:
            continue
        inside = any(_within(path, owner) for path in named.paths for owner in owners)
        fast_path = graft.in_eval and any(_within(path, own) for path in acting for own in named.paths)
        if not inside and not fast_path:
            idle.append((named.module, BOUNDARY))
    return idle


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _acts_in_eval(graft: Graft) -> bool:
    return acts_in_eval(Variant(graft.variant, graft.options))


def _nothing(modules: list[Named], selector: Selector) -> NoMatchError:
    paths = list(dict.fromkeys(named.paths[0] for named, _, _ in placed_grafts(modules)))
    listed = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return NoMatchError(
        "the selector matches no graft",
        where=f"{selector.text!r}",
        remedy=f"grafted: {listed}" if paths else "the model has no grafts",
    )

"""`regraft.revert`: the way back to a plain model, with its weights as trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.errors import NoMatchError
from regraft.find.insertion_points import INSERTED, family_to_insert
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import Named, inner_model, named_modules
from regraft.graft.apply import undo
from regraft.graft.calls import BOUNDARY
from regraft.graft.graph_nodes import compiled_once, placed_grafts, set_slot
from regraft.graft.slots import Change
from regraft.planning.resolve import acts_in_eval
from regraft.record import Graft, grafts_of, original_class
from regraft.variants.spec import Variant


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
    wanted = None if selector is None else read_selector(selector)
    chosen = [
        (named.module, slot)
        for named, slot, graft in placed_grafts(named_modules(root))
        if wanted is None or (graft.edit and wanted.matches(_site(named, graft)))
    ]
    if wanted is not None:
        if not chosen:
            raise _nothing(root, wanted)
        chosen += _idle_boundaries(root, {(id(module), slot) for module, slot in chosen})
    changes: list[Change] = []
    try:
        with compiled_once():
            for module, slot in chosen:
                changes.append((module, slot, set_slot(module, slot, None)))
    except BaseException:
        undo(changes)
        raise
    return model


def _idle_boundaries(root: nn.Module, gone: set[tuple[int, str]]) -> list[tuple[nn.Module, str]]:
    """Boundaries that nothing needs any more once the grafts `gone` are taken out."""
    named = named_modules(root)
    left = [
        (one, graft)
        for one, slot, graft in placed_grafts(named)
        if graft.edit and (id(one.module), slot) not in gone
    ]
    owners = [path for one, graft in left if graft.edit["kind"] == "call" for path in one.paths]
    acting = [path for one, graft in left if _acts_in_eval(graft) for path in one.paths]
    idle = []
    for one in named:
        graft = grafts_of(one.module).get(BOUNDARY)
        if graft is None:
            continue
        inside = any(_within(path, owner) for path in one.paths for owner in owners)
        awake = graft.in_eval and any(_within(path, own) for path in acting for own in one.paths)
        if not inside and not awake:
            idle.append((one.module, BOUNDARY))
    return idle


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _acts_in_eval(graft: Graft) -> bool:
    return acts_in_eval(Variant(graft.edit["variant"], graft.edit["options"]))


def _site(named: Named, graft: Graft) -> Site:
    """The site of a graft, as far as a selector asks."""
    edit = graft.edit
    return Site(
        path=named.paths[0],
        paths=tuple(named.paths),
        kind=edit["kind"],
        op=edit["op"],
        type=original_class(named.module).__name__,
        p=edit["options"].get("p"),
        calls=edit["calls"],
        source=edit["source"],
        family=family_to_insert(edit["variant"]) if edit["kind"] == INSERTED else None,
        module=named.module,
        variant=edit["variant"],
    )


def _nothing(root: nn.Module, selector: Selector) -> NoMatchError:
    paths = list(dict.fromkeys(named.paths[0] for named, _, _ in placed_grafts(named_modules(root))))
    listed = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return NoMatchError(
        "the selector matches no graft",
        where=f"{selector.text!r}",
        remedy=f"grafted: {listed}" if paths else "the model has no grafts",
    )

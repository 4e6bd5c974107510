"""`regraft.revert`: the way back to a plain model, with its weights as trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.errors import NoMatchError
from regraft.find.original import Graft, grafts_of, original_class
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import Named, inner_model, named_modules
from regraft.graft.apply import undo
from regraft.graft.change import Change, set_graft


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
        for named in named_modules(root)
        for slot, graft in grafts_of(named.module).items()
        if wanted is None or (graft.edit and wanted.matches(_site(named, graft)))
    ]
    if wanted is not None and not chosen:
        raise _nothing(root, wanted)
    changes: list[Change] = []
    try:
        for module, slot in chosen:
            changes.append((module, slot, set_graft(module, slot, None)))
    except BaseException:
        undo(changes)
        raise
    return model


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
        family=None,
        module=named.module,
        variant=edit["variant"],
    )


def _nothing(root: nn.Module, selector: Selector) -> NoMatchError:
    paths = [named.paths[0] for named in named_modules(root) if grafts_of(named.module)]
    listed = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return NoMatchError(
        "the selector matches no graft",
        where=f"{selector.text!r}",
        remedy=f"grafted: {listed}" if paths else "the model has no grafts",
    )

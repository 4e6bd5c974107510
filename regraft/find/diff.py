"""`regraft.diff`: what differs between two models: grafts, rates, layers, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.find.inspect import look
from regraft.record import grafts_of, original_class
from regraft.report.view import SCHEMA, View

_NOT_RUN = "the models were looked at, not run: a rate that a forward passes to a function is not compared"


@dataclass(frozen=True)
class Side:
    """One of two models: what stands at each path."""

    model: str
    places: dict[tuple[str, str], dict[str, Any]]
    """By path and, where a module has several, what is done there."""
    tensors: dict[str, Tensor] | None = None
    whole: bool = True
    """Does it know every module, or its sites alone?"""


@dataclass(frozen=True, repr=False)
class Difference(View):
    """What differs between two models.

    Attributes:
        model: the class of the first, `other` that of the second.
        changed: places that both have, and what stands there `before` (in the first) and `after`.
        added: places that the second alone has; `removed`: the first alone.
        weights: how many tensors are the `same`, and the keys that `differ`, by value or by shape.
        notes: what a reader should know first.
    """

    model: str
    other: str
    changed: list[dict[str, Any]]
    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    weights: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Is there no difference at all?"""
        return not (self.changed or self.added or self.removed or self.weights["differ"])

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain JSON values."""
        return {"schema": SCHEMA, "view": "diff", **vars(self)}


def diff(a: nn.Module | View, b: nn.Module | View) -> Difference:
    """What differs between two models: grafts, rates, layers, weights. Changes nothing and runs neither.

    Args:
        a: a model, or an inspection of one.
        b: another, or the same model later: `regraft.inspect(model)` keeps how it was.

    Raises:
        ModelError: not a model, nor an inspection (also a TypeError).

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> plain = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> grafted = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> report = regraft.apply(grafted, {"Dropout": "gaussian"})
        >>> [(one["path"], one["before"], one["after"]) for one in regraft.diff(plain, grafted).changed]
        [('1', 'Dropout(p=0.1)', 'GaussianDropout(p=0.1)')]
    """
    first, second = side_of(a), side_of(b)
    whole = first.whole and second.whole
    found: dict[str, list[dict[str, Any]]] = {"changed": [], "added": [], "removed": []}
    for key in {**first.places, **second.places}:
        one, other = first.places.get(key), second.places.get(key)
        place = other or one or {}
        if not whole and not place["site"]:
            continue  # one side knows its sites alone
        before = one["what"] if one else place.get("plain")
        after = other["what"] if other else place.get("plain")
        if before == after:
            continue
        row = {name: place.get(name) for name in ("path", "paths", "kind", "op", "type", "source")}
        kind = "added" if before is None else "removed" if after is None else "changed"
        found[kind].append({**row, "before": before, "after": after})
    return Difference(first.model, second.model, **found, weights=_weights(first, second), notes=[_NOT_RUN])


def side_of(model: Any) -> Side:
    """A model, or an inspection, as one side of a difference.

    Raises:
        ModelError: it is neither (also a TypeError).
    """
    if isinstance(model, Side):
        return model
    if isinstance(model, View):
        facts = model.to_dict()
        root = getattr(model, "root", None)
        if facts.get("view") == "inspection":
            tensors = _tensors(root) if isinstance(root, nn.Module) else None
            return Side(facts["model"], dict(map(_from_site, facts["sites"])), tensors, whole=False)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} cannot be compared",
            remedy="give a model, or what regraft.inspect(model) returned",
        )
    return _from_model(model)


def _from_model(model: nn.Module) -> Side:
    seen = look(model)
    places: dict[tuple[str, str], dict[str, Any]] = {}
    for named in seen.modules:
        path = named.paths[0]
        cls = original_class(named.module).__name__
        places[path, ""] = {
            "path": path,
            "paths": named.paths,
            "kind": "module",
            "op": cls,
            "type": cls,
            "what": cls,
            "site": False,
        }
        for graft in grafts_of(named.module).values():
            if graft.edit and graft.edit["kind"] not in ("module", "node"):
                # What no module stands for: it is seen only where it is grafted.
                places[path, graft.edit["op"]] = {
                    **{name: graft.edit[name] for name in ("kind", "op", "type", "source")},
                    "path": path,
                    "paths": named.paths,
                    "site": True,
                    "what": graft.edit["after"],
                    "plain": graft.edit["before"],
                }
    places |= dict(_from_site(site.to_dict() | {"written": site.written}) for site in seen.sites)
    return Side(type(seen.root).__name__, places, _tensors(seen.root))


def _from_site(site: Mapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    plain = site.get("written") or _written(site)
    place = {name: site.get(name) for name in ("path", "paths", "kind", "op", "type", "source")}
    place |= {"what": site.get("variant") or plain, "site": True}
    if site["kind"] != "module":
        place["plain"] = plain  # a side that was not probed does not know it
    return (site["path"], "" if site["kind"] == "module" else site["op"]), place


def _written(site: Mapping[str, Any]) -> str:
    if site.get("shape"):
        return f"{site['op']}({', '.join(map(str, site['shape']))})"
    return str(site["op"]) if site.get("p") is None else f"{site['op']}(p={site['p']:g})"


def _tensors(root: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in root.state_dict().items() if isinstance(value, Tensor)}


def _weights(first: Side, second: Side) -> dict[str, Any]:
    """Which tensors of the state dicts differ, and how they were compared."""
    if first.tensors is None or second.tensors is None:
        return {"compared": None, "same": 0, "differ": []}
    a, b = first.tensors, second.tensors
    seen = not any(tensor.is_meta for tensor in (*a.values(), *b.values()))
    differ = [key for key in {**a, **b} if key not in a or key not in b or not _alike(a[key], b[key], seen)]
    same = len(a.keys() | b.keys()) - len(differ)
    return {"compared": "values" if seen else "shapes", "same": same, "differ": differ}


def _alike(one: Tensor, other: Tensor, seen: bool) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not seen or one is other:
        return True
    with torch.no_grad():
        return bool(torch.equal(one.cpu(), other.cpu()))

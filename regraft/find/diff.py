"""`regraft.diff`: what differs between two models: grafts, rates, layers, settings, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.find.inspect import look
from regraft.find.settings import is_opaque, settings_of, tensors_of
from regraft.record import grafts_of, original_class
from regraft.report.view import SCHEMA, View

_SITES_ALONE = "an inspection knows its sites alone: nothing else was compared"
_LONGEST = 60
_BY_SHAPE = "tensors on the meta device were compared by shape"


@dataclass(frozen=True)
class Side:
    """One of two models: what stands at each path."""

    model: str
    places: dict[tuple[str, str], dict[str, Any]]
    """By path and, where a module has several, what is done there."""
    tensors: dict[str, Tensor] | None = None
    whole: bool = True
    """Does it know every module with its settings, or its sites alone?"""


@dataclass(frozen=True, repr=False)
class Difference(View):
    """What differs between two models.

    Attributes:
        model: the class of the first, `other` that of the second.
        changed: places that both have, and what stands there `before` (in the first) and `after`.
        added: places that the second alone has; `removed`: the first alone.
        weights: how many tensors are the `same`, and the keys that `differ`, by value or by shape.
        uncompared: what could not be compared: paths with the name of an attribute, or "weights".
        notes: what to know first.
    """

    model: str
    other: str
    changed: list[dict[str, Any]]
    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    weights: dict[str, Any]
    uncompared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool | None:
        """Do both models compute the same? None if no difference was found, and not all was compared."""
        if self.changed or self.added or self.removed or self.weights["differ"]:
            return False
        return None if self.uncompared else True

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain JSON values."""
        return {"schema": SCHEMA, "view": "diff", "same": self.same, **vars(self)}


def diff(a: nn.Module | View, b: nn.Module | View) -> Difference:
    """What differs between two models: grafts, rates, layers, settings, weights. Changes and runs neither.

    Compared is what makes a forward: classes, attributes such as a slope or a stride, hooks, training and
    frozen flags, parameters and buffers. What cannot be compared (an object of unknown content, a tensor on
    the meta device) is listed in `uncompared`, and `same` is then None.

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
        >>> steep = regraft.diff(nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))
        >>> steep.same, steep.changed[0]["after"]
        (False, 'LeakyReLU(negative_slope=0.2)')
    """
    first, second = side_of(a), side_of(b)
    whole = first.whole and second.whole
    rows: dict[str, list[dict[str, Any]]] = {"changed": [], "added": [], "removed": []}
    uncompared: list[str] = []
    for key in {**first.places, **second.places}:
        one, other = first.places.get(key), second.places.get(key)
        place = other or one or {}
        if not whole and not place["site"]:
            continue  # one side knows its sites alone
        before = one["what"] if one else place.get("plain")
        after = other["what"] if other else place.get("plain")
        if one and other and whole:
            differ, unknown = _settings(one.get("settings", {}), other.get("settings", {}))
            uncompared += [f"{place['path']}.{name}".lstrip(".") for name in unknown]
            if before == after and differ:
                before, after = f"{before}({_texts(differ, 0)})", f"{after}({_texts(differ, 1)})"
        if before == after:
            continue
        row = {name: place.get(name) for name in ("path", "paths", "kind", "op", "type", "source", "p")}
        kind = "added" if before is None else "removed" if after is None else "changed"
        rows[kind].append({**row, "before": before, "after": after})
    weights = _weights(first, second)
    if weights["compared"] != "values":
        uncompared.append("weights")
    notes = [] if whole else [_SITES_ALONE]
    notes += [_BY_SHAPE] if weights["compared"] == "shapes" else []
    if not whole:
        uncompared.append("everything but the sites")
    return Difference(first.model, second.model, **rows, weights=weights, uncompared=uncompared, notes=notes)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """The settings that differ, with both values, and the names of those that cannot be compared."""
    differ, unknown = {}, []
    for name in {**a, **b}:
        one, other = a.get(name), b.get(name)
        if one == other:
            continue
        if is_opaque(one) and is_opaque(other):
            unknown.append(name)
        else:
            differ[name] = (one, other)
    return differ, unknown


def _texts(differ: Mapping[str, tuple[Any, Any]], side: int) -> str:
    """The settings that differ, on one side; of a long one, where it differs."""
    texts = []
    for name, values in differ.items():
        written = [repr(value) for value in values]
        same = next((at for at, marks in enumerate(zip(*written, strict=False)) if len(set(marks)) > 1), 0)
        text = written[side]
        if len(text) > _LONGEST:
            start = max(same - _LONGEST // 2, 0)
            text = "..." * bool(start) + text[start : start + _LONGEST] + "..."
        texts.append(f"{name}={text}")
    return ", ".join(texts)


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
            tensors = tensors_of(root) if isinstance(root, nn.Module) else None
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
            "settings": settings_of(named.module),
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
    for site in seen.sites:
        key, place = _from_site(site.to_dict() | {"written": site.written})
        places[key] = {"settings": places.get(key, {}).get("settings", {}), **place}
    return Side(type(seen.root).__name__, places, tensors_of(seen.root))


def _from_site(site: Mapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    plain = site.get("written") or _written(site)
    place = {name: site.get(name) for name in ("path", "paths", "kind", "op", "type", "source", "p")}
    place |= {"what": site.get("variant") or plain, "site": True}
    if site["kind"] != "module":
        place["plain"] = plain  # a side that was not probed does not know it
    return (site["path"], "" if site["kind"] == "module" else site["op"]), place


def _written(site: Mapping[str, Any]) -> str:
    if site.get("shape"):
        return f"{site['op']}({', '.join(map(str, site['shape']))})"
    return str(site["op"]) if site.get("p") is None else f"{site['op']}(p={site['p']:g})"


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

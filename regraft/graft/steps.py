"""The steps of a plan: which graft goes into which slot of which module."""

from __future__ import annotations

from torch import nn

from regraft.find.graph_calls import graph_node
from regraft.find.insertion_points import INSERTED
from regraft.find.inspect import Inspection
from regraft.find.kinds import OPAQUE
from regraft.find.site import Site
from regraft.graft.calls import BOUNDARY, boundary_graft, call_graft
from regraft.graft.compiled_variants import SLOT
from regraft.graft.graph_nodes import node_slot, outside_slot
from regraft.graft.insertions import insert_graft
from regraft.graft.modules import SLOT as VARIANT
from regraft.graft.modules import module_graft, rate_graft
from regraft.planning.edits import Edit
from regraft.planning.plan import Plan
from regraft.planning.resolve import acts_in_eval
from regraft.record import Graft
from regraft.variants.spec import Variant

Step = tuple[nn.Module, str, Graft]
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


def steps_of(inspection: Inspection, plan: Plan) -> list[Step]:
    """The grafts of all edits, then the boundaries that keep them to their own modules."""
    sites = {(site.path, site.kind, site.op): site for site in inspection.sites}
    by_path = {path: named.module for named in inspection.modules for path in named.paths}
    steps = []
    for edit in plan.grafted:
        if edit.kind == "node":
            steps.append((by_path[edit.path.rpartition(".")[0]], *node_slot(edit)))
            continue
        owner, _, name = edit.path.rpartition(".")
        if edit.kind == INSERTED and graph_node(by_path.get(owner, inspection.root), name) is not None:
            slot, graft = insert_graft(edit)
            steps.append((by_path[owner], outside_slot(name, slot), graft))
            continue
        module = by_path[edit.path]
        slot, graft = _slot_and_graft(sites.get((edit.path, edit.kind, edit.op)), edit)
        _settle(graft, edit.path, by_path)
        steps.append((module, slot, graft))
    owners = {id(module) for module, slot, _ in steps if slot.startswith(SLOT)}
    steps += [
        (by_path[path], BOUNDARY, boundary_graft())
        for path in plan.boundaries
        if id(by_path[path]) not in owners
    ]
    return steps + _awake(inspection, plan, by_path)


def _slot_and_graft(site: Site | None, edit: Edit) -> tuple[str, Graft]:
    if edit.kind == INSERTED:
        return insert_graft(edit)
    opaque = edit.op in OPAQUE.values()
    if edit.kind == "call" or (opaque and edit.variant not in ("dropout", "off")):
        return call_graft(edit)
    assert site is not None  # the plan's fingerprint was checked: the module is there
    if opaque:
        return "rate", rate_graft(site, edit)
    return VARIANT, module_graft(site, edit)


def _settle(graft: Graft, path: str, by_path: dict[str, nn.Module]) -> None:
    """Move the state a graft brings to where the model is.

    A dropout has no parameters to tell its device and precision: those of the nearest module around it do.
    """
    if not graft.state:
        return
    around = (p for prefix in reversed(_prefixes(path)) for p in by_path[prefix].parameters())
    like = next((p for p in around if p.is_floating_point()), None)
    if like is None:
        return
    for name, value in graft.state.items():
        moved = value.detach().to(like.device, like.dtype if value.is_floating_point() else None)
        graft.state[name] = nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved


def _awake(inspection: Inspection, plan: Plan, by_path: dict[str, nn.Module]) -> list[Step]:
    """In eval torch's encoder layers skip their children in one fused call: keep them off that path."""
    acting = [edit.path for edit in plan.grafted if acts_in_eval(Variant(edit.variant, edit.options))]
    above = {
        id(by_path[prefix]): by_path[prefix]
        for path in acting
        for prefix in _prefixes(path)
        if isinstance(by_path.get(prefix), _FAST_PATHS)
    }
    return [(module, BOUNDARY, boundary_graft(awake=True)) for module in above.values()]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]

"""Module sites: dropouts, drop-paths, linears and embeddings that are modules of their own."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.parameter import is_lazy

from regraft.find.recognize import family_of, never_runs, obstacle, op_of, quantized, rate_name, weight_of
from regraft.find.site import Site, site_at
from regraft.find.walk import Named
from regraft.record import grafts_of, original_attribute

_SLOTS = (
    "variant",
    "rate",
    *(f"calls:{op}" for op in ("multi_head_attention_forward", "LSTM", "GRU", "RNN")),
)


def module_sites(modules: list[Named]) -> list[Site]:
    """The sites among `modules`, not yet probed."""
    sites = []
    for named in modules:
        op = op_of(named.module) or _packed(named.module)
        if op is not None and not isinstance(named.module, fx.GraphModule):  # its forward is its nodes
            sites.append(_site(named, op))
    return sites


def _packed(module: nn.Module) -> str | None:
    """The operation of a quantized layer with matrices, which are no parameters that a product shows."""
    has_matrices = hasattr(module, "in_features") or hasattr(module, "input_size")
    return "Linear" if has_matrices and quantized(module) is not None else None


def _site(named: Named, op: str) -> Site:
    module = named.module
    family = family_of(module, op)
    rate = rate_name(module) if family in ("Dropout", "DropPath") else None
    weight = weight_of(module) if family in ("Linear", "Embedding") else None
    grafts = grafts_of(module)
    return site_at(
        named,
        "module",
        op,
        weight=weight,
        p=float(original_attribute(module, rate)) if rate else None,
        calls=0 if never_runs(module) else None,
        family=family,
        shape=_shape(module, op),
        parameters=sum(p.numel() for p in module.parameters(recurse=False) if not is_lazy(p)),
        variant=next((grafts[slot].edit["after"] for slot in _SLOTS if slot in grafts), None),
        obstacle=obstacle(module, op),
    )


def _shape(module: nn.Module, op: str) -> tuple[int, ...] | None:
    pairs = {
        "Linear": ("in_features", "out_features"),
        "Embedding": ("num_embeddings", "embedding_dim"),
        "Conv1D": ("nx", "nf"),
    }
    if op not in pairs:
        return None
    return tuple(int(getattr(module, name)) for name in pairs[op] if hasattr(module, name))

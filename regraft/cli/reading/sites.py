"""The sites of a model that was read from a file: what `regraft.find` sees of a module, seen by name.

The rules are those of `regraft.find.recognize`, which asks real classes and so needs torch; a test holds the
two to the same answers.
"""

from __future__ import annotations

import re
from typing import Any

from regraft.cli.reading.model import ReadModel
from regraft.cli.reading.tree import ReadModule

_TORCH = {
    "Dropout": "Dropout",
    "Dropout1d": "Dropout1d",
    "Dropout2d": "Dropout2d",
    "Dropout3d": "Dropout3d",
    "AlphaDropout": "AlphaDropout",
    "FeatureAlphaDropout": "FeatureAlphaDropout",
    "Linear": "Linear",
    "NonDynamicallyQuantizableLinear": "Linear",
    "Embedding": "Embedding",
    "MultiheadAttention": "MultiheadAttention",
    "LSTM": "LSTM",
    "GRU": "GRU",
    "RNN": "RNN",
}
_DROP_PATH = re.compile(r"(DropPath|StochasticDepth)$")
_PRIVATE_DROPOUT = re.compile(r"Dropout(\dd)?$")
_OTHER_NOISE = re.compile(r"Patch|Token|Word|Feature|Channel|Spatial|Block|Variational|Locked|\dd$")
_RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_rate", "prob")
_SHAPES = {
    "Linear": ("in_features", "out_features"),
    "Embedding": ("num_embeddings", "embedding_dim"),
    "Conv1D": ("nx", "nf"),
}


def sites_of(model: ReadModel) -> list[dict[str, Any]]:
    """The sites, as an inspection lists them."""
    found = []
    for module in model.modules:
        op = op_of(module)
        if op is not None:
            found.append(_site(module, op))
        for edit in module.grafts:
            if edit["kind"] != "module" and edit["op"] != op:
                found.append(_grafted_call(module, edit))
    return found


def op_of(module: ReadModule) -> str | None:
    """The operation that makes a module a site, None if it is none."""
    name = module.type
    if module.home.startswith("torch.nn."):
        return _TORCH.get(name)
    if _DROP_PATH.search(name):
        return "DropPath"
    if name == "Conv1D" and (weight := module.tensors.get("weight")) and len(weight.shape) == 2:
        return "Conv1D"
    leaf = not module.children and not module.tensors and rate_of(module) is not None
    if leaf and _PRIVATE_DROPOUT.search(name):
        return name if _OTHER_NOISE.search(name) else "Dropout"
    return None


def rate_of(module: ReadModule) -> float | None:
    """The rate, under any of the names that it goes by."""
    for name in _RATES:
        value = module.attributes.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if -1e9 < value < 1e9 else None  # JSON knows no NaN
    return None


def _site(module: ReadModule, op: str) -> dict[str, Any]:
    weight = module.tensors.get("weight") if op in _SHAPES else None
    sizes = [module.attributes.get(name) for name in _SHAPES.get(op, ())]
    shape = [size for size in sizes if type(size) is int and 0 <= size < 2**50]
    if op == "Conv1D" and weight is not None:
        shape = list(weight.shape)
    return {
        "path": module.paths[0],
        "kind": "module",
        "op": op,
        "type": module.type,
        "p": None if op in _SHAPES else rate_of(module),
        "calls": 0 if module.type == "NonDynamicallyQuantizableLinear" else None,
        "source": None,
        "parameters": sum(tensor.size for tensor in module.tensors.values() if tensor.trainable),
        "device": None,
        "dtype": None if weight is None else weight.dtype,
        "paths": module.paths,
        "shape": shape if op in _SHAPES else None,
        "training": module.training,
        "variant": next((edit["after"] for edit in module.grafts), None),
    }


def _grafted_call(module: ReadModule, edit: dict[str, Any]) -> dict[str, Any]:
    """A place that no module stands for, and that shows itself by its graft."""
    source = edit.get("source")
    return {
        "path": module.paths[0],
        "kind": "call",
        "op": edit["op"],
        "type": module.type,
        "p": None,
        "calls": None,
        "source": source if isinstance(source, str) else None,
        "parameters": 0,
        "device": None,
        "dtype": None,
        "paths": module.paths,
        "shape": None,
        "training": module.training,
        "variant": edit["after"],
        "written": edit["before"],
    }

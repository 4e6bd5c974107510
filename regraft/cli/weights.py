"""A state dict as a skeleton of layers: what names and shapes tell, and no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import FileError

_INSIDE = ("state_dict", "model_state_dict", "model", "module", "ema", "model_ema")


class Weights(nn.Module):
    """Stands for a module of which only weights are known."""


def layers_of_weights(loaded: Any, where: str) -> nn.Module:
    """The Linears and Embeddings that a state dict, or a checkpoint with one inside, must belong to.

    Raises:
        FileError: there are no weights in it.
    """
    state = _state_dict(loaded)
    if not state:
        raise FileError("there are no weights in the file", where=where, remedy="give a state dict")
    root = Weights()
    for path, weight in _weights(state):
        _put(root, path, weight, f"{path}.bias".lstrip(".") in state)
    print(
        f"{where} holds {len(state)} tensors. Dropout cannot be seen in weights: for it, give the "
        "architecture, --arch timm:NAME or --arch hf:FOLDER",
        file=sys.stderr,
    )
    return root


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    for name in _INSIDE:
        if inside := _state_dict(loaded.get(name)):
            return inside
    return {}


def _weights(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        if tensor.dim() == 2 and (key == "weight" or key.endswith(".weight")):
            yield key.removesuffix("weight").removesuffix("."), tensor


def _put(root: nn.Module, path: str, weight: Tensor, bias: bool) -> None:
    *parents, name = (path or "weight").split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, Weights())
        root = root._modules[part] or root
    rows, columns = weight.shape
    with torch.device("meta"):
        embedding = "embed" in name or name in ("wte", "wpe")
        root.add_module(name, nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias))

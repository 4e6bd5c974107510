"""Weights alone: the layers that names and shapes tell of, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from regraft.cli.reading.limits import NAME_LENGTH
from regraft.cli.reading.model import ReadModel
from regraft.cli.reading.tensors import ReadTensor
from regraft.cli.reading.tree import Planted, ReadModule
from regraft.errors import FileError

_EMBEDDINGS = ("embed", "wte", "wpe", "shared", "relative_attention_bias", "tok")
_NORMS = ("norm", "ln_", "bn")


def model_of_weights(path: Path, tensors: Mapping[str, ReadTensor], key: str = "") -> ReadModel:
    """What the weights must belong to: a tree of names, in it the Linears and Embeddings.

    Raises:
        FileError: there are no weights.
    """
    if not tensors:
        raise FileError("there are no weights in the file", remedy="give a state dict")
    tree = Planted(ReadModule("Weights"))
    for name, tensor in tensors.items():
        if len(name) > 8 * NAME_LENGTH:
            raise FileError(f"the name of a tensor is {len(name):,} characters long: {name[:40]!r}...")
        parents, _, own = name.rpartition(".")
        tree.at(parents).tensors[own] = replace(tensor, trainable=True)
    model = ReadModel(
        path, "weights", tree.root, [], key, {name: tensor.shape for name, tensor in tensors.items()}
    )
    for module in model.modules:
        _name_layer(module)
    where = f" under {key!r}" if key else ""
    model.notes.append(
        f"{len(tensors):,} tensors{where}: dropout cannot be seen in weights; for it, give the "
        "architecture, --arch timm:NAME or --arch hf:FOLDER"
    )
    return model


def _name_layer(module: ReadModule) -> None:
    """Say Linear or Embedding, where a name and a shape can mean nothing else."""
    weight = module.tensors.get("weight")
    name = module.paths[0].rpartition(".")[2].casefold()
    if weight is None or len(weight.shape) != 2 or not set(module.tensors) <= {"weight", "bias"}:
        return
    bias = module.tensors.get("bias")
    rows, columns = weight.shape
    embedding = bias is None and any(part in name for part in _EMBEDDINGS) and "proj" not in name
    if embedding:
        module.type, module.home = "Embedding", "torch.nn.modules.sparse"
        module.attributes = {"num_embeddings": rows, "embedding_dim": columns}
    elif bias is not None and bias.shape == (columns,) and rows != columns:
        module.type, module.home = (
            "Conv1D",
            "transformers.pytorch_utils",
        )  # GPT-2 keeps its weights transposed
        module.attributes = {"nx": rows, "nf": columns}
    elif bias is None or bias.shape == (rows,):
        module.type, module.home = "Linear", "torch.nn.modules.linear"
        module.attributes = {"in_features": columns, "out_features": rows}

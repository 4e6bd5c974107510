"""What the values of pickles and the headers of `.safetensors` files say of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.errors import FileError
from regraft.files.skeleton import STEPS, FileModel, FileModule, is_module, module_model, walk
from regraft.files.tensors import FileTensor, is_shape, tensor_of
from regraft.files.unpickler import Budget
from regraft.files.values import Call
from regraft.report.document import visible

_HEADER_BYTES = 64 * 2**20
_SHARDS = 10_000
_NAME_LENGTH = 8_000
_DTYPES = dict(
    pair.split("=")
    for pair in str.split(
        "F64=float64 F32=float32 F16=float16 BF16=bfloat16 BOOL=bool I64=int64 I32=int32 I16=int16 I8=int8 "
        "U8=uint8 F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2"
    )
)
_INSIDE = str.split("ema model_ema state_dict_ema model state_dict model_state_dict module net weights")
"""What checkpoints call their model, the best first."""
_EMBEDDINGS = ("embed", "wte", "wpe", "shared", "relative_attention_bias", "tok")


class NoModelError(FileError):
    """A file that was read to its end and holds no model: an optimizer, arguments, an array."""


def model_of(values: list[Any], budget: Budget) -> FileModel:
    """The model in the values of pickles: a module, a state dict, or a checkpoint that holds one."""
    for value in values:
        if model := _search(value, set(), "", 0, budget):
            return model
    kind = type(values[0]).__name__ if values else ""
    what = f", but a {kind}" if kind in ("list", "dict", "int", "str", "tuple") else ""
    raise NoModelError(
        f"there is no model in the file{what}",
        remedy="give a module, a state dict, or a checkpoint that holds one",
    )


def _search(value: Any, seen: set[int], key: str, depth: int, budget: Budget) -> FileModel | None:
    if is_module(value):
        return module_model(value, key, budget)
    if id(value) in seen:
        return None  # a value can stand in a file a million times
    seen.add(id(value))
    entries = _entries(value)
    if entries is None:
        return None
    tensors = {
        name: tensor
        for name, entry in entries.items()
        if isinstance(name, str) and (tensor := tensor_of(entry))
    }
    if tensors:
        return weights_model(tensors, budget, key)
    for name in [*(name for name in _INSIDE if name in entries), *entries] if depth < 4 else ():
        inside = f"{key}.{name}".lstrip(".")
        if isinstance(name, str) and (model := _search(entries[name], seen, inside, depth + 1, budget)):
            return model
    return None


def _entries(value: Any) -> dict[Any, Any] | None:
    """What a dictionary holds, also one of a class of its own."""
    if isinstance(value, dict):
        return value
    if type(value) is not Call:
        return None
    if value.arguments and isinstance(value.arguments[0], list):
        pairs = value.arguments[0]  # OrderedDict([[key, value], ...]), as Python 2 wrote it
        if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
    if value.entries:
        pairs = [pair for items in value.entries for pair in zip(items[::2], items[1::2], strict=True)]
        return {key: entry for key, entry in pairs if isinstance(key, str)}
    return value.state if isinstance(value.state, dict) else None  # a training state, a dataclass


def weights_model(tensors: Mapping[str, FileTensor], budget: Budget, key: str = "") -> FileModel:
    """What weights must belong to: a tree of names, in it the Linears and Embeddings."""
    if not tensors:
        raise FileError("there are no weights in the file", remedy="give a state dict")
    root = FileModule("Weights")
    for name, tensor in tensors.items():
        if len(name) > _NAME_LENGTH:
            raise FileError(
                f"the name of a tensor is {len(name):,} characters long: {visible(name[:40])!r}..."
            )
        place = root
        *parents, own = name.split(".")
        for part in parents:
            if part not in place.children:
                budget.charge(STEPS)
                place.children[part] = FileModule("Weights")
            place = place.children[part]
        place.tensors[own] = replace(tensor, trainable=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    model = FileModel("weights", root, walk(root, budget), key=key, shapes=shapes)
    for module in model.modules:
        _name_layer(module)
    where = f" under {key!r}" if key else ""
    model.notes.append(
        f"{len(tensors):,} tensors{where}: dropout cannot be seen in weights; for it, give the "
        "architecture, --arch timm:NAME or --arch hf:FOLDER"
    )
    return model


def _name_layer(module: FileModule) -> None:
    """Say Linear or Embedding, where a name and a shape can mean nothing else."""
    weight, bias = module.tensors.get("weight"), module.tensors.get("bias")
    name = module.paths[0].rpartition(".")[2].casefold()
    if weight is None or len(weight.shape) != 2 or not module.tensors.keys() <= {"weight", "bias"}:
        return
    rows, columns = weight.shape
    if bias is None and any(part in name for part in _EMBEDDINGS) and "proj" not in name:
        module.type, module.home = "Embedding", "torch.nn.modules.sparse"
        module.attributes = {"num_embeddings": rows, "embedding_dim": columns}
    elif bias is not None and bias.shape == (columns,) and rows != columns:
        # GPT-2 keeps its weights transposed.
        module.type, module.home = "Conv1D", "transformers.pytorch_utils"
        module.attributes = {"nx": rows, "nf": columns}
    elif bias is None or bias.shape == (rows,):
        module.type, module.home = "Linear", "torch.nn.modules.linear"
        module.attributes = {"in_features": columns, "out_features": rows}


def safetensors_tensors(file: Any, size: int) -> dict[str, FileTensor]:
    """The tensors that the header of a `.safetensors` file names."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_BYTES:
        raise FileError(f"the header claims {length:,} bytes, more than any model's")
    if length + 8 > size or length < 2:
        raise FileError("the file is damaged: it ends within its header")
    tensors = {}
    for name, entry in _table(file.read(length)).items():
        if name == "__metadata__":
            continue
        shape: Any = entry.get("shape") if isinstance(entry, dict) else None
        if not is_shape(shape):
            raise FileError(f"the file is damaged: the tensor {visible(name[:80])!r} has no shape")
        # Without halves of characters, which JSON can name and no terminal takes.
        printable = name.encode("utf-8", "backslashreplace").decode()
        tensors[printable] = FileTensor(tuple(shape), _DTYPES.get(str(entry.get("dtype"))))
    return tensors


def shards_of(path: Path) -> list[Path]:
    """The files that a `.safetensors.index.json` names, all of them in its folder."""
    index = _table(path.read_bytes() if path.stat().st_size <= _HEADER_BYTES else b"")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileError("the index names no weights")
    shards = list(dict.fromkeys(map(str, places.values())))
    if len(shards) > _SHARDS:
        raise FileError(f"the index names {len(shards):,} files")
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise FileError(f"the index leads out of its folder: {visible(shard[:80])!r}")
        if not shard.endswith(".safetensors"):
            raise FileError(f"the index names {visible(shard[:80])!r}, which is no .safetensors file")
        if not (path.parent / shard).is_file():
            raise FileError(f"a shard is missing: {visible(shard[:80])!r}")
    return [path.parent / shard for shard in shards]


def _table(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FileError("the file is damaged: its header is no JSON") from None
    if isinstance(value, dict):
        return value
    raise FileError("the file is damaged: its header is no table")

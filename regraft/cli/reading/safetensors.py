"""`.safetensors` files, alone or in shards: names, shapes and dtypes stand in a header of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.cli.reading.limits import JSON_BYTES, SHARDS, Budget
from regraft.cli.reading.model import ReadModel
from regraft.cli.reading.tensors import ReadTensor
from regraft.cli.reading.values import printable
from regraft.cli.reading.weights import model_of_weights
from regraft.errors import FileError

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MOST = 2**50


def read_safetensors(path: Path) -> ReadModel:
    """The layers that a `.safetensors` file must belong to.

    Raises:
        FileError: the header is damaged or larger than any model's.
    """
    return model_of_weights(path, _tensors(path))


def read_index(path: Path) -> ReadModel:
    """The layers of a checkpoint in shards, from its `.safetensors.index.json`.

    Raises:
        FileError: the index, or a shard of it, is damaged or missing, or leads out of the folder.
    """
    index = _json(path.read_bytes() if path.stat().st_size <= JSON_BYTES else b"", path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileError("the index names no weights")
    shards = list(dict.fromkeys(places.values()))
    if len(shards) > SHARDS:
        raise FileError(f"the index names {len(shards):,} files")
    tensors: dict[str, ReadTensor] = {}
    budget = Budget()
    for shard in shards:
        budget.check()
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise FileError(f"the index leads out of its folder: {str(shard)[:80]!r}")
        if not shard.endswith(".safetensors"):
            raise FileError(f"the index names {shard!r}, which is no .safetensors file")
        if not (path.parent / shard).is_file():
            raise FileError(f"a shard is missing: {shard!r}")
        tensors |= _tensors(path.parent / shard)
    return model_of_weights(path, tensors)


def _tensors(path: Path) -> dict[str, ReadTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > JSON_BYTES:
            raise FileError(f"the header claims {length:,} bytes, more than any model's")
        if length + 8 > size or length < 2:
            raise FileError("the file is damaged: it ends within its header")
        header = _json(file.read(length), path)
    return {
        printable(name): _tensor(printable(name), entry, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FileError("the file is damaged: its header is no JSON") from None
    if not isinstance(value, dict):
        raise FileError("the file is damaged: its header is no table")
    return value


def _tensor(name: str, entry: Any, size: int) -> ReadTensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(one) is int and 0 <= one <= _MOST for one in shape):
        raise FileError(f"the file is damaged: the tensor {name[:80]!r} has no shape")
    return ReadTensor(tuple(shape[:64]), _DTYPES.get(str(entry.get("dtype"))))

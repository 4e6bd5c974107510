"""The tensors that a pickle describes: shape, dtype and which storage, without a number read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from regraft.cli.reading.values import Made, Named, Stored

_DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
}
# Where the functions that rebuild a tensor have its storage, its shape and its dtype.
_LAYOUTS = {
    "torch._utils._rebuild_tensor": (0, 2, None),
    "torch._utils._rebuild_tensor_v2": (0, 2, None),
    "torch._utils._rebuild_tensor_v3": (0, 2, 6),
    "torch._utils._rebuild_qtensor": (0, 2, None),
    "torch._utils._rebuild_meta_tensor_no_storage": (None, 1, 0),
    "torch._utils._rebuild_wrapper_subclass": (None, 2, 1),
}
_WRAPPED = {
    "torch._utils._rebuild_parameter": 0,
    "torch._utils._rebuild_parameter_with_state": 0,
    "torch.nn.parameter.Parameter": 0,
    "torch.nn.parameter.Buffer": 0,
    "torch._tensor._rebuild_from_type": 0,
    "torch._tensor._rebuild_from_type_v2": 0,
}
_DEEPEST = 8
_MOST = 2**50


@dataclass(frozen=True, eq=False)
class ReadTensor:
    """A tensor of a file: everything but its numbers."""

    shape: tuple[int, ...]
    dtype: str | None
    trainable: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_of(value: Any) -> ReadTensor | None:
    """The tensor a value describes, None if it describes none."""
    trainable = False
    for _ in range(_DEEPEST):
        if not isinstance(value, Made) or type(value.arguments) is not tuple:
            return None
        called, arguments = value.callee, value.arguments
        full = called.full if isinstance(called, Named) else ""
        if full in _LAYOUTS:
            return _tensor(arguments, *_LAYOUTS[full], trainable)
        if full.startswith("torch._tensor._rebuild_from_type") and len(arguments) > 2:
            value = Made(arguments[0], arguments[2])
        elif full in _WRAPPED and arguments:
            trainable = trainable or "arameter" in full
            value = arguments[0]
        elif full == "torch.nn.parameter.UninitializedParameter":
            return ReadTensor((), None)
        else:
            return None
    return None


def _tensor(
    arguments: tuple[Any, ...], storage: int | None, shape: int, dtype: int | None, trainable: bool
) -> ReadTensor | None:
    if len(arguments) <= max(storage or 0, shape, dtype or 0):
        return None
    sizes = arguments[shape]
    if isinstance(sizes, Made) and type(sizes.arguments) is tuple and sizes.arguments:
        sizes = sizes.arguments[0]  # torch.Size
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 64:
        return None
    if not all(type(size) is int and 0 <= size <= _MOST for size in sizes) or math.prod(sizes) > _MOST:
        return None
    if dtype is not None:
        name = _dtype(arguments[dtype])
    else:
        name = None if storage is None else _storage_dtype(arguments[storage])
    return ReadTensor(tuple(sizes), name, trainable)


def _dtype(value: Any) -> str | None:
    return value.name if isinstance(value, Named) and value.module == "torch" else None


def _storage_dtype(value: Any) -> str | None:
    """The dtype of a storage: beside the pickle, or, in a plain pickle, within it."""
    if isinstance(value, Stored) and type(value.key) is tuple and len(value.key) > 1:
        kind = value.key[1]
        return _DTYPES.get(kind.name.removesuffix("Storage")) if isinstance(kind, Named) else None
    if isinstance(value, Made) and isinstance(value.state, dict):
        return _dtype(value.state.get("dtype"))
    return None

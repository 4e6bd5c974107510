"""The tensors that a pickle describes: shape, dtype and which storage, without a number read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from regraft.files.values import Call, Name, Storage

_DTYPES = dict(
    pair.split("=")
    for pair in str.split(
        "Float=float32 Double=float64 Half=float16 BFloat16=bfloat16 Bool=bool Long=int64 Int=int32 "
        "Short=int16 Char=int8 Byte=uint8 ComplexFloat=complex64 ComplexDouble=complex128 QInt8=qint8 "
        "QUInt8=quint8 QInt32=qint32"
    )
)
"""What torch calls the storages of a dtype."""
_LAYOUTS: dict[str, tuple[int | None, int, int | None]] = {
    "_rebuild_tensor": (0, 2, None),
    "_rebuild_tensor_v2": (0, 2, None),
    "_rebuild_tensor_v3": (0, 2, 6),
    "_rebuild_qtensor": (0, 2, None),
    "_rebuild_meta_tensor_no_storage": (None, 1, 0),
    "_rebuild_wrapper_subclass": (None, 2, 1),
}
"""Where the functions of `torch._utils` that rebuild a tensor have its storage, its shape and its dtype."""
_WRAPPERS = (
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
)
ARRAY = "joblib.numpy_pickle.NumpyArrayWrapper"
"""Of what joblib describes an array, whose numbers follow at once."""
_DTYPE = re.compile(r"[biufcmMSUV][0-9]{1,9}")
_DEPTH = 8
_ELEMENTS = 2**50


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of a file: everything but its numbers."""

    shape: tuple[int, ...]
    dtype: str | None
    trainable: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_of(value: Any) -> FileTensor | None:
    """The tensor that a value describes, None if it describes none."""
    trainable = False
    for _ in range(_DEPTH):
        if type(value) is not Call:
            return None
        full, arguments = value.callee.full if type(value.callee) is Name else "", value.arguments
        if layout := _LAYOUTS.get(full.removeprefix("torch._utils.")):
            return _tensor(arguments, *layout, trainable)
        if full.startswith("torch._tensor._rebuild_from_type") and len(arguments) > 2:
            value = Call(arguments[0], arguments[2] if type(arguments[2]) is tuple else ())
        elif full in _WRAPPERS and arguments:
            trainable = trainable or "arameter" in full
            value = arguments[0]
        elif full == "torch.nn.parameter.UninitializedParameter":
            return FileTensor((), None)
        else:
            return None
    return None


def is_shape(sizes: Any) -> bool:
    """Is this a list of at most 64 sizes, of a tensor that could be?"""
    return (
        isinstance(sizes, (tuple, list))
        and len(sizes) <= 64
        and all(type(size) is int and 0 <= size <= _ELEMENTS for size in sizes)
        and math.prod(sizes) <= _ELEMENTS
    )


def _tensor(
    arguments: tuple[Any, ...], storage: int | None, shape: int, dtype: int | None, trainable: bool
) -> FileTensor | None:
    if len(arguments) <= max(storage or 0, shape, dtype or 0):
        return None
    sizes = arguments[shape]
    if type(sizes) is Call and sizes.arguments:
        sizes = sizes.arguments[0]  # torch.Size
    if not is_shape(sizes):
        return None
    if dtype is not None:
        return FileTensor(tuple(sizes), _dtype(arguments[dtype]), trainable)
    held = None if storage is None else arguments[storage]
    name = None
    if type(held) is Storage and type(held.key) is tuple and len(held.key) > 1:  # beside the pickle
        cls = held.key[1]
        name = _DTYPES.get(cls.name.removesuffix("Storage")) if type(cls) is Name else None
    elif type(held) is Call and isinstance(held.state, dict):  # within it
        name = _dtype(held.state.get("dtype"))
    return FileTensor(tuple(sizes), name, trainable)


def _dtype(value: Any) -> str | None:
    return value.name if type(value) is Name and value.module == "torch" else None


def array_bytes(state: Any) -> int | None:
    """How many bytes of an array follow its description by joblib, None if a pickle does; else ValueError."""
    facts = state if isinstance(state, dict) else {}
    shape: Any = facts.get("shape")
    dtype: Any = facts.get("dtype")
    made = type(dtype) is Call and type(dtype.callee) is Name and dtype.callee.full == "numpy.dtype"
    code = dtype.arguments[0] if made and dtype.arguments else None
    if not is_shape(shape) or not isinstance(code, str):
        raise ValueError
    if code == "O8":
        return None
    if not _DTYPE.fullmatch(code):
        raise ValueError
    width = int(code[1:]) * (4 if code[0] == "U" else 1)
    if dtype.state is not None:
        _, _, subarray, _, _, size, _, flags, *_ = dtype.state
        if subarray is not None or (code[0] in "SUV" and (size != width or flags & 1)):
            raise ValueError
    return int(width * math.prod(shape))

"""Files of `torch.save` and `pickle`: a module, a state dict, or a checkpoint with one of them inside."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from regraft.cli.reading.archive import Archive, Member
from regraft.cli.reading.follow import read
from regraft.cli.reading.limits import STREAM_BYTES, Budget
from regraft.cli.reading.model import NOT_RUN, ReadModel
from regraft.cli.reading.stream import Stream
from regraft.cli.reading.tensors import ReadTensor, tensor_of
from regraft.cli.reading.tree import is_module, read_tree
from regraft.cli.reading.values import Made, Raw
from regraft.cli.reading.weights import model_of_weights
from regraft.errors import FileError

_MAGIC = 0x1950A86A20F9469CFC6C
"""What `torch.save` wrote first before its files were archives: three short pickles, then the model's."""
_INSIDE = (
    "ema",
    "model_ema",
    "state_dict_ema",
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "net",
    "weights",
)
_PICKLES = 16
_NESTED = 64


def read_zip(path: Path, archive: Archive) -> ReadModel:
    """An archive of `torch.save`.

    Raises:
        FileError: it is damaged, holds no model, or names what no model needs.
    """
    found = archive.members("data.pkl") or archive.members(".pkl")
    if not found:
        raise FileError("the archive holds no PyTorch model", remedy="give a file that torch.save wrote")
    return _model(path, *_read_all(archive, found))


def check_pickles(archive: Archive) -> None:
    """Refuse an archive of another kind that has suspicious pickles in it: torch.load would find them.

    Raises:
        FileError: it has.
    """
    _, alarms, _ = _read_all(archive, archive.members(".pkl"))
    if alarms:
        raise refused(alarms)


def _read_all(archive: Archive, found: list[Member]) -> tuple[list[Any], list[str], FileError | None]:
    """The values of all pickles, their alarms, and the first error."""
    if len(found) > _PICKLES:
        raise FileError(f"the archive holds {len(found):,} pickles, where a model has one")
    budget = Budget()
    values: list[Any] = []
    alarms: list[str] = []
    broken: FileError | None = None
    # Which one of several would be loaded is anyone's guess, so all are read.
    for member in found:
        stream = Stream(archive.read(member, STREAM_BYTES), 0, budget)
        try:
            values.append(read(stream))
        except FileError as error:
            broken = broken or error
        alarms += [f"{what} ({member.name}, byte {at:,})" for at, what in _alarms(stream, budget)]
    return values, alarms, broken


def read_plain(path: Path, file: BinaryIO) -> ReadModel:
    """A file that is one pickle, or several in a row, as `torch.save` wrote them before 1.6.

    Raises:
        FileError: as `read_zip`.
    """
    budget, values, alarms, broken, at = Budget(), [], [], None, 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(_PICKLES):
            stream = Stream(data, at, budget)
            try:
                values.append(read(stream))
            except FileError as error:
                broken = broken or error
            alarms += [f"{what} (byte {place:,})" for place, what in _alarms(stream, budget)]
            at = stream.at
            # magic, version, system; then the model, and the keys of the storages whose numbers follow
            if broken or values[0] != _MAGIC or len(values) == 5:
                break
    old = bool(values) and values[0] == _MAGIC
    return _model(
        path, values[3:4] if old else values[:1], alarms, broken if not old or len(values) < 4 else None
    )


def _alarms(stream: Stream, budget: Budget) -> Iterator[tuple[int, str]]:
    """The alarms of a stream, and of the pickles that stand within it as bytes."""
    yield from stream.alarms.items()
    for raw in stream.inner[:_NESTED]:
        start, end = (raw.start, raw.end) if isinstance(raw, Raw) else (0, 0)
        data = stream.data[start:end] if end else raw if isinstance(raw, bytes) else b""
        at = 0
        for _ in range(5):
            inner = Stream(data, at, budget)
            try:
                read(inner)
            except FileError:
                yield from ((start + place, what) for place, what in inner.alarms.items())
                break
            yield from ((start + place, what) for place, what in inner.alarms.items())
            at = inner.at


def _model(path: Path, values: list[Any], alarms: list[str], broken: FileError | None) -> ReadModel:
    if alarms:
        raise refused(alarms)
    if broken:
        raise broken
    for value in values:
        if found := _found(path, value, set()):
            return found
    kind = type(values[0]).__name__ if values and not isinstance(values[0], Made) else "object"
    raise FileError(
        f"there is no model in the file, but a {kind}" if values else "there is no model in the file",
        remedy="give a module, a state dict, or a checkpoint that holds one",
    )


def refused(alarms: list[str]) -> FileError:
    """The error for a file that names what no model needs."""
    more = f", and {len(alarms) - 5} more" if len(alarms) > 5 else ""
    error = FileError(
        f"suspicious content: loading this file would use {'; '.join(alarms[:5])}{more}",
        remedy="nothing was run; do not load this file with torch.load(weights_only=False) or pickle",
    )
    error.suspicious = True
    return error


def _found(path: Path, value: Any, seen: set[int], key: str = "", deep: int = 0) -> ReadModel | None:
    """The model in a value: the value itself, or what a checkpoint calls its model."""
    if is_module(value):
        return ReadModel(path, "module", read_tree(value), [f"{NOT_RUN}: {_WHY}"], key)
    if id(value) in seen:
        return None  # looked into already: a value can stand in a file a million times
    seen.add(id(value))
    entries = _entries(value)
    if entries is None:
        return None
    tensors = {str(name): tensor for name, tensor in _tensors(entries)}
    if tensors:
        return model_of_weights(path, tensors, key)
    if deep < 4:
        for name in [*(one for one in _INSIDE if one in entries), *entries]:
            inside = f"{key}.{name}".lstrip(".")
            if isinstance(name, str) and (found := _found(path, entries[name], seen, inside, deep + 1)):
                return found
    return None


_WHY = "which sites run is not known, and a class is known by its name alone (--trust loads and probes it)"


def _entries(value: Any) -> dict[Any, Any] | None:
    """What a dictionary holds, also one of a class of its own."""
    if type(value) is dict:
        return value
    if isinstance(value, Made):
        if type(value.arguments) is tuple and value.arguments and isinstance(value.arguments[0], list):
            pairs = value.arguments[0]  # OrderedDict([[key, value], ...]), as Python 2 wrote it
            if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
        if value.entries:
            return {
                items[i]: items[i + 1]
                for items in value.entries
                for i in range(0, len(items) - 1, 2)
                if isinstance(items[i], str)
            }
        if isinstance(value.state, dict) and not is_module(value):
            return value.state  # a training state, a dataclass
    return None


def _tensors(entries: dict[Any, Any]) -> Iterator[tuple[str, ReadTensor]]:
    for name, value in entries.items():
        if isinstance(name, str) and (tensor := tensor_of(value)):
            yield name, tensor

"""Which kind of file it is, by what is in it and not by its ending, and what it holds."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import FileError
from regraft.files.archive import AmbiguousError, Archive, is_archive_too
from regraft.files.formats import NoModelError, model_of, safetensors_tensors, shards_of, weights_model
from regraft.files.skeleton import FileModel
from regraft.files.unpickler import Budget, InertUnpickler
from regraft.files.verdicts import Verdicts
from regraft.report.document import visible

_MAGIC = 0x1950A86A20F9469CFC6C
"""What `torch.save` wrote first before its files were archives: three short pickles, then the model's."""
_UNPACK, _EXPORT = "unpack it first", "graft the PyTorch model, then export it"
_OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    b"GGUF": ("a GGUF file of llama.cpp", "graft the model that it came from, then convert it again"),
    b"\x89HDF\r\n": ("an HDF5 file, as Keras writes them", "graft the PyTorch model, if there is one"),
    b"\x1f\x8b": ("compressed by gzip", _UNPACK),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed by xz", _UNPACK),
    **dict.fromkeys((b"x\x01", b"x^", b"x\x9c", b"x\xda"), ("compressed by zlib", _UNPACK)),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    **dict.fromkeys((b"<!DOCTYPE", b"<html"), ("a web page", "the download went wrong: fetch it again")),
    b"<?xml": ("XML", ""),
    b"#!": ("a script", ""),
    **dict.fromkeys((b"\x7fELF", b"MZ"), ("a program", "")),
    **dict.fromkeys((b"\x08\x07", b"\x08\x08", b"\x08\x09", b"\x08\x0a"), ("an ONNX file", _EXPORT)),
}
_PROGRAM = ("a program of torch.export", "graft the Python model, then export it")
_ARCHIVES = {
    "/constants.pkl": ("compiled TorchScript", "graft the Python model, then script or trace it"),
    **dict.fromkeys(("models/model.json", "serialized_exported_program.json", "archive_format"), _PROGRAM),
    "model.weights.h5": ("a Keras model", "graft the PyTorch model, if there is one"),
}
_GIVE = "give a .pt, .pth, .bin or .safetensors file, or a folder with a config.json"
_INDEX = ".safetensors.index.json"
_MODEL_ENDINGS = (_INDEX, *str.split(".pt .pth .bin .ckpt .th .pkl .pickle .joblib .npy .npz .safetensors"))
_PICKLES = 16
_NESTED = 4
_FILES = 10_000
_HASHED_BYTES = 2**29
_BEST = (_INDEX, ".safetensors", "pytorch_model.bin", ".bin", ".pt", ".pth")


@dataclass(eq=False)
class FileReport:
    """What is known of a file: the verdicts on its names, the model in it, or why there is none."""

    path: Path
    verdicts: Verdicts
    model: FileModel | None = None
    error: FileError | None = None

    @property
    def failed(self) -> bool:
        """Could a file of models not be read to its end?"""
        return self.error is not None and not (self.other or isinstance(self.error, NoModelError))

    @property
    def other(self) -> bool:
        """Is this a file of another kind (a README, a tokenizer), with nothing in it to be judged?"""
        clean = not (self.verdicts.dangerous or self.verdicts.unknown)
        return self.error is not None and clean and not self.path.name.endswith(_MODEL_ENDINGS)


def read(path: Path, allow: Sequence[str] = ()) -> FileReport:
    """What a file holds, with nothing of it run."""
    report = FileReport(path, Verdicts(allow))
    was_on = gc.isenabled()
    gc.disable()  # nothing that is read is a cycle worth finding, and there may be millions of objects
    try:
        report.model = _read(path, report.verdicts)
        report.model.path = path
    except AmbiguousError as error:
        report.error = error
        report.verdicts.dangerous.append(error.what)
    except FileError as error:
        report.error = error
        error.where = error.where or str(path)
        error.remedy = error.remedy or _GIVE
    except OSError as error:
        report.error = FileError(f"the file cannot be read: {error.strerror or error}", where=str(path))
    except MemoryError:
        report.error = FileError("there is not enough memory to read the file", where=str(path))
    finally:
        if was_on:
            gc.enable()
    return report


def read_folder(folder: Path, allow: Sequence[str] = ()) -> list[FileReport]:
    """All files of a folder and below it, that of its model first; links to folders are not followed."""
    paths = [Path(place, name) for place, folders, names in os.walk(folder) for name in [*folders, *names]]
    paths = [path for path in paths if path.is_symlink() or not path.is_dir()]
    if len(paths) > _FILES:
        raise FileError(f"the folder holds more than {_FILES:,} files", where=str(folder))

    def rank(report: FileReport) -> tuple[bool, int, int]:
        best = [at for at, ending in enumerate(_BEST) if report.path.name.endswith(ending)]
        return report.model is None, len(report.path.parts), min(best, default=len(_BEST))

    return sorted([read(path, allow) for path in sorted(paths)], key=rank)


def sha256(path: Path) -> str:
    """The checksum of a file of up to 512 MB, else an empty text."""
    if not path.is_file() or path.stat().st_size > _HASHED_BYTES:
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path, verdicts: Verdicts) -> FileModel:
    if path.is_dir():
        raise FileError("this is a link to a folder, which is not followed")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileError("this is no file but a device, a pipe or a socket")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        if not start:
            raise FileError("the file is empty")
        budget = Budget(size)
        if path.name.endswith(_INDEX):
            return _read_shards(path, budget)
        values, broken = _pickles(file, size, budget, verdicts, "", 0)
        if not start.startswith(b"PK"):
            if is_archive_too(file):
                raise AmbiguousError("it is a pickle, or something else, and an archive at once")
            _name_others(start, file, broken)
        named = path.suffix == ".safetensors" and not start.startswith(b"\x80")
        if broken and (start[8:9] == b"{" or named):
            return weights_model(safetensors_tensors(file, size), budget)
    if broken:
        raise broken
    return model_of(values, budget)


def _read_shards(path: Path, budget: Budget) -> FileModel:
    tensors = {}
    for shard in shards_of(path):
        with shard.open("rb") as file:
            tensors.update(safetensors_tensors(file, os.fstat(file.fileno()).st_size))
        budget.left += shard.stat().st_size // 1_000
        budget.charge(1_000)
    return weights_model(tensors, budget)


def _pickles(
    file: Any, size: int, budget: Budget, verdicts: Verdicts, place: str, depth: int
) -> tuple[list[Any], FileError | None]:
    """The values of all pickles that loading the file would read, and the first error."""
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return _archived(Archive(file, size), budget, verdicts, place, depth)
    if start.startswith(b"\x93NUMPY"):
        width = 2 if start[6:7] == b"\1" else 4
        file.seek(8)
        header = file.read(min(int.from_bytes(file.read(width), "little"), 2**16))
        if b"O" not in header:
            return [], NoModelError("the file is an array of NumPy, no model")
    values: list[Any] = []
    while len(values) < _PICKLES and (not values or file.tell() < size):
        verdicts.where = lambda: f"{place}byte {file.tell():,}"
        try:
            values.append(_load(file, size, budget, verdicts))
        except FileError as error:
            broken = not values or (values[0] == _MAGIC and len(values) < 4)
            _read_nested(budget, verdicts, place, depth)
            budget.charge(0)  # what is behind the end of the first pickle may be damaged, but not unread
            return values, error if broken else None
        here = file.tell()
        _read_nested(budget, verdicts, place, depth)
        file.seek(here)
        if type(values[0]) is int and values[0] == _MAGIC and len(values) == 5:
            # magic, version, system; the model; the keys of the storages, whose numbers follow
            return values[3:4], None
    return values[:1], None


def _load(file: Any, size: int, budget: Budget, verdicts: Verdicts) -> Any:
    """One pickle, as joblib reads it; if it holds arrays of joblib's, also as everyone else does."""
    start = file.tell()
    try:
        return InertUnpickler(file, size, budget, verdicts).load()
    finally:
        if verdicts.has_arrays:
            end, plain = file.tell(), Verdicts(verdicts.allow)
            plain.where, verdicts.has_arrays = verdicts.where, False
            file.seek(start)
            with suppress(FileError):
                InertUnpickler(file, size, budget, plain, arrays=False).load()
            file.seek(end)
            verdicts.unknown |= plain.unknown
            verdicts.dangerous += [what for what in plain.dangerous if what not in verdicts.dangerous]
            verdicts.nested = {**plain.nested, **verdicts.nested}


def _read_nested(budget: Budget, verdicts: Verdicts, place: str, depth: int) -> None:
    """Read the files that loading would load on its way: `torch.load` of bytes within the pickle."""
    waiting = [content for content, read in verdicts.nested.items() if not read]
    verdicts.nested.update(dict.fromkeys(waiting, True))
    for content in waiting:
        if depth == _NESTED:
            verdicts.danger(f"files stand within files, more than {_NESTED} deep")
            return
        budget.charge(50)
        data = content if isinstance(content, bytes) else content.read()
        try:
            _pickles(io.BytesIO(data), len(data), budget, verdicts, f"{place}within it, ", depth + 1)
        except AmbiguousError as error:
            verdicts.danger(error.what)
        budget.charge(0)


def _archived(
    archive: Archive, budget: Budget, verdicts: Verdicts, place: str, depth: int
) -> tuple[list[Any], FileError | None]:
    """Which one of several pickles would be loaded is anyone's guess, so all are read."""
    most = min(2**28, 20 * archive.size + 2**20)
    values: list[Any] = []
    broken: FileError | None = None
    members = [*archive.named(".pkl"), *archive.named(".npy")]
    if len(members) > _PICKLES and members[_PICKLES].orig_filename.lower().endswith(".pkl"):
        raise FileError(f"the archive holds {len(members):,} pickles, where a model has one")
    for member in sorted(members, key=lambda member: not member.orig_filename.lower().endswith("/data.pkl")):
        budget.charge(200)
        data = archive.read(member, most)
        inside = f"{place}{visible(member.orig_filename)}, "
        found, error = _pickles(io.BytesIO(data), len(data), budget, verdicts, inside, depth)
        broken = broken or error
        values += found
    for ending, (what, remedy) in _ARCHIVES.items():
        if any(f"/{member.orig_filename}".endswith(ending) for member in archive.members):
            return [], FileError(f"the file is {what}, in which no graft takes effect", remedy=remedy)
    if not members:
        broken = FileError("the archive holds no PyTorch model", remedy="give a file that torch.save wrote")
    return values, broken


def _name_others(start: bytes, file: Any, broken: FileError | None) -> None:
    """Raise a FileError that names the file, if it is no model and no pickle."""
    if _is_tar(start):
        file.seek(0)
        if b"storages" in file.read(2**24):
            raise AmbiguousError("torch.load runs the pickles of a tar archive")
        raise FileError("the file is a tar archive, as NeMo writes them", remedy="unpack it")
    for magic, (what, remedy) in _OTHERS.items() if broken else ():
        if start.startswith(magic):
            raise FileError(f"the file is {what}, which regraft does not read", remedy=remedy)
    if not start.strip(b"\0"):
        raise FileError("the file is damaged: it begins with zeros")


def _is_tar(start: bytes) -> bool:
    """A tar archive has a checksum in its header, and not always a name."""
    try:
        written = int(start[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return len(start) == 512 and written == sum(start[:148]) + 8 * 32 + sum(start[156:])

"""Which kind of file it is, by what is in it and not by its ending, and its reader."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path
from typing import BinaryIO

from regraft.cli.reading.archive import Archive
from regraft.cli.reading.exported import program_in, read_program
from regraft.cli.reading.model import ReadModel
from regraft.cli.reading.pickled import check_pickles, read_plain, read_zip
from regraft.cli.reading.safetensors import read_index, read_safetensors
from regraft.cli.reading.scripted import read_script
from regraft.errors import FileError

_OTHERS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file it stands for",
        "fetch it with git lfs pull",
    ),
    b"GGUF": ("a GGUF file of llama.cpp", ""),
    b"\x89HDF\r\n": ("an HDF5 file, as Keras writes them", ""),
    b"\x1f\x8b": ("compressed by gzip", "unpack it first"),
    b"BZh": ("compressed by bzip2", "unpack it first"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"<!DOCTYPE": ("a web page", "the download went wrong: fetch it again"),
    b"<html": ("a web page", "the download went wrong: fetch it again"),
    b"<?xml": ("XML", ""),
    b"#!": ("a script", ""),
    b"\x7fELF": ("a program", ""),
    b"MZ": ("a program", ""),
    b"\x08\x07": ("an ONNX file", ""),
    b"\x08\x08": ("an ONNX file", ""),
}
_GIVE = "give a .pt, .pth, .bin, .pt2 or .safetensors file, or a folder with a config.json"
_INDEX = ".safetensors.index.json"


def read_file(path: Path) -> ReadModel:
    """The model in a file or a folder of weights, with nothing of it run.

    Raises:
        FileError: it cannot be read, or (`suspicious`) names what no model needs.
    """
    was_on = gc.isenabled()
    gc.disable()  # nothing that is read is a cycle worth finding, and there may be millions of objects
    try:
        return _read(path)
    except FileError as error:
        error.where = error.where or str(path)
        error.remedy = error.remedy or ("" if error.suspicious else _GIVE)
        raise
    except OSError as error:
        raise FileError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None
    except MemoryError:
        raise FileError("there is not enough memory to read the file", where=str(path)) from None
    finally:
        if was_on:
            gc.enable()


def _read(path: Path) -> ReadModel:
    if path.is_dir():
        return _read_folder(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise FileError("this is no file but a device, a pipe or a socket")
    if path.name.endswith(_INDEX):
        return read_index(path)
    with path.open("rb") as file:
        start = file.read(512)
        size = os.fstat(file.fileno()).st_size
        if not start:
            raise FileError("the file is empty")
        if start.startswith((b"PK\3\4", b"PK\5\6")):
            return _read_archive(path, Archive(path, file))
        # A file can be a pickle and something else at once, so the pickle is looked at first.
        found = _as_pickle(path, file, start, size)
        if isinstance(found, FileError) and found.suspicious:
            raise found
        for magic, (what, remedy) in _OTHERS.items():
            if start.startswith(magic):
                raise FileError(f"the file is {what}, which regraft does not read", remedy=remedy)
        if start[257:262] == b"ustar":
            raise FileError(
                "the file is a tar archive, as PyTorch before 0.4 or NeMo write them", remedy="unpack it"
            )
        if not start.strip(b"\0"):
            raise FileError("the file is damaged: it begins with zeros")
        if _is_safetensors(start, path):
            return read_safetensors(path)
    if isinstance(found, FileError):
        raise found
    return found


def _as_pickle(path: Path, file: BinaryIO, start: bytes, size: int) -> ReadModel | FileError:
    """The file as a pickle, or why it is none."""
    if not _could_be_pickle(start, size):
        return FileError("the file is damaged, or no PyTorch file")
    try:
        return read_plain(path, file)
    except FileError as error:
        return error


def _read_archive(path: Path, archive: Archive) -> ReadModel:
    graph = program_in(archive)
    if graph:
        check_pickles(archive)
        return read_program(path, archive, graph)
    if archive.members("/constants.pkl"):
        check_pickles(archive)
        return read_script(path, archive)
    return read_zip(path, archive)


def _read_folder(path: Path) -> ReadModel:
    for pattern in (f"*{_INDEX}", "*.safetensors", "pytorch_model.bin", "*.bin", "*.pt", "*.pth"):
        found = sorted(path.glob(pattern))
        if found:
            return _read(found[0])
    raise FileError(
        "the folder holds no model", remedy="give a folder with a config.json or a .safetensors file"
    )


def _is_safetensors(start: bytes, path: Path) -> bool:
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(b"\x80"))


def _could_be_pickle(start: bytes, size: int) -> bool:
    """Protocol 2 and later begin with a version, 0 and 1 with one of a few letters."""
    if start[:1] == b"\x80":
        return len(start) > 1 and start[1] <= 5
    return size > 2 and start[:1] in b"(]}cdliNIKJMFGSUVXBTL)"

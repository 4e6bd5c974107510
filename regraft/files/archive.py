"""Zip archives as `torch.load` sees them; those that two readers could understand differently are refused."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Any

from regraft.errors import FileError

_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_TAIL = 2**16 + 22
_ENCRYPTED, _SIZES_FOLLOW = 1, 8
_MEMBERS = 2_000_000
_TABLE_BYTES = 2**28


class AmbiguousError(FileError):
    """An archive in which one reader finds other contents than the next."""

    def __init__(self, why: str) -> None:
        super().__init__(f"two readers of this archive would find different contents: {why}")


class Archive:
    """The table of contents of a zip file, and its pickles."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size
        end = self._check_end()
        self.members = _members(file)
        if len(self.members) > _MEMBERS:
            raise FileError(f"the archive holds more than {_MEMBERS:,} files")
        names: set[str] = set()
        free = 0
        for member in sorted(self.members, key=lambda member: member.header_offset):
            name = member.orig_filename
            if "\0" in name or name.casefold() in names:
                raise AmbiguousError(f"{name[:80]!r} stands in it twice, or with a NUL")
            names.add(name.casefold())
            if member.header_offset < free:
                raise AmbiguousError(f"{name[:80]!r} overlaps another file in it")
            free = member.header_offset + _LOCAL.size + len(name) + member.compress_size
        if free > end:
            raise AmbiguousError("a file in it overlaps its table of contents")

    def _check_end(self) -> int:
        """Where the table of contents begins, for a reader that trusts what stands at the end."""
        self.file.seek(max(0, self.size - _TAIL))
        tail = self.file.read(_TAIL)
        at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
        if at < 0:
            raise _damaged()
        *_, entries, length, start, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise AmbiguousError("its end is not at the end of the file")
        end = self.size - len(tail) + at
        if tail[at - 20 : at - 16] == b"PK\6\7" and at >= 20:
            (end,) = struct.unpack_from("<Q", tail, at - 12)
            self.file.seek(min(end, self.size))
            record = self.file.read(_END64.size)
            if len(record) != _END64.size or not record.startswith(b"PK\6\6"):
                raise _damaged()
            long = _END64.unpack(record)[-3:]
            fulls = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
            for short, full, wide in zip((entries, length, start), fulls, long, strict=True):
                if short not in (full, wide):
                    raise AmbiguousError("it has two ends that differ")
            _, length, start = long
        if length > _TABLE_BYTES:
            raise FileError("the archive is damaged: its table of contents is larger than any model's")
        self.file.seek(min(start, self.size))
        if length and self.file.read(4) != b"PK\1\2":
            raise _damaged()
        if start + length != end:
            raise AmbiguousError("something stands before it, or behind its table of contents")
        return int(start)

    def named(self, ending: str) -> list[zipfile.ZipInfo]:
        """The members whose names end so, in upper or lower case: torch takes `DATA.PKL` for `data.pkl`."""
        return [member for member in self.members if member.orig_filename.lower().endswith(ending)]

    def read(self, member: zipfile.ZipInfo, most: int) -> bytes:
        """What a member of at most `most` bytes holds, unpacked; as torch, without a look at its checksum."""
        name = member.orig_filename[:80]
        if member.flag_bits & _ENCRYPTED:
            raise FileError("the archive is encrypted", remedy="unpack it with its password first")
        if max(member.file_size, member.compress_size) > most:
            raise FileError(f"{name!r} in the archive claims {member.file_size:,} bytes, more than {most:,}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FileError(
                f"{name!r} is packed by a method ({member.compress_type}) that no model file uses"
            )
        try:
            return self._read(member, name)
        except (struct.error, zlib.error, ValueError, OverflowError) as error:
            raise FileError(f"the archive is damaged: {name!r} cannot be read") from error

    def _read(self, member: zipfile.ZipInfo, name: str) -> bytes:
        self.file.seek(member.header_offset)
        header = _LOCAL.unpack(self.file.read(_LOCAL.size))
        magic, _, flags, method, _, _, _, packed_size, size, name_length, extra = header
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        own_name = self.file.read(name_length).decode(encoding, "replace")
        if magic != b"PK\3\4":
            raise ValueError
        sizes = {(packed_size, size), (0xFFFFFFFF, 0xFFFFFFFF)}
        if (
            own_name != member.orig_filename
            or method != member.compress_type
            or flags & _ENCRYPTED
            or not (flags & _SIZES_FOLLOW or (member.compress_size, member.file_size) in sizes or extra)
        ):
            raise AmbiguousError(f"the header of {name!r} and the table of contents differ")
        self.file.seek(extra, 1)
        data: bytes = self.file.read(member.compress_size)
        if len(data) != member.compress_size:
            raise ValueError
        if method == zipfile.ZIP_DEFLATED:
            unpacker = zlib.decompressobj(-15)
            data = unpacker.decompress(data, member.file_size + 1)
            if not unpacker.eof and len(data) <= member.file_size:
                raise ValueError
        if len(data) != member.file_size:
            raise AmbiguousError(f"{name!r} has not the size that is written")
        return data


def _damaged() -> FileError:
    return FileError("the archive is damaged: it has no whole table of contents")


def _members(file: Any) -> list[zipfile.ZipInfo]:
    try:
        return zipfile.ZipFile(file).infolist()
    except MemoryError:
        raise
    except Exception as error:  # there are many: of `struct`, of seeking, of `zipfile` itself
        raise _damaged() from error


def is_archive_too(file: Any) -> bool:
    """Does a file that begins as something else end as an archive that holds pickles?"""
    try:
        return any(member.filename.lower().endswith(".pkl") for member in _members(file))
    except FileError:
        return False

"""Zip archives as `torch.load` sees them; those that two readers could understand differently are refused."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Any

from regraft.errors import FileError

MALFORMED = (
    *(
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        struct.error,
        ValueError,
        OSError,
        OverflowError,
    ),
    *(zlib.error, EOFError, IndexError, AttributeError),
)
_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_TAIL = 2**16 + 22
_ENCRYPTED, _SIZES_FOLLOW = 1, 8
_MEMBERS = 2_000_000
_TABLE_BYTES = 2**28


class AmbiguousError(FileError):
    """An archive in which one reader finds other contents than the next."""

    def __init__(self, why: str) -> None:
        super().__init__(f"two readers of this archive would find different contents: {why}")


class Archive:
    """The table of contents of a zip file, and its pickles.

    Raises:
        FileError: it is damaged.
        AmbiguousError: see there.
    """

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size
        try:
            self.end = self._check_end()
            self.members = zipfile.ZipFile(file).infolist()
        except MALFORMED as error:
            if isinstance(error, FileError):
                raise
            raise FileError("the archive is damaged: it has no whole table of contents") from error
        self._check_members()

    def _check_end(self) -> int:
        """Where the table of contents begins, for a reader that trusts what stands at the end."""
        self.file.seek(max(0, self.size - _TAIL))
        tail = self.file.read(_TAIL)
        at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
        if at < 0:
            raise ValueError
        *_, entries, length, start, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise AmbiguousError("its end is not at the end of the file")
        end = self.size - len(tail) + at
        if tail[at - 20 : at - 16] == b"PK\6\7" and at >= 20:
            (place,) = struct.unpack_from("<Q", tail, at - 12)
            self.file.seek(place)
            magic, *_, entries64, length64, start64 = struct.unpack("<4sQ2H2L4Q", self.file.read(56))
            if magic != b"PK\6\6":
                raise ValueError
            for short, long, full in (
                (entries, entries64, 0xFFFF),
                (length, length64, 0xFFFFFFFF),
                (start, start64, 0xFFFFFFFF),
            ):
                if short not in (full, long):
                    raise AmbiguousError("it has two ends that differ")
            length, start, end = length64, start64, place
        if length > _TABLE_BYTES:
            raise FileError("the archive is damaged: its table of contents is larger than any model's")
        self.file.seek(start)
        if length and self.file.read(4) != b"PK\1\2":
            raise ValueError
        if start + length != end:
            raise AmbiguousError("something stands before it, or behind its table of contents")
        return int(start)

    def _check_members(self) -> None:
        if len(self.members) > _MEMBERS:
            raise FileError(f"the archive holds more than {_MEMBERS:,} files")
        names: set[str] = set()
        end = 0
        for member in sorted(self.members, key=lambda member: member.header_offset):
            name = member.orig_filename.casefold()
            if "\0" in name or name in names:
                raise AmbiguousError(f"{member.orig_filename[:80]!r} stands in it twice, or with a NUL")
            names.add(name)
            if member.header_offset < end:
                raise AmbiguousError(f"{member.orig_filename[:80]!r} overlaps another file in it")
            end = member.header_offset + _LOCAL.size + len(member.orig_filename) + member.compress_size
        if end > self.end:
            raise AmbiguousError("a file in it overlaps its table of contents")

    def named(self, ending: str) -> list[zipfile.ZipInfo]:
        """The members whose names end so, in upper or lower case: torch takes `DATA.PKL` for `data.pkl`."""
        return [member for member in self.members if member.orig_filename.lower().endswith(ending)]

    def read(self, member: zipfile.ZipInfo, most: int) -> bytes:
        """What a member holds, unpacked; like torch, without a look at its checksum.

        Raises:
            FileError: it is encrypted, damaged, or larger than `most`.
            AmbiguousError: its own header says something else than the table of contents.
        """
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
        magic, _, flags, method, _, _, _, packed_size, size, name_length, extra = _LOCAL.unpack(
            self.file.read(_LOCAL.size)
        )
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
        packed: bytes = self.file.read(member.compress_size)
        if len(packed) != member.compress_size:
            raise ValueError
        if method == zipfile.ZIP_STORED:
            data = packed
        else:
            unpacker = zlib.decompressobj(-15)
            data = unpacker.decompress(packed, member.file_size + 1)
            if not unpacker.eof and len(data) <= member.file_size:
                raise ValueError
        if len(data) != member.file_size:
            raise AmbiguousError(f"{name!r} has not the size that is written")
        return data


def is_archive_too(file: Any) -> bool:
    """Does a file that begins as something else end as an archive that holds pickles?"""
    try:
        return zipfile.is_zipfile(file) and any(
            name.lower().endswith(".pkl") for name in zipfile.ZipFile(file).namelist()
        )
    except MALFORMED:
        return False

"""One member of a zip archive, read without the others: a checkpoint's numbers are never touched."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import BinaryIO

from regraft.cli.reading.limits import DIRECTORY_BYTES
from regraft.errors import FileError

_END = Struct("<4s4H2LH")
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR64 = Struct("<4sLQL")
_ENTRY = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_ENCRYPTED = 1
_FULL = 0xFFFFFFFF
_LONGEST_NAME = 66_000
_MOST_TRIES = 20_000
_MOST_STARTS = 8


@dataclass(frozen=True)
class Member:
    """One entry of the table of contents."""

    name: str
    method: int
    flags: int
    packed: int
    size: int
    offset: int


class Archive:
    """The table of contents of a zip file.

    Python's own `zipfile` makes an object of every entry, of which a checkpoint has one for each tensor;
    here the names are searched as bytes and only what is asked for is taken apart.

    Raises:
        FileError: the table of contents is damaged or missing.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        try:
            self.table = self._table()
        except (StructError, ValueError, OSError, OverflowError) as error:
            raise FileError("the archive is damaged: it has no whole table of contents") from error

    def _table(self) -> bytes:
        size = self.file.seek(0, 2)
        tail = self._at(max(0, size - 65_557 - 20), min(size, 65_557 + 20))
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise ValueError
        _, *_, length, offset, _ = _END.unpack_from(tail, at)
        if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7":
            _, _, place, _ = _LOCATOR64.unpack_from(tail, at - 20)
            found = _END64.unpack(self._at(place, _END64.size))
            if found[0] != b"PK\6\6":
                raise ValueError
            length, offset = found[8], found[9]
        if length > DIRECTORY_BYTES or offset + length > size:
            raise ValueError
        table = self._at(offset, length)
        if length and not table.startswith(b"PK\1\2"):
            raise ValueError
        return table

    def _at(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(length)

    def members(self, ending: str) -> list[Member]:
        """The entries whose names end so."""
        found: list[Member] = []
        wanted = ending.encode()
        at = self.table.find(wanted)
        for _ in range(_MOST_TRIES):
            if at < 0:
                break
            member = self._entry_of(at, at + len(wanted))
            if member:
                found.append(member)
            at = self.table.find(wanted, at + 1)
        return found

    def _entry_of(self, at: int, end: int) -> Member | None:
        """The entry whose name ends at `end`, if these bytes are a name's."""
        start = at
        for _ in range(_MOST_STARTS):
            start = self.table.rfind(b"PK\1\2", 0, start)
            if start < 0 or at - start > _LONGEST_NAME:
                return None
            entry = _ENTRY.unpack_from(self.table, start)
            name_end = start + _ENTRY.size + entry[10]
            if name_end == end:
                return self._member(entry, start)
            # Else these four letters stood in a name.
        return None

    def _member(self, entry: tuple[int, ...], start: int) -> Member:
        flags, method, packed, size = entry[3], entry[4], entry[8], entry[9]
        name_length, extra_length, offset = entry[10], entry[11], entry[16]
        at = start + _ENTRY.size
        name = self.table[at : at + name_length].decode("utf-8", "backslashreplace")
        extra = self.table[at + name_length : at + name_length + extra_length]
        size, packed, offset = _wide(extra, size, packed, offset)
        return Member(name, method, flags, packed, size, offset)

    def read(self, member: Member, most: int) -> bytes:
        """What a member holds, unpacked.

        Raises:
            FileError: it is encrypted, damaged, or larger than `most`.
        """
        if member.flags & _ENCRYPTED:
            raise FileError("the archive is encrypted", remedy="unpack it with its password first")
        claimed = max(member.size, member.packed)
        if claimed > most:
            raise FileError(f"{member.name} in the archive claims {claimed:,} bytes, more than {most:,}")
        try:
            local = _LOCAL.unpack(self._at(member.offset, _LOCAL.size))
            if local[0] != b"PK\3\4":
                raise ValueError
            packed = self._at(member.offset + _LOCAL.size + local[9] + local[10], member.packed)
            if len(packed) != member.packed:
                raise ValueError
            if member.method == 0:
                return packed
            if member.method != 8:
                raise FileError(
                    f"{member.name} is packed by a method ({member.method}) that no model file uses"
                )
            unpacked = zlib.decompressobj(-15).decompress(packed, most + 1)
        except (StructError, ValueError, OSError, OverflowError, zlib.error) as error:
            raise FileError(f"the archive is damaged: {member.name} cannot be read") from error
        if len(unpacked) > most:
            raise FileError(f"{member.name} in the archive unpacks to more than {most:,} bytes")
        return unpacked


def _wide(extra: bytes, *values: int) -> tuple[int, int, int]:
    """Sizes and offset, where they needed the 64 bits of an extra field."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = (
            int.from_bytes(extra[at : at + 2], "little"),
            int.from_bytes(extra[at + 2 : at + 4], "little"),
        )
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            wide = [int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field), 8)]
        at += 4 + length
    size, packed, offset = (wide.pop(0) if value == _FULL and wide else value for value in values)
    return size, packed, offset

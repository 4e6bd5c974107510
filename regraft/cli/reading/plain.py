"""Opcodes of plain values (numbers, text, bytes), of the stack and of the memo; protocols 0 to 5."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

from regraft.cli.reading.table import opcode
from regraft.cli.reading.values import Raw

if TYPE_CHECKING:
    from regraft.cli.reading.stream import Stream

_I4 = Struct("<i").unpack
_F8 = Struct(">d").unpack
_LONGEST_NUMBER = 1_000
_LONGEST_TEXT = 2**20


@opcode(b")")
def _empty_tuple(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(())


def _constant(code: bytes, value: Any) -> None:
    @opcode(code)
    def push(stream: Stream) -> None:
        stream.at += 1
        stream.stack.append(value)


_constant(b"N", None)
_constant(b"\x88", True)
_constant(b"\x89", False)


def _counted(code: bytes, width: int, made: Callable[[Stream, int], Any]) -> None:
    """An opcode with a length of `width` bytes, and that much after it."""

    @opcode(code)
    def push(stream: Stream) -> None:
        stream.at += 1
        length = int.from_bytes(stream.take(width), "little")
        stream.stack.append(made(stream, length))


def _text(stream: Stream, length: int) -> Any:
    if length > _LONGEST_TEXT:
        return _raw(stream, length)
    return str(bytes(stream.take(length)), "utf-8", "backslashreplace")


def _old_text(stream: Stream, length: int) -> Any:
    if length > _LONGEST_TEXT:
        return _raw(stream, length)
    return str(bytes(stream.take(length)), "latin-1")


def _raw(stream: Stream, length: int) -> Any:
    start = stream.at
    if start + length > stream.size:
        stream.at = stream.size
        raise IndexError
    if length <= 256:  # short enough to say something, and to be a key
        return bytes(stream.take(length))
    stream.at += length
    return Raw(start, stream.at)


def _number(stream: Stream, length: int) -> Any:
    number = stream.take(length)
    return int.from_bytes(number, "little", signed=True) if length <= _LONGEST_NUMBER else Raw(0, 0)


_counted(b"X", 4, _text)
_counted(b"\x8c", 1, _text)
_counted(b"\x8d", 8, _text)
_counted(b"T", 4, _old_text)
_counted(b"U", 1, _old_text)
_counted(b"B", 4, _raw)
_counted(b"C", 1, _raw)
_counted(b"\x8e", 8, _raw)
_counted(b"\x96", 8, _raw)
_counted(b"\x8a", 1, _number)
_counted(b"\x8b", 4, _number)


def _fixed(code: bytes, width: int, made: Callable[[bytes], Any]) -> None:
    @opcode(code)
    def push(stream: Stream) -> None:
        stream.at += 1
        stream.stack.append(made(bytes(stream.take(width))))


_fixed(b"K", 1, lambda taken: taken[0])
_fixed(b"M", 2, lambda taken: int.from_bytes(taken, "little"))
_fixed(b"J", 4, lambda taken: _I4(taken)[0])
_fixed(b"G", 8, lambda taken: _F8(taken)[0])


def _written(code: bytes, made: Callable[[str], Any]) -> None:
    """An opcode of protocol 0, whose value is a line of text."""

    @opcode(code)
    def push(stream: Stream) -> None:
        stream.at += 1
        stream.stack.append(made(str(stream.line(), "latin-1")))


def _integer(text: str) -> Any:
    if text in ("00", "01"):
        return text == "01"
    return int(text.removesuffix("L")) if len(text) <= _LONGEST_NUMBER else Raw(0, 0)


_written(b"I", _integer)
_written(b"L", _integer)
_written(b"F", float)
_written(b"S", lambda text: text.strip()[1:-1])
_written(b"V", str)


@opcode(b"\x80")
def _protocol(stream: Stream) -> None:
    stream.at += 2


@opcode(b"\x95")
def _frame(stream: Stream) -> None:
    stream.at += 9


@opcode(b".")
def _stop(stream: Stream) -> None:
    stream.at += 1
    stream.done = True


@opcode(b"(")
def _mark(stream: Stream) -> None:
    stream.at += 1
    stream.marks.append(len(stream.stack))


@opcode(b"0")
def _pop(stream: Stream) -> None:
    stream.at += 1
    if stream.marks and stream.marks[-1] == len(stream.stack):
        stream.marks.pop()
    else:
        stream.stack.pop()


@opcode(b"1")
def _pop_mark(stream: Stream) -> None:
    stream.at += 1
    stream.popped()


@opcode(b"2")
def _duplicate(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(stream.stack[-1])


@opcode(b"g")
def _get(stream: Stream) -> None:
    stream.at += 1
    index = int(stream.line()[:20])
    stream.stack.append(stream.memo[index] if 0 <= index < len(stream.memo) else stream.far[index])


@opcode(b"p")
def _put(stream: Stream) -> None:
    stream.at += 1
    stream.remember(abs(int(stream.line()[:20])), stream.stack[-1])


@opcode(b"\x94")
def _memoize(stream: Stream) -> None:
    stream.at += 1
    # Protocol 4 counts what is remembered.
    stream.remember(len(stream.memo) + len(stream.far), stream.stack[-1])

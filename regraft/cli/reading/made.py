"""Opcodes of containers, names and objects; protocols 0 to 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.cli.reading.table import opcode
from regraft.cli.reading.values import Made, Named, Raw, dictionary, key_of

if TYPE_CHECKING:
    from regraft.cli.reading.stream import Stream


@opcode(b"t")
def _tuple(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(tuple(stream.popped()))


@opcode(b"\x85", b"\x86", b"\x87")
def _short_tuple(stream: Stream) -> None:
    count = stream.data[stream.at] - 0x84
    stream.at += 1
    if len(stream.stack) < count:
        raise IndexError
    stream.stack[-count:] = [tuple(stream.stack[-count:])]


@opcode(b"]")
def _empty_list(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append([])


@opcode(b"l")
def _list(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(stream.popped())


@opcode(b"\x8f")
def _empty_set(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(Made(Named("builtins", "set", -1), ([],)))


@opcode(b"\x91")
def _frozen_set(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(Made(Named("builtins", "frozenset", -1), (stream.popped(),)))


@opcode(b"d")
def _dict(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(dictionary(stream.popped()))


@opcode(b"u")
def _set_items(stream: Stream) -> None:
    stream.at += 1
    _enter(stream, stream.popped())


@opcode(b"s")
def _set_item(stream: Stream) -> None:
    stream.at += 1
    value, key = stream.stack.pop(), stream.stack.pop()
    target = stream.stack[-1]
    if type(target) is dict:
        target[key_of(key)] = value
    else:
        _enter(stream, [key, value])


def _enter(stream: Stream, items: list[Any]) -> None:
    target = stream.stack[-1]
    if type(target) is dict:
        target.update(dictionary(items))
    elif isinstance(target, Made):
        target.entries = target.entries or []
        target.entries.append(items)
    else:
        raise TypeError


@opcode(b"e", b"\x90")
def _append_all(stream: Stream) -> None:
    stream.at += 1
    _append(stream, stream.popped())


@opcode(b"a")
def _append_one(stream: Stream) -> None:
    stream.at += 1
    _append(stream, [stream.stack.pop()])


def _append(stream: Stream, items: list[Any]) -> None:
    target = stream.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Made):
        raise TypeError


@opcode(b"c")
def _global(stream: Stream) -> None:
    at = stream.at
    stream.at += 1
    module, name = stream.line(), stream.line()
    stream.stack.append(stream.name(_readable(module), _readable(name), at))


def _readable(name: bytes) -> str:
    return str(name, "utf-8", "backslashreplace")


@opcode(b"\x93")
def _stack_global(stream: Stream) -> None:
    at = stream.at
    stream.at += 1
    name, module = stream.stack.pop(), stream.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError
    stream.stack.append(stream.name(module, name, at))


@opcode(b"\x82", b"\x83", b"\x84")
def _extension(stream: Stream) -> None:
    at = stream.at
    width = 2 ** (stream.data[at] - 0x82)
    stream.at += 1
    code = int.from_bytes(stream.take(width), "little")
    stream.stack.append(stream.name("copyreg extension", str(code), at))


@opcode(b"R", b"\x81")
def _reduce(stream: Stream) -> None:
    arguments, callee = stream.stack.pop(), stream.stack.pop()
    stream.at += 1
    stream.stack.append(stream.call(callee, arguments))


@opcode(b"\x92")
def _new_object(stream: Stream) -> None:
    stream.at += 1
    _, arguments, callee = stream.stack.pop(), stream.stack.pop(), stream.stack.pop()
    stream.stack.append(stream.call(callee, arguments))


@opcode(b"o")
def _object(stream: Stream) -> None:
    stream.at += 1
    callee, *arguments = stream.popped()
    stream.stack.append(stream.call(callee, tuple(arguments)))


@opcode(b"i")
def _instance(stream: Stream) -> None:
    at = stream.at
    stream.at += 1
    module, name = str(stream.line(), "latin-1"), str(stream.line(), "latin-1")
    stream.stack.append(stream.call(stream.name(module, name, at), tuple(stream.popped())))


@opcode(b"b")
def _build(stream: Stream) -> None:
    stream.at += 1
    state = stream.stack.pop()
    target = stream.stack[-1]
    if isinstance(target, Made):
        target.state = state
    # The state of anything else (an OrderedDict's attributes, `_metadata`) says nothing of a model.


@opcode(b"P")
def _persistent_line(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(stream.stored(str(stream.line(), "latin-1")))


@opcode(b"Q")
def _persistent(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(stream.stored(stream.stack.pop()))


@opcode(b"\x97")
def _buffer(stream: Stream) -> None:
    stream.at += 1
    stream.stack.append(Raw(0, 0))


@opcode(b"\x98")
def _read_only(stream: Stream) -> None:
    stream.at += 1

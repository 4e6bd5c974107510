"""A reader of pickles that runs nothing: the opcodes are followed, and what they would call is written down.

It is no unpickler: no name is looked up, no object of the file's making is called, compared or hashed.
So what a stream can cost is bound by its length, and `Budget` bounds that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from struct import error as StructError
from typing import Any

from regraft.cli.reading import made, plain  # noqa: F401  they fill the table
from regraft.cli.reading.limits import STACK
from regraft.cli.reading.stream import Stream
from regraft.cli.reading.table import TABLE
from regraft.errors import FileError

_U4 = Struct("<I").unpack_from
_CHUNK = 2**20


def read(stream: Stream) -> Any:
    """The value that the pickle describes.

    Raises:
        FileError: the stream is cut short or is no pickle, or asks too much time or memory.
    """
    began = stream.at
    try:
        with _no_collection():
            while not stream.done:
                _follow(stream, min(stream.at + _CHUNK, stream.size))
                stream.budget.check()
                if len(stream.stack) > STACK:
                    raise FileError(f"the file holds a tuple of more than {STACK:,} values")
                if stream.at >= stream.size and not stream.done:
                    raise FileError("the file is damaged: it ends before the model does")
        return stream.stack.pop()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, StructError) as error:
        if stream.at >= stream.size - 8:
            raise FileError("the file is damaged: it ends before the model does") from error
        what = "is no pickle" if stream.at - began < 2 else f"stops making sense at byte {stream.at}"
        raise FileError(f"the file is damaged, or no PyTorch file: it {what}") from error


def _follow(stream: Stream, end: int) -> None:
    """Follow the stream to `end` or a little beyond.

    Nine of ten opcodes of a module are the few here; the rest have a function each.
    """
    data, stack, memo, ordered, u4 = stream.data, stream.stack, stream.memo, stream.ordered, _U4
    push, put, at = stack.append, memo.append, stream.at
    try:
        while at < end:
            code = data[at]
            if code == 0x68:  # BINGET
                value = memo[data[at + 1]]
                at += 2
                if value is ordered and data[at : at + 3] == b")Rr" and u4(data, at + 3)[0] == len(memo):
                    value = {}  # an empty OrderedDict, remembered: four opcodes, a dozen times a module
                    at += 7
                    put(value)
                push(value)
            elif code == 0x72:  # LONG_BINPUT
                stream.remember(u4(data, at + 1)[0], stack[-1])
                at += 5
            elif code == 0x6A:  # LONG_BINGET
                index = u4(data, at + 1)[0]
                push(memo[index] if index < len(memo) else stream.far[index])
                at += 5
            elif code == 0x7D:  # EMPTY_DICT
                push({})
                at += 1
            elif code == 0x71:  # BINPUT
                stream.remember(data[at + 1], stack[-1])
                at += 2
            elif code == 0x88 or code == 0x89:  # noqa: PLR1714  NEWTRUE, NEWFALSE
                push(code == 0x88)
                at += 1
            else:
                stream.at = at
                TABLE[code](stream)
                at = stream.at
                if stream.done:
                    return
    finally:
        stream.at = at


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of new objects and no cycle to free: the collector would look through them all for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

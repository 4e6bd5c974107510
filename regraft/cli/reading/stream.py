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

from regraft.cli.reading.judge import suspicious
from regraft.cli.reading.limits import STACK, Budget
from regraft.cli.reading.values import Made, Named, Stored, shown
from regraft.errors import FileError

Data = Any
"""Bytes, or a memory map of a file."""

_U4 = Struct("<I").unpack_from
_CHUNK = 2**20
_MOST_ALARMS = 20
_GAP = 256


class Stream:
    """One pickle in `data` from `at`; `read()` gives the value it describes.

    Attributes:
        at: where it stands; after `read()`, behind the pickle.
        names: everything that unpickling would import, in the order of the stream.
        alarms: those names that no model needs: what, with which arguments, and where.
        inner: bytes within, at which another pickle begins that unpickling would read.
    """

    def __init__(self, data: Data, at: int = 0, budget: Budget | None = None) -> None:
        self.data, self.at, self.size = data, at, len(data)
        self.budget = budget or Budget()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.far: dict[int, Any] = {}
        self.names: list[Named] = []
        self.alarms: dict[int, str] = {}
        self.inner: list[Any] = []
        self.done = False
        self.ordered = Named("collections", "OrderedDict", -1)

    def read(self) -> Any:
        """The value that the pickle describes.

        Raises:
            FileError: the stream is cut short or is no pickle, or asks too much time or memory.
        """
        from regraft.cli.reading import made, plain  # noqa: F401  they fill the table
        from regraft.cli.reading.table import TABLE

        began = self.at
        try:
            with _no_collection():
                while not self.done:
                    self._follow(TABLE, min(self.at + _CHUNK, self.size))
                    self.budget.check()
                    if len(self.stack) > STACK:
                        raise FileError(f"the file holds a tuple of more than {STACK:,} values")
                    if self.at >= self.size and not self.done:
                        raise FileError("the file is damaged: it ends before the model does")
            return self.stack.pop()
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, StructError) as error:
            if self.at >= self.size - 8:
                raise FileError("the file is damaged: it ends before the model does") from error
            what = "is no pickle" if self.at - began < 2 else f"stops making sense at byte {self.at}"
            raise FileError(f"the file is damaged, or no PyTorch file: it {what}") from error

    def _follow(self, table: Any, end: int) -> None:
        """Follow the stream to `end` or a little beyond.

        Nine of ten opcodes of a module are the few here; the rest have a function each.
        """
        data, stack, memo, ordered, u4 = self.data, self.stack, self.memo, self.ordered, _U4
        push, put, at = stack.append, memo.append, self.at
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
                    self.remember(u4(data, at + 1)[0], stack[-1])
                    at += 5
                elif code == 0x6A:  # LONG_BINGET
                    index = u4(data, at + 1)[0]
                    push(memo[index] if index < len(memo) else self.far[index])
                    at += 5
                elif code == 0x7D:  # EMPTY_DICT
                    push({})
                    at += 1
                elif code == 0x71:  # BINPUT
                    self.remember(data[at + 1], stack[-1])
                    at += 2
                elif code == 0x88 or code == 0x89:  # noqa: PLR1714  NEWTRUE, NEWFALSE
                    push(code == 0x88)
                    at += 1
                else:
                    self.at = at
                    table[code](self)
                    at = self.at
                    if self.done:
                        return
        finally:
            self.at = at

    def remember(self, index: int, value: Any) -> None:
        """Remember a value; an index out of order may be as large as it likes and takes no room."""
        memo = self.memo
        if index == len(memo):
            memo.append(value)
        elif index < len(memo) + _GAP:
            memo.extend([None] * (index + 1 - len(memo)))
            memo[index] = value
        else:
            self.far[index] = value

    def take(self, count: int) -> Any:
        """The next bytes of the stream; the reader then stands behind them."""
        start, end = self.at, self.at + count
        if end > self.size:
            self.at = self.size
            raise IndexError
        self.at = end
        return self.data[start:end]

    def line(self) -> bytes:
        """The stream up to the end of the line."""
        end = self.data.find(b"\n", self.at, self.at + 4096)
        if end < 0:
            raise IndexError
        return bytes(self.take(end + 1 - self.at)[:-1])

    def popped(self) -> list[Any]:
        """Everything above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def name(self, module: str, name: str, at: int) -> Named:
        """The value of a name, noted; the reader goes on, to see what would be done with it."""
        if name == "OrderedDict" and module == "collections":
            self.names.append(self.ordered)
            return self.ordered
        found = Named(module, name, at)
        self.names.append(found)
        if suspicious(module, name):
            self._alarm(at, found.full)
        return found

    def call(self, callee: Any, arguments: Any) -> Any:
        """What a call would make, uncalled."""
        if callee is self.ordered and not arguments:
            return {}
        if isinstance(callee, Named):
            if callee.at in self.alarms:
                self._alarm(callee.at, f"{callee.full}{shown(arguments)}")
            full, first = callee.full, arguments[0] if type(arguments) is tuple and arguments else None
            if full.endswith("builtin__.getattr") or full == "builtins.getattr":
                if isinstance(first, Named) and len(arguments) > 1 and isinstance(arguments[1], str):
                    return self.name(first.module, f"{first.name}.{arguments[1]}", callee.at)
            elif full == "operator.attrgetter":
                for path in arguments:
                    if isinstance(path, str) and suspicious("attribute", path):
                        self._alarm(callee.at, f"{full}({path!r})")
            elif full == "torch.storage._load_from_bytes":
                self.inner.append(first)
        return Made(callee, arguments)

    def stored(self, key: Any) -> Any:
        """What a persistent id stands for: a storage, or, of old, a class with the text of its source."""
        if type(key) is tuple and len(key) > 1 and key[0] == "module":
            return key[1]
        return Stored(key)

    def _alarm(self, at: int, what: str) -> None:
        if len(self.alarms) < _MOST_ALARMS or at in self.alarms:
            self.alarms[at] = what


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

"""Where a reader of a pickle stands: the bytes, the stack, the memo, and what was noted on the way."""

from __future__ import annotations

from typing import Any

from regraft.cli.reading.judge import suspicious
from regraft.cli.reading.limits import Budget
from regraft.cli.reading.values import Made, Named, Stored, shown

Data = Any
"""Bytes, or a memory map of a file."""

_MOST_ALARMS = 20
_GAP = 256


class Stream:
    """One pickle in `data` from `at`.

    Attributes:
        at: where it stands; once it was read, behind the pickle.
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

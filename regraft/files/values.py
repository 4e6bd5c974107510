"""What a pickle describes, as inert values: a name stays a name, and a call a note that one was meant."""

from __future__ import annotations

from typing import Any


class Name:
    """A class or a function that unpickling would import.

    Attributes:
        role: the verdict on it (see `verdicts`).
        at: of a dangerous one that is not called yet, where it stands in the list of those, else -1.
    """

    __slots__ = ("at", "full", "module", "name", "role")

    def __init__(self, module: str, name: str, role: str) -> None:
        self.module, self.name, self.role = module, name, role
        self.full, self.at = f"{module}.{name}", -1


class Call:
    """An object that unpickling would make by a call: of what, with what, and the state it is then given."""

    __slots__ = ("arguments", "callee", "entries", "state")

    def __init__(self, callee: Any, arguments: tuple[Any, ...]) -> None:
        self.callee = callee
        self.arguments = arguments
        self.state: Any = None
        self.entries: list[Any] | None = None


class Ordered(dict[Any, Any]):
    """An OrderedDict; there are a dozen in every module, so it has no room for more."""

    __slots__ = ()


class StatedOrdered(Ordered):
    """An OrderedDict that was given a state (the `_metadata` of a state dict)."""

    __slots__ = ()


class Storage:
    """A storage beside the pickle (a persistent id); its numbers are not read."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key


class Opaque:
    """A value that is not looked at: a number of thousands of digits, or one that cannot be a key."""

    __slots__ = ()


OPAQUE = Opaque()


class Long:
    """A text or bytes of more than 64 kB: where it is, and whether it is the text of bytes in latin-1."""

    __slots__ = ("encoded", "file", "is_text", "length", "start")

    def __init__(self, file: Any, start: int, length: int, *, is_text: bool = False) -> None:
        self.file, self.start, self.length, self.is_text = file, start, length, is_text
        self.encoded: Long | None = None

    def encode(self) -> Long:
        """The bytes that `_codecs.encode(text, 'latin1')` makes of it; the same each time."""
        self.encoded = self.encoded or Long(self.file, self.start, self.length, is_text=True)
        return self.encoded

    def read(self) -> bytes:
        here = self.file.tell()
        self.file.seek(self.start)
        data: bytes = self.file.read(self.length)
        self.file.seek(here)
        return str(data, "utf-8", "replace").encode("latin-1", "replace") if self.is_text else data


SET = Name("builtins", "set", "value")


def shown(value: Any, deep: int = 2) -> str:
    """The value in a few words, for a message."""
    if type(value) is Name:
        return value.full
    if type(value) is Call:
        return f"{shown(value.callee, 0)}{shown(value.arguments, deep - 1)}" if deep > 0 else "..."
    if isinstance(value, (str, bytes)):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if type(value) is int and abs(value) >= 2**64:
        return "a large number"
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    if isinstance(value, (tuple, list)) and deep > 0:
        return (
            f"({', '.join(shown(item, deep - 1) for item in value[:4])}{', ...' if len(value) > 4 else ''})"
        )
    return "..."

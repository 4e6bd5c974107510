"""What a pickle describes, as inert values: a name stays a name, and a call a note that one was meant."""

from __future__ import annotations

from typing import Any

PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
"""Types of keys that a dictionary takes as they are; anything else could be made to hash for ever."""


class Named:
    """Something that unpickling would have imported: the name of a class or a function."""

    __slots__ = ("at", "full", "module", "name")

    def __init__(self, module: str, name: str, at: int) -> None:
        self.module = module
        self.name = name
        self.at = at
        self.full = f"{module}.{name}"


class Made:
    """An object that unpickling would have made by a call: of what, with what, and its state."""

    __slots__ = ("arguments", "callee", "entries", "state")

    def __init__(self, callee: Any, arguments: Any) -> None:
        self.callee = callee
        self.arguments = arguments
        self.state: Any = None
        self.entries: list[Any] | None = None


class Stored:
    """A storage that stands beside the pickle (a persistent id); its numbers are not read."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key


class Raw:
    """Bytes inside a pickle: where they are, not what they are."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class Opaque:
    """A value that cannot be a key, where a key is due."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def key_of(value: Any) -> Any:
    """The value as a key of a dictionary: as it is where that is plain, else by identity."""
    return value if type(value) in PLAIN else Opaque(value)


def dictionary(items: list[Any]) -> dict[Any, Any]:
    """The dictionary of a flat list of keys and values."""
    keys, values = items[::2], items[1::2]
    if not PLAIN.issuperset(map(type, keys)):
        keys = [key_of(key) for key in keys]
    return dict(zip(keys, values, strict=False))


def printable(text: str) -> str:
    """The text without halves of characters, which JSON can name and no terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any, deep: int = 2) -> str:
    """The value in a few words, for a message."""
    if isinstance(value, Named):
        return value.full
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= 64 else text[:61] + "..."
    if isinstance(value, (tuple, list)) and deep:
        inside = ", ".join(shown(one, deep - 1) for one in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inside})"
    if isinstance(value, Made) and deep:
        return f"{shown(value.callee, 0)}{shown(value.arguments, deep - 1)}"
    return "..."

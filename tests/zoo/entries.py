"""All entries of the zoo."""

from __future__ import annotations

import importlib

from .entry import Entry

LIBRARIES = ("torch", "torchvision", "timm", "peft", "hf")


def entries(*libraries: str) -> list[Entry]:
    """The entries of the given libraries, of all of them without any."""
    return [
        entry
        for library in libraries or LIBRARIES
        for entry in importlib.import_module(f"{__package__}.models_{library}").entries()
    ]


def entry(identifier: str) -> Entry:
    """One entry by `library:name`."""
    library, _, name = identifier.partition(":")
    return next(found for found in entries(library) if found.name == name)

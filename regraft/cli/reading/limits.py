"""How much a file may ask of its reader: generous for models, out of reach for traps."""

from __future__ import annotations

import sys
import time

from regraft.errors import FileError

STREAM_BYTES = 256 * 2**20
"""Of one pickle, without the numbers: 100,000 modules take 26 MB."""
JSON_BYTES = 64 * 2**20
DIRECTORY_BYTES = 128 * 2**20
"""Of the table of contents of an archive."""
SHARDS = 10_000
STACK = 4_000_000
BLOCKS = 24_000_000
"""Objects that the reader may make; 100,000 modules take about 6 million."""
SECONDS = 60.0
DEPTH = 1_000
"""Of a tree of modules: Python itself could not save a deeper one."""
NAMES = 500_000
NAME_LENGTH = 1_000
PATH_CHARACTERS = 200_000_000
"""Of all paths together."""


class Budget:
    """Time and memory that reading one file may take."""

    def __init__(self) -> None:
        self.end = time.monotonic() + SECONDS
        self.blocks = _blocks() + BLOCKS

    def check(self) -> None:
        """Raise FileError when the file asks too much."""
        if time.monotonic() > self.end:
            raise FileError(f"the file takes more than {SECONDS:.0f} s to read, so it was left")
        if _blocks() > self.blocks:
            raise FileError(f"the file describes more than {BLOCKS:,} objects, so it was left")


def _blocks() -> int:
    count = getattr(sys, "getallocatedblocks", None)  # CPython alone counts them
    return count() if count else 0

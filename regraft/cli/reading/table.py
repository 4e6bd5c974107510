"""The table of pickle's opcodes: what each byte does to a `Stream`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.cli.reading.stream import Stream

Step = Callable[["Stream"], None]


def _unknown(stream: Stream) -> None:
    raise ValueError


TABLE: list[Step] = [_unknown] * 256
"""By the opcode's byte; filled by `plain.py` and `made.py`."""


def opcode(*codes: bytes) -> Callable[[Step], Step]:
    """Enter a step for these opcodes."""

    def put(step: Step) -> Step:
        for code in codes:
            TABLE[code[0]] = step
        return step

    return put

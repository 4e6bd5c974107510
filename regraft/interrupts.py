"""Ctrl-C, held back while a model is between two states."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class HeldInterrupts:
    """SIGINT is noted while this is entered, and acted on when it is left.

    Setting something up, running a user's code and putting everything back again is one such block:
    only `released` lets a Ctrl-C through, and the first one that comes through closes it again, so that
    the clean-up which it sets off is not interrupted in turn.

    Blocks may be left in another order than the opposite of that in which they were entered.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._holding = True
        self._pending: tuple[int, FrameType | None] | None = None
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._left = False

    def __enter__(self) -> HeldInterrupts:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # ignored signals and handlers of C programs stay as they are
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()  # a fault on the way out, which may be over by now, or a Ctrl-C
            raise

    def _leave(self) -> None:
        if self._previous is None:
            return
        self._left = True
        if signal.getsignal(signal.SIGINT) == self._handle:
            previous: Any = self._previous
            while isinstance(block := getattr(previous, "__self__", None), HeldInterrupts) and block._left:
                previous = block._previous
            signal.signal(signal.SIGINT, previous)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._previous(*pending)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let interrupts through while the block runs, those that are waiting first."""
        self._holding = False
        try:
            if self._pending is not None:
                number, frame = self._pending
                self._pending = None
                self._handle(number, frame)
            yield
        finally:
            self._holding = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._previous is not None
        if self._left:  # a block that was entered later is still open
            self._previous(number, frame)
            return
        if self._holding:
            self._pending = number, frame
            return
        self._holding = True
        self._previous(number, frame)
        self._holding = False  # a handler of the user's own that does not raise

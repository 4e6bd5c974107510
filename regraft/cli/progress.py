"""A line on stderr for what takes more than a second; nothing where nobody watches."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_QUIET_SECONDS = 1.0


@contextmanager
def working(what: str) -> Iterator[None]:
    """While the block runs for longer than a second, say so, if stderr is a terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_show, args=(what, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _show(what: str, ended: threading.Event) -> None:
    if ended.wait(_QUIET_SECONDS):
        return
    from rich.console import Console
    from rich.text import Text

    from regraft.report.document import visible

    console = Console(stderr=True)
    status: Any = None
    with suppress(Exception):  # a broken terminal must not end the work
        status = console.status(Text(visible(what)))
        status.start()
    ended.wait()
    if status is not None:
        with suppress(Exception):
            status.stop()

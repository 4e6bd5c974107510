"""Which models are making passes at this moment: a graft that makes them must not make passes of passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class _Here(threading.local):
    def __init__(self) -> None:
        self.models: list[nn.Module] = []


_here = _Here()


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """While it runs, `model`'s own forward is one pass."""
    _here.models.append(model)
    try:
        yield
    finally:
        _here.models.pop()


def is_passing(model: nn.Module) -> bool:
    """Whether a pass of `model` is under way in this thread."""
    return any(one is model for one in _here.models)

"""Autograd functions that `vmap` cannot run: those without `setup_context`, once for each pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Function

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs a function, with these arguments, for each pass."""

_apply: Any = Function.__dict__["apply"]
"""The descriptor: a class method of Python's in older versions of torch, of C's in newer ones."""
_lock = threading.Lock()
_here = threading.local()
_running: list[Run] = []
"""Of all threads."""


@contextmanager
def taken_over(run: Run) -> Iterator[None]:
    """While a vmapped forward runs, `run` calls the autograd functions that vmap would refuse.

    `apply` goes through no function mode, so it is replaced on the class of all autograd functions for as
    long as any thread needs it; in all other threads it does what it did.
    """
    outer = getattr(_here, "run", None)
    _here.run = run
    with _lock:
        _running.append(run)
        Function.apply = _ROUTED
    try:
        yield
    finally:
        _here.run = outer
        with _lock:
            _running.remove(run)
            if not _running:
                Function.apply = _apply


def _routed(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    run: Run | None = getattr(_here, "run", None)
    plain: Callable[..., Any] = _apply.__get__(None, cls)
    refused = cls.setup_context is Function.setup_context and torch._C._are_functorch_transforms_active()
    return run(plain, args, kwargs) if run is not None and refused else plain(*args, **kwargs)


_ROUTED: Any = classmethod(_routed)

"""Functions of a model's own files that remember what they returned: what a look at the model leaves there.

Position tables and anchors are often made by a function under `functools.lru_cache`. A forward on fake
tensors would leave fake ones in it, for every forward that comes after.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forgotten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On leaving, no function of the modules' files remembers what it made meanwhile."""
    before = [(function, function.cache_info().misses) for function in remembering(modules)]
    try:
        yield
    finally:
        for function, misses in before:
            if function.cache_info().misses != misses:
                function.cache_clear()


def remembering(modules: Iterable[nn.Module]) -> list[Any]:
    """The functions and methods under `lru_cache` in the files that the modules' classes come from."""
    classes = {base for module in modules for base in type(module).__mro__}
    names = {base.__module__ for base in classes}
    files = [sys.modules[name] for name in names if name in sys.modules and not name.startswith("torch.")]
    return [
        function for holder in (*files, *classes) for value in _values(holder) for function in _cached(value)
    ]


def _values(holder: Any) -> list[Any]:
    return list(getattr(holder, "__dict__", {}).values())


def _cached(value: Any) -> Iterator[Any]:
    """`value` if it remembers, or what it closes over: a decorator of one's own around `lru_cache`."""
    value = getattr(value, "__func__", value)
    if isinstance(value, functools._lru_cache_wrapper):
        yield value
    for cell in getattr(value, "__closure__", None) or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
        if isinstance(inside, functools._lru_cache_wrapper):
            yield inside

"""One noise for all rows of a batch: each is computed as if it were alone, from the same random state."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from regraft.find.probe.preserve_state import random_state_kept
from regraft.training.passes.fork import generators, set_generators
from regraft.training.passes.measure import Forward
from regraft.training.passes.nested import (
    filled,
    is_cache,
    joined,
    leaves,
    mapped,
    tensors_in,
    without_caches,
)
from regraft.training.passes.repeat import Batch
from regraft.training.passes.sharded import real_forwards


def row_by_row(forward: Forward, batch: Batch) -> Any:
    """A forward for each row, each from the random state of the first."""
    return _rows(forward, batch, range(batch.size))


def rows_at_once(forward: Forward, batch: Batch) -> Any:
    """One forward for all rows, under a vmap that draws once for them."""
    outputs: Any = None

    def one_row(*tensors: Any) -> tuple[Any, ...]:
        nonlocal outputs
        args, kwargs = batch.with_tensors([x[None] for x in tensors])
        outputs = without_caches(forward(*args, **kwargs), kwargs)
        return tuple(tensors_in(outputs))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.func.vmap(one_row, randomness="same")(*batch.tensors)
    return filled(outputs, (x.flatten(0, 1) for x in found))


def shown_at_once(model: nn.Module, forward: Forward, batch: Batch) -> bool:
    """Whether `rows_at_once` gives the first and the last row what they get alone."""
    if any(is_cache(leaf) for _, leaf in leaves("", batch.call)):
        return False
    ends = [0, batch.size - 1]
    with real_forwards(model), random_state_kept():
        start = generators()
        try:
            found = tensors_in(rows_at_once(forward, batch))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what vmap cannot run goes row by row
            return False
        set_generators(start)
        for one, other in zip(found, tensors_in(_rows(forward, batch, ends)), strict=True):
            eps = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
            rounding = (4 if eps > 1e-4 else 1000) * eps * float(other.detach().abs().max())
            if not torch.allclose(one[ends], other, rtol=0, atol=rounding, equal_nan=True):
                return False
    return True


def _rows(forward: Forward, batch: Batch, rows: Any) -> Any:
    start, parts = generators(), []
    for row in rows:
        set_generators(start)
        args, kwargs = batch.with_rows([row])
        parts.append(without_caches(forward(*args, **kwargs), kwargs))
    return mapped(joined, "", *parts)

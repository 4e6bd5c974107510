"""The law of a dropout class of somebody's own: what its forward does to a small tensor, run by itself.

A name proves nothing: `MultiSampleDropout` is no dropout of single elements, and a `Drop` may be. So a module
without weights that has a rate is run alone in training, and what it returned says what it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from regraft.find.probe.preserve_state import preserving, random_state_kept, seed_generators, silent
from regraft.record import grafts_of, original_attribute, original_class

ELEMENTS, ROWS, CHANNELS, BLOCKS, OTHER = "elements", "rows", "channels", "blocks", "other"
"""Zero or 1/(1-p) for each element; for each row; for each channel; in blocks of neighbours; or else."""

_RATE = 0.25
_SHAPES = ((256, 4, 8, 8), (256, 8, 32), (256, 256), (64, 4, 8, 8, 8))
_MOST_RUNS = 16
"""One draw for the whole batch may well be the same twice."""
_SIMPLE = (bool, int, float, str, type(None), tuple)
_OWN = frozenset(vars(nn.Module()))
_known: WeakKeyDictionary[type, dict[Any, str | None]] = WeakKeyDictionary()


def law_of(module: nn.Module, rate: str | None) -> str | None:
    """What the forward of `module` draws, at the rate in its attribute `rate`; None if it draws nothing.

    None, too, where it cannot be run on one tensor. It is run as a copy, once for each class and settings.
    """
    cls = original_class(module)
    settings = {
        name: value
        for name, value in vars(module).items()
        if name != rate and name not in _OWN and type(value) in _SIMPLE and not name.startswith("_regraft")
    }
    known = _known.setdefault(cls, {})
    key = (rate, repr(sorted(settings.items())))
    if key not in known:
        with _alone():
            known[key] = _observed(module, rate)
    return known[key]


@contextmanager
def _alone() -> Iterator[None]:
    """No modes, no gradients, generators at a fixed state, which afterwards stand where they stood."""
    with ExitStack() as stack:
        kept = (_disable_current_modes(), silent(), random_state_kept(), torch.no_grad())
        stack.enter_context(preserving(*kept))
        stack.enter_context(torch._C.DisableTorchFunction())
        seed_generators(0)
        yield


def _observed(module: nn.Module, rate: str | None) -> str | None:
    own = original_attribute(module, rate) if rate else None
    rates: list[float | None] = [_RATE] if rate else [None]
    if isinstance(own, (int, float)) and 0 < own < 1:
        rates.append(float(own))  # a class may have made a number of its own from its rate
    law = None
    for p in rates:
        for shape in _SHAPES:
            x = torch.rand(shape, dtype=torch.float32, device="cpu") + 1
            try:
                first = second = _run(module, rate, p, x)
                for _ in range(_MOST_RUNS):
                    second = _run(module, rate, p, x)
                    if not _equal(first, second):
                        break
            except Exception:
                continue  # another shape
            found = _read(x, first, second, p)
            if found not in (None, OTHER):
                return found
            law = law or found
            break
    return law


def _run(module: nn.Module, rate: str | None, p: float | None, x: Tensor) -> Any:
    cls = original_class(module)
    clone = cls.__new__(cls)
    nn.Module.__init__(clone)
    grafts = grafts_of(module)
    for name, value in vars(module).items():
        if name not in _OWN and not name.startswith("_regraft"):
            own = original_attribute(module, name) if grafts else value
            clone.__dict__[name] = copy.deepcopy(own)
    clone._buffers.update(copy.deepcopy(module._buffers))
    clone.training = True
    if rate and p is not None:
        setattr(clone, rate, p)
    return cls.forward(clone, x.clone())


def _read(x: Tensor, first: Any, second: Any, p: float | None) -> str | None:
    if not isinstance(first, Tensor) or _equal(first, second):
        return None
    if first.shape != x.shape:
        return OTHER
    ratio = first / x
    kept = ratio != 0
    if not kept.any() or p is None:
        return _of_batch(ratio, second / x)
    scale = ratio[kept]
    if (scale - scale[0]).abs().max() > 1e-4 * scale[0].abs():
        return OTHER
    share = 1 - float(kept.float().mean())
    full = abs(float(scale[0]) * (1 - p) - 1) < 1e-3
    if kept.flatten(1).all(1).eq(kept.flatten(1).any(1)).all():
        near = abs(share - p) < 5 * (p * (1 - p) / len(x)) ** 0.5
        return ROWS if near and (full or abs(float(scale[0]) - 1) < 1e-3) else _of_batch(ratio, second / x)
    if x.dim() > 2 and kept.flatten(2).all(2).eq(kept.flatten(2).any(2)).all():
        return CHANNELS if full else OTHER
    if full and abs(share - p) < 0.02 and _independent(kept, share):
        return ELEMENTS
    return BLOCKS if x.dim() >= 4 and _in_blocks(~kept) else OTHER


def _independent(kept: Tensor, share: float) -> bool:
    """Whether neighbours along every axis are dropped together as often as by chance."""
    dropped = (~kept).float()
    for axis in range(kept.dim()):
        size = kept.shape[axis] - 1
        both = float((dropped.narrow(axis, 0, size) * dropped.narrow(axis, 1, size)).mean())
        if abs(both - share**2) > 0.02:
            return False
    return True


def _in_blocks(dropped: Tensor) -> bool:
    """Whether nearly all that is dropped has a dropped neighbour along the last two axes."""
    for axis in (-2, -1):
        size = dropped.shape[axis] - 1
        pairs = dropped.narrow(axis, 0, size) & dropped.narrow(axis, 1, size)
        beside = torch.zeros_like(dropped)
        beside.narrow(axis, 0, size).logical_or_(pairs)
        beside.narrow(axis, 1, size).logical_or_(pairs)
        if float(beside[dropped].float().mean()) < 0.8:
            return False
    return True


def _equal(first: Any, second: Any) -> bool:
    both = isinstance(first, Tensor) and isinstance(second, Tensor)
    return not both or (first.shape == second.shape and torch.equal(first, second))


def _of_batch(first: Tensor, second: Tensor) -> str:
    """One draw for the whole batch, as in the paper of stochastic depth: all of it, or nothing."""
    for ratio in (first, second):
        if (ratio - ratio.flatten()[0]).abs().max() > 1e-4:
            return OTHER
    return ROWS if min(float(first.max()), float(second.max())) == 0 else OTHER

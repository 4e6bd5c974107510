"""Where passes part: what a forward draws in front of a named module is common to all passes."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regraft.errors import ModelError, NoMatchError, RateError, nearest
from regraft.graft.calls import checkpoint_marks


class ForkError(ModelError):
    """Passes cannot part at the module that `fork=` names."""


def fork_path(model: nn.Module, fork: str | float) -> str:
    """The module that `fork=` means: the one of that path, or the first behind a fraction of the blocks."""
    modules = dict(model.named_modules())
    if isinstance(fork, str):
        if fork not in modules or not fork:
            raise NoMatchError(
                f"fork={fork!r} names no module of {type(model).__name__}", remedy=nearest(fork, modules)
            )
        return fork
    if isinstance(fork, bool) or not isinstance(fork, (int, float)) or not 0 < fork < 1:
        raise RateError(
            f"fork={fork!r} is not a fraction of the blocks",
            remedy="give a path, or between 0 and 1",
        )
    sizes = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len(set(map(type, module))) == 1
    }
    # A list inside another's blocks is smaller; two of about one size are two stacks of blocks.
    large = [path for path, size in sizes.items() if 2 * size > max(sizes.values())]
    if len(large) != 1:
        raise NoMatchError(
            f"fork={fork} is a fraction of the blocks, and {type(model).__name__} has no single list of them",
            where=f"lists of blocks: {' and '.join(large) or 'none'}",
            remedy="name the module where passes are to part: fork='PATH'",
        )
    blocks: Any = modules[large[0]]
    return f"{large[0]}.{min(max(round(fork * len(blocks)), 1), len(blocks) - 1)}"


class Fork:
    """The way to the module at `path`: the first forward draws its own masks, each other replays them."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.module = model
        for name in ("", *path.split(".")):
            self.module = self.module.get_submodule(name)
            if getattr(self.module, "_compiled_call_impl", None) is not None:
                raise self.unfit(
                    "lies in a compiled part", "fork in front of it, or pass the model uncompiled"
                )
        self._start: Any = None
        self._end: Any = None

    @contextmanager
    def reached(self, begin: Callable[[], None]) -> Iterator[None]:
        """Around a forward: its call of the module calls `begin`, and later forwards draw anew there."""
        marks, thread = checkpoint_marks(), threading.get_ident()
        calls = 0

        def enter(*_: Any) -> None:
            nonlocal calls
            if threading.get_ident() != thread:
                return
            calls += 1
            if checkpoint_marks() != marks:
                raise self.unfit(
                    "lies in a part that gradient checkpointing recomputes, or that runs without gradients",
                    "switch checkpointing off from there on, or name a module around that part",
                )
            if calls == 1:
                if self._end is not None:
                    set_generators(self._end)
                begin()

        if self._start is None:
            self._start = generators()
        else:
            set_generators(self._start)
        handle = self.module.register_forward_pre_hook(enter, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            often = f"is called {calls} times" if calls else "is not called by the forward"
            raise self.unfit(often, "name a module that the forward calls once")
        self._end = generators()

    def unfit(self, what: str, remedy: str) -> ForkError:
        """The error that passes cannot part here."""
        return ForkError(f"fork={self.path!r} {what}, so passes cannot part there", remedy=remedy)


def generators() -> tuple[Any, Any, Any, Any]:
    """The states of the global generators: torch's, CUDA's, Python's and numpy's."""
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy else None


def set_generators(state: Any) -> None:
    """Put them back."""
    cpu, cuda, python, array = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if array is not None:
        sys.modules["numpy"].random.set_state(array)

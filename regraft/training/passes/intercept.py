"""Entries of torch and of modules, replaced while a vmapped forward runs because no function mode sees them.

- `Function.apply`: `vmap` refuses autograd functions without `setup_context`, so they run once for each pass.
- `saved_tensors_hooks`: a checkpoint enters them around what it recomputes in the backward. The recomputation
  runs outside `vmap`, so nothing that it computes may tell the passes apart.
- `forward` of modules that vmap cannot run, as routed experts.

All are replaced for as long as any thread runs a vmapped forward, and act in those threads alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs a function, with these arguments, for each pass."""

_apply: Any = Function.__dict__["apply"]
"""The descriptor: a class method of Python's in older versions of torch, of C's in newer ones."""
_enter, _exit = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
_lock = threading.Lock()
_here = threading.local()
_active: list[Interception] = []  # those under way, in all threads
_forwards: dict[nn.Module, dict[str, Any]] = {}
"""Modules whose forward is replaced -> their own entry `forward`, if any."""


class RecomputeError(RuntimeError):
    """A part of the forward is recomputed in the backward, where the passes are no longer told apart."""

    def __init__(self) -> None:
        super().__init__("it recomputes a part of itself in the backward (gradient checkpointing)")


class Interception:
    """What a vmapped forward does at the entries that are replaced for it."""

    def __init__(self, run: Run | None = None, modules: Mapping[nn.Module, Run] | None = None) -> None:
        self.run = run  # calls the autograd functions that vmap would refuse
        self.modules = modules or {}  # what calls their forwards
        # The hooks on saved tensors that the forward is inside of: what runs there may be computed once more
        # in the backward. Without `run` nothing watches what that is, so it is refused.
        self.recomputed: set[Any] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it runs, the entries are replaced in this thread."""
        outer = getattr(_here, "interception", None)
        _here.interception = self
        with _lock:
            _active.append(self)
            _install()
        try:
            yield
        finally:
            _here.interception = outer
            with _lock:
                _active.remove(self)
                _install()

    def call(self, cls: type[Function], plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """An autograd function called inside vmap."""
        recomputes = any(map(callable, args))
        # Torch's own way to vmap a backward loses what the callables among the arguments have closed over.
        lost = cls.generate_vmap_rule and recomputes
        if cls.setup_context is not Function.setup_context and not lost:
            return plain(*args, **kwargs)
        if self.run is not None:
            return self.run(plain, args, kwargs)
        if recomputes:
            raise RecomputeError
        return plain(*args, **kwargs)


def _install() -> None:
    patched: Any = saved_tensors_hooks
    Function.apply = _CALLED if _active else _apply
    patched.__enter__ = _entered if _active else _enter
    patched.__exit__ = _left if _active else _exit
    wanted = {module for interception in _active for module in interception.modules}
    for module in wanted - _forwards.keys():
        _forwards[module] = {key: module.__dict__[key] for key in ("forward",) if key in module.__dict__}
        module.__dict__["forward"] = _routed(module, module.forward)
    for module in _forwards.keys() - wanted:
        del module.__dict__["forward"]
        module.__dict__.update(_forwards.pop(module))


def _interception() -> Interception | None:
    interception: Interception | None = getattr(_here, "interception", None)
    inside = interception is not None and torch._C._are_functorch_transforms_active()
    return interception if inside else None


def _called(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    plain: Callable[..., Any] = _apply.__get__(None, cls)
    interception = _interception()
    return plain(*args, **kwargs) if interception is None else interception.call(cls, plain, args, kwargs)


_CALLED: Any = classmethod(_called)


def _routed(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        interception = _interception()
        run = None if interception is None else interception.modules.get(module)
        return plain(*args, **kwargs) if run is None else run(plain, args, kwargs)

    return forward


def _entered(hooks: saved_tensors_hooks) -> None:
    interception = _interception()
    if interception is not None:
        if interception.run is None:
            raise RecomputeError
        interception.recomputed.add(hooks)
    _enter(hooks)


def _left(hooks: saved_tensors_hooks, *args: Any) -> None:
    # A checkpoint whose function raised leaves them when it is collected, in another forward as like as not.
    interception: Interception | None = getattr(_here, "interception", None)
    if interception is not None:
        interception.recomputed.discard(hooks)
    _exit(hooks, *args)

"""One lock for each model: whatever changes a model, or must see it unchanged, happens one at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from regraft.find.walk import inner_model

_Function = TypeVar("_Function", bound=Callable[..., Any])
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_new = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """The lock of the model inside any wrappers; a thread that holds it may take it again."""
    root, _ = inner_model(model)
    with _new:
        return _locks.setdefault(root, threading.RLock())


def one_at_a_time(function: _Function) -> _Function:
    """A function whose first argument is a model, which it has for itself until it returns."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)  # which says what is wrong with it
        with lock_of(model):
            return function(*args, **kwargs)

    return alone  # type: ignore[return-value]

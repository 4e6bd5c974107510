"""Every module of a model once, with all of its names; the model inside its wrappers, and its lock."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from regraft.errors import ModelError
from regraft.libraries import is_of

_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_MOST_NAMES = 1_000_000
_Function = TypeVar("_Function", bound=Callable[..., Any])
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""One lock for each model: whatever changes it, or must see it unchanged, happens one at a time."""
_new = threading.Lock()


@dataclass(frozen=True)
class Named:
    """A module and all the dotted paths that lead to it, the first in the order of registration first."""

    module: nn.Module
    paths: list[str] = field(default_factory=list)


def named_modules(model: nn.Module) -> list[Named]:
    """All modules, each once, in the order in which they were registered.

    `nn.Module.named_modules()` gives one name of a shared module and never returns from a cycle; here a
    shared module keeps every name, and a module inside itself is not entered again.
    """
    found: dict[int, Named] = {}
    stack: list[tuple[nn.Module, str, frozenset[int]]] = [(model, "", frozenset())]
    names = 0
    while stack:
        module, path, above = stack.pop()
        if id(module) in above:
            continue
        names += 1
        if names > _MOST_NAMES:
            raise ModelError(f"the model has more than {_MOST_NAMES:,} module names", where=path)
        found.setdefault(id(module), Named(module)).paths.append(path)
        inside = above | {id(module)}
        children = [
            (child, f"{path}.{name}" if path else name, inside)
            for name, child in module._modules.items()
            if child is not None
        ]
        stack.extend(reversed(children))
    return list(found.values())


def inner_model(model: object) -> tuple[nn.Module, list[str]]:
    """The model inside wrappers of torch (DDP, `torch.compile`), and a note for each one passed.

    Raises:
        ModelError: not a module, or a wrapper that regraft cannot look into.
    """
    notes: list[str] = []
    while True:
        if not isinstance(model, nn.Module):
            raise _no_module(model)
        name = type(model).__name__
        if is_of(model, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise ModelError(
                "FullyShardedDataParallel flattens the parameters, so a graft would see none of them",
                where=name,
                remedy="graft before wrapping, or wrap with torch.distributed.fsdp.fully_shard",
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise ModelError(
                f"{name} is compiled TorchScript: changing what its modules do has no effect",
                where=name,
                remedy="graft the Python model, then script or trace it",
            )
        attribute = next((inner for *cls, inner in _WRAPPERS if is_of(model, *cls)), "")
        inside = model._modules.get(attribute)
        if inside is None:
            return model, notes
        notes.append(f"looked inside {name}: paths begin at the model it wraps")
        model = inside


def _no_module(model: object) -> ModelError:
    name = type(model).__name__
    what = f"expected a torch.nn.Module, got {'an' if name[0] in 'AEIOU' else 'a'} {name}"
    remedy = "give the model itself"
    if isinstance(model, dict):
        remedy = "a state dict holds weights, not layers: build the model and load them into it"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        what, remedy = f"{model.__name__} is a class, not a model", f"make one: {model.__name__}(...)"
    elif isinstance(model, str) and PurePath(model).suffix in _FILES:
        remedy = f"load it first; on the command line: regraft inspect {model}"
    elif isinstance(model, str):
        remedy = (
            "build it first, by timm.create_model or AutoModel.from_pretrained; on the command line: "
            f"regraft inspect timm:{model}, or hf:{model}"
        )
    return ModelError(what, where=repr(model)[:60], remedy=remedy)


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

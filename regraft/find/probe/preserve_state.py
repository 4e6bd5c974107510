"""Look at a model without changing it: everything a forward may touch is put back afterwards."""

from __future__ import annotations

import functools
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from regraft.find.probe.copied import original
from regraft.interrupts import HeldInterrupts
from regraft.record import temporarily_ungrafted


@contextmanager
def preserving(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Enters the contexts. A Ctrl-C reaches the block, and never what they set up or put back."""
    with HeldInterrupts() as held, ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        with held.released():
            yield


@contextmanager
def unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """On leaving, all modules have the attributes, entries and training flags they had on entering."""
    before = [(module, snapshot(module)) for module in modules]
    try:
        yield
    finally:
        for module, attributes in before:
            restore(module, attributes)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, and the entries of those that are containers."""
    # One level down is enough: models rebind attributes and add modules, hooks and buffers, and all of
    # those live in the module's own dictionaries.
    return {key: (value, _copied(value)) for key, value in module.__dict__.items()}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else None


def restore(module: nn.Module, before: dict[str, Any]) -> None:
    """Give a module the attributes and entries of a snapshot again."""
    attributes = module.__dict__
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, (value, copied) in before.items():
        if attributes.get(key) is not value:
            attributes[key] = value
        if copied is not None and not same_entries(value, copied):
            _refill(value, copied)


def same_entries(value: Any, copied: Any) -> bool:
    """Whether a container still holds the very objects that a copy of it holds."""
    if len(value) != len(copied):
        return False
    if isinstance(value, dict):
        return all(key in copied and copied[key] is entry for key, entry in value.items())
    if isinstance(value, list):
        return all(one is other for one, other in zip(value, copied, strict=True))
    return bool(value == copied)


def _refill(value: Any, copied: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(copied)
    else:
        value.update(copied)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """On leaving, the generators of torch, Python and numpy stand where they stood."""
    numpy = sys.modules.get("numpy")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with ExitStack() as stack:  # puts all of them back, whatever happens to one
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        yield


def seed_generators(seed: int) -> None:
    """Put the global generators of torch, Python and numpy at a known state."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


@contextmanager
def buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    """On leaving, all buffers have the values they had: for a forward on real tensors.

    Batch norm writes its running statistics without a new version, hence the look at the values.
    """
    before = [
        (buffer, buffer.detach().clone())
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None
    ]
    versions = [buffer._version for buffer, _ in before]
    try:
        yield
    finally:
        with torch.no_grad():
            for (buffer, value), version in zip(before, versions, strict=True):
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def silent() -> Iterator[None]:
    """No warnings of the model's, and no log lines of torch's about inputs that did not fit, meanwhile."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was


@contextmanager
def forgotten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Clears every `lru_cache` in the files of the modules' classes that was populated meanwhile.

    Position tables and anchors are often cached: fake ones would serve every later forward.
    """
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


class MarkedRate(float):
    """A rate that knows whose it is: the same number, so that no model can notice."""

    module: nn.Module


@contextmanager
def marked(modules: list[nn.Module]) -> Iterator[None]:
    """The originals of all modules in training mode; afterwards everything is as it was.

    Each dropout's rate is marked, so that a call that uses it tells which module it got it from.
    """
    with unchanged(modules), temporarily_ungrafted(modules):
        set_training(modules, mode=True)
        for module in modules:
            attributes = module.__dict__
            rate: Any = attributes.get("p")
            if isinstance(rate, (float, int)) and not isinstance(rate, bool) and 0 <= rate <= 1:
                attributes["p"] = MarkedRate(rate)
                attributes["p"].module = original(module)
        yield


def set_training(modules: list[nn.Module], *, mode: bool) -> None:
    """Set the flags themselves: a `train()` of the user's own may leave some of them alone."""
    for module in modules:
        module.__dict__["training"] = mode

"""Look at a model without changing it: everything a forward may touch is put back afterwards."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


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

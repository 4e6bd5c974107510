"""Which strategy a model's passes can take, and which is cheapest: measured once, then remembered."""

from __future__ import annotations

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.record import grafts_of
from regraft.training.passes.analyze import Call, Traits, autocasts, looked, looked_at_batch
from regraft.training.passes.nested import leaves

log = logging.getLogger("regraft")
_READ = (
    *("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "drop_rate", "layerdrop"),
    *("gradient_checkpointing", "grad_checkpointing"),
)
"""Attributes of modules that a choice depends on."""
_known: WeakKeyDictionary[nn.Module, dict[Any, Traits]] = WeakKeyDictionary()


def traits_of(model: nn.Module, call: Call) -> Traits:
    """What is known of `model`'s passes over inputs like these, in the state it is in."""
    if torch.compiler.is_compiling():
        return Traits(no_sharing="a compiled region takes no vmap with hooks of its own", no_batch=[None])
    known = _known.setdefault(model, {})
    key = _state(model, call)
    if key not in known:
        known[key] = looked(model, call)
        known[key].elements = _elements(call)
        if known[key].no_sharing is not None:
            log.info("%s: passes share nothing: %s", type(model).__name__, known[key].no_sharing)
    return known[key]


def work_of(model: nn.Module, call: Call) -> tuple[float, float]:
    """The part of one pass that passes can share, in [0, 1]; and about how many flops a pass has."""
    traits = traits_of(model, call)
    prefix = 0.0 if traits.no_sharing is not None else traits.prefix
    if traits.plain is None:
        return prefix, math.inf
    # It was measured once, perhaps for a smaller batch.
    return prefix, traits.plain.cost * _elements(call) / max(1, traits.elements)


def _elements(call: Call) -> int:
    return sum(leaf.numel() for _, leaf in leaves("", call) if isinstance(leaf, Tensor))


def no_batch(traits: Traits, model: nn.Module, call: Call, options: dict[str, Any]) -> str | None:
    """Why the repeated batch would not be independent passes, or None."""
    if not traits.no_batch:
        traits.no_batch.append(looked_at_batch(traits, model, call, options))
    return traits.no_batch[0]


def _state(model: nn.Module, call: Call) -> Any:
    # What a choice depends on. Where something else changes it stays right, and may be slower.
    modules = tuple(
        (
            *(type(module), module.training),
            *(_number(module.__dict__.get(name)) for name in _READ),
            *(getattr(graft, "sampling", False) for graft in grafts_of(module).values()),
        )
        for module in model.modules()
    )
    inputs = tuple(
        (name, leaf.dim() if isinstance(leaf, Tensor) else type(leaf)) for name, leaf in leaves("", call)
    )
    return modules, inputs, torch.is_grad_enabled(), autocasts(model)


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None

"""Which strategy a model's passes can take, and which is cheapest: measured once, then remembered."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.find.original import grafts_of
from regraft.find.walk import inner_model
from regraft.training.passes.measure import Measured, Meter, measured, on_fake_tensors, on_real_tensors
from regraft.training.passes.repeated import repeated_forward
from regraft.training.passes.shared import SLOWER, shared_forward
from regraft.training.passes.tree import leaves

log = logging.getLogger("regraft")
_PROBED = 2
_OVERHEAD = 1.12
"""Under vmap an operation costs about this much of what it costs in a batch as long."""
_READ = (
    *("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "drop_rate", "layerdrop"),
    *("gradient_checkpointing", "grad_checkpointing"),
)
"""Attributes of modules that a choice depends on."""
SHARED_DRAW = "it draws once for the whole batch (a mask of weights or layers), so passes would share it"
_DECIDES = "it draws a number to decide what runs, which each pass has to decide for itself"
_ELSEWHERE = "it draws from Python's or numpy's generator, which says nothing of passes"
_IN_OTHER_WORDS = {
    "running_mean or running_var": "a BatchNorm in training comes behind the first random operation, and its "
    "running statistics would have to move for each pass",
    "data-dependent control flow": "behind the first random operation it branches on a value",
    ".item()": "behind the first random operation it reads a value",
    "Cannot access data pointer": "behind the first random operation it reads values",
    "dynamic shape": "behind the first random operation a shape depends on values",
}
"""What torch says -> what it means for the passes."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
Trial = Callable[..., Any]


@dataclass
class Traits:
    """What is known of a model's passes over inputs of one kind.

    Attributes:
        no_sharing: why "shared" cannot be, or None.
        prefix: the part of one pass that comes before the first draw, in [0, 1].
        draws: whether "shared" has to take draws over.
        elsewhere: why no forward can hold several passes, or None.
        no_batch: why "batch" would not be independent passes; empty until it was looked at.
    """

    no_sharing: str | None = None
    prefix: float = 0.0
    draws: bool = True
    elsewhere: str | None = None
    no_batch: list[str | None] = field(default_factory=list)
    plain: Measured | None = None
    place: Any = on_fake_tensors

    def cost(self, n: int, chunk: int) -> float:
        """What n passes cost by "shared", in single passes."""
        return self.prefix * -(-n // chunk) + (1 - self.prefix) * n * _OVERHEAD


_known: WeakKeyDictionary[nn.Module, dict[Any, Traits]] = WeakKeyDictionary()


def traits_of(model: nn.Module, call: Call) -> Traits:
    """What is known of `model`'s passes over inputs like these, in the state it is in."""
    if torch.compiler.is_compiling():
        return Traits(no_sharing="a compiled region takes no vmap with hooks of its own", no_batch=[None])
    known = _known.setdefault(model, {})
    key = _state(model, call)
    if key not in known:
        known[key] = _look(model, call)
        if known[key].no_sharing is not None:
            log.info("%s: passes share nothing: %s", type(model).__name__, known[key].no_sharing)
    return known[key]


def prefix_of(model: nn.Module, call: Call) -> float:
    """The part of one pass that passes can share, in [0, 1]."""
    traits = traits_of(model, call)
    return 0.0 if traits.no_sharing is not None else traits.prefix


def no_batch(traits: Traits, model: nn.Module, call: Call, options: dict[str, Any]) -> str | None:
    """Why the repeated batch would not be independent passes, or None."""
    if not traits.no_batch:
        traits.no_batch.append(_look_at_batch(traits, model, call, options))
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
    return modules, inputs, torch.is_grad_enabled(), _autocasts(model)


def _autocasts(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return torch.is_autocast_enabled("cpu" if first is None else first.device.type)


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None


def _look(model: nn.Module, call: Call) -> Traits:
    reason = _opaque(model)
    if reason is not None:
        return Traits(no_sharing=reason, no_batch=[None])
    traits = Traits()
    try:
        traits.plain = _tried(on_fake_tensors, model, call, _plain)
    except Exception:
        traits.place = on_real_tensors
        try:
            traits.plain = _tried(on_real_tensors, model, call, _plain)
        except Exception as error:
            # The forward that was asked for will say so better.
            return Traits(no_sharing=why(error), no_batch=[None])
    if traits.plain.elsewhere:
        traits.no_sharing = traits.elsewhere = _ELSEWHERE
    elif traits.plain.checkpointed and torch.is_grad_enabled():
        traits.no_sharing = "it recomputes a part of itself in the backward (gradient checkpointing)"
    else:
        _look_at_sharing(traits, model, call)
    return traits


def _opaque(model: nn.Module) -> str | None:
    name = type(model).__name__
    if inner_model(model)[0] is not model or getattr(model, "_compiled_call_impl", None) is not None:
        return f"{name} is wrapped or compiled"
    # FSDP's are DTensors; DeepSpeed's stage 3 empties the parameters and numbers them.
    if any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in model.parameters()):
        return "its parameters are sharded"
    return None


def _plain(forward: Trial, args: tuple[Any, ...], kwargs: dict[str, Any], _: Meter) -> None:
    forward(*args, **kwargs)


def _look_at_sharing(traits: Traits, model: nn.Module, call: Call) -> None:
    plain = traits.plain
    assert plain is not None
    # Without taking draws over it is faster, and fails on what there is to take over; a kernel that vmap
    # runs pass by pass, as fused attention, is better taken over too, and autocast and decisions need it.
    for draws in (True,) if _autocasts(model) or plain.scalars else (False, True):

        def trial(forward: Trial, args: Any, kwargs: Any, meter: Meter, draws: bool = draws) -> None:
            with warnings.catch_warnings():
                if not draws:
                    warnings.filterwarnings("error", message=SLOWER)
                shared_forward(
                    forward, _PROBED, args, kwargs, draws=draws, replaced=meter.replaced, quiet=draws
                )

        try:
            both = _tried(traits.place, model, call, trial)
        except Exception as error:
            traits.no_sharing = why(error)
            continue
        traits.no_sharing = _flaw(plain, both)
        if traits.no_sharing is None:
            traits.draws = draws
            suffix = (both.cost - plain.cost) / max(plain.cost, 1)
            traits.prefix = min(max(1 - suffix / (_PROBED - 1), 0.0), 1.0)
            return


def _flaw(plain: Measured, both: Measured) -> str | None:
    if both.scalars:
        return _DECIDES
    if both.draws != _PROBED * (plain.draws - plain.scalars):
        return "an operation draws once for all passes, behind vmap's back"
    if both.reads_replaced:
        return "a tensor is used after a change in place that would tell the passes apart"
    return None


def _look_at_batch(traits: Traits, model: nn.Module, call: Call, options: dict[str, Any]) -> str | None:
    if traits.plain is None:
        return None

    def trial(forward: Trial, args: Any, kwargs: Any, _: Meter) -> None:
        repeated_forward(forward, _PROBED, args, kwargs, **options)

    try:
        both = _tried(traits.place, model, call, trial)
    except Exception as error:
        return why(error)
    # Draws of one number that decide nothing (LayerDrop at rate 0) may be common: the look saw both ends.
    common = traits.plain.scalars if traits.no_sharing is None else 0
    if both.draws != _PROBED * (traits.plain.draws - common) + common:
        return SHARED_DRAW
    return None


def _tried(place: Any, model: nn.Module, call: Call, trial: Trial) -> Measured:
    with place(model, *call) as (forward, args, kwargs):
        return measured(lambda meter: trial(forward, args, kwargs, meter))


def why(error: Exception) -> str:
    """An error in one line; those of torch that models meet under vmap, in the words of passes."""
    lines = str(error).strip().split("\n")
    line = lines[0][:300] if lines[0] else type(error).__name__
    return next((ours for theirs, ours in _IN_OTHER_WORDS.items() if theirs in line), line)

"""One look at a model: whether its passes can share a forward or a batch, and what that costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from regraft.find.walk import inner_model
from regraft.training.passes.measure import Measured, Meter, measured, on_fake_tensors, on_real_tensors
from regraft.training.passes.per_pass_modules import Apart, held_next, keepsakes, modules_of
from regraft.training.passes.repeat import repeated_forward
from regraft.training.passes.scalar_draws import LAST, Decided
from regraft.training.passes.vmap import SLOWER, shared_forward

_PROBED = 2
_OVERHEAD = 1.12
"""Under vmap an operation costs about this much of what it costs in a batch as long."""
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
        apart: classes of modules that "shared" runs once for each pass, see there.
        decides: whether such a module draws a number to decide something.
        elsewhere: why no forward can hold several passes, or None.
        no_batch: why "batch" would not be independent passes; empty until it was looked at.
        plain: one pass as it is, measured for inputs of so many `elements`; None where it could not be.
        place: on what tensors that was.
    """

    no_sharing: str | None = None
    prefix: float = 0.0
    draws: bool = True
    apart: Apart = field(default_factory=dict)
    decides: bool = False
    elsewhere: str | None = None
    no_batch: list[str | None] = field(default_factory=list)
    plain: Measured | None = None
    elements: int = 0
    place: Any = on_fake_tensors

    def cost(self, n: int, chunk: int) -> float:
        """What n passes cost by "shared", in single passes."""
        return self.prefix * -(-n // chunk) + (1 - self.prefix) * n * _OVERHEAD


def looked(model: nn.Module, call: Call) -> Traits:
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


def _plain(forward: Trial, args: tuple[Any, ...], kwargs: dict[str, Any], _: Meter) -> Any:
    return forward(*args, **kwargs)


def _look_at_sharing(traits: Traits, model: nn.Module, call: Call) -> None:
    assert traits.plain is not None
    # Without taking draws over it is faster, and fails on what there is to take over; a kernel that vmap
    # runs pass by pass, as fused attention, is better taken over too, and autocast and decisions need it.
    draws = autocasts(model) or traits.plain.scalars > 0
    apart: Apart = {}
    while True:
        more = None
        try:
            both = _tried(traits.place, model, call, _sharing(model, draws, apart))
            each = _each(traits, model, call)
            reason = _flaw(both, each)
            if reason is None:
                traits.no_sharing, traits.draws, traits.apart = None, draws, apart
                traits.prefix, traits.decides = _prefix(both, each), both.decides
                return
        except Exception as error:
            reason = why(error)
            more = held_next(error, model, apart) if draws else None
        if draws and traits.no_sharing is None:
            # What is wrong with modules held apart would say nothing to anyone.
            traits.no_sharing = reason
        if draws and more is None:
            return
        draws, apart = True, more or apart


def _sharing(model: nn.Module, draws: bool, apart: Apart) -> Trial:
    def trial(forward: Trial, args: Any, kwargs: Any, meter: Meter) -> Any:
        modules = modules_of(model, apart)
        kept = keepsakes(modules)
        with warnings.catch_warnings():
            if not draws:
                warnings.filterwarnings("error", message=SLOWER)
            outputs = shared_forward(
                forward, _PROBED, args, kwargs, draws=draws, apart=modules, look=meter, quiet=draws
            )
        if (name := kept()) is not None:
            raise RuntimeError(f"{name} keeps a tensor, which would be that of one pass")
        return outputs

    return trial


def _each(traits: Traits, model: nn.Module, call: Call) -> list[Measured]:
    """The same passes one after the other, with decisions at the ends of what they can be."""
    assert traits.plain is not None
    if not traits.plain.scalars:
        return [traits.plain] * _PROBED

    def trial_at(number: float) -> Trial:
        def trial(forward: Trial, args: Any, kwargs: Any, meter: Meter) -> Any:
            with Decided(number, meter):
                return forward(*args, **kwargs)

        return trial

    return [_tried(traits.place, model, call, trial_at(number)) for number in (0.0, LAST)]


def _flaw(both: Measured, each: list[Measured]) -> str | None:
    if both.scalars:
        return _DECIDES
    if both.draws != sum(one.draws for one in each):
        return "an operation draws once for all passes, behind vmap's back"
    if both.reads_replaced:
        return "a tensor is used after a change in place that would tell the passes apart"
    if both.outputs != each[0].outputs:
        return "its outputs are gathered by hooks in modules that run once for each pass"
    return None


def _prefix(both: Measured, each: list[Measured]) -> float:
    cost = sum(one.cost for one in each) / _PROBED
    suffix = (both.cost - cost) / max(cost, 1)
    return min(max(1 - suffix / (_PROBED - 1), 0.0), 1.0)


def looked_at_batch(traits: Traits, model: nn.Module, call: Call, options: dict[str, Any]) -> str | None:
    if traits.plain is None:
        return None
    if traits.decides:
        return SHARED_DRAW

    def trial(forward: Trial, args: Any, kwargs: Any, _: Meter) -> Any:
        return repeated_forward(forward, _PROBED, args, kwargs, **options)

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


def autocasts(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return torch.is_autocast_enabled("cpu" if first is None else first.device.type)


def why(error: Exception) -> str:
    """An error in one line; those of torch that models meet under vmap, in the words of passes."""
    lines = str(error).strip().split("\n")
    line = lines[0][:300] if lines[0] else type(error).__name__
    return next((ours for theirs, ours in _IN_OTHER_WORDS.items() if theirs in line), line)

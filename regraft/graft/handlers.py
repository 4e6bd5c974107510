"""What becomes of each function that drops, or draws, while the mode of a module is on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.graft.attention import attend, multi_head_attention, with_dropped_keys
from regraft.graft.recurrent import by_example, layer_by_layer, read_recurrence
from regraft.ops import (
    ATTENTION,
    DROP_PATH,
    FUNCTIONS,
    IN_PLACE,
    MULTI_HEAD,
    OWN_LAW,
    RECURRENT,
    ROW_DRAWS,
    WITH_MASK,
    draws_rows,
)
from regraft.record import Graft
from regraft.variants.module import check_rate
from regraft.variants.registry import spec

_ROUTES = {ATTENTION: "dropout", "dropout": ATTENTION}
"""Operation -> the other way in which libraries write the dropout of attention."""


class CallGrafts:
    """The grafts of one module's calls, by operation, and what they make of a call.

    Args:
        module: the module, or what has its `training`.
        grafts: its grafts of calls.
    """

    def __init__(self, module: Any, grafts: Iterable[Graft]) -> None:
        self.module = module
        self.grafts = {op: graft for graft in grafts for op in reversed(routes(graft))}

    def drop(self, op: str, x: Tensor, p: float, training: bool) -> Tensor | None:
        """What the variant at `op` makes of x; None if the call is to stay as it is."""
        graft = self.grafts.get(op)
        if graft is None:
            return None
        self.refuse_recompute(op)
        rate = call_rate(graft, p)
        training = training and self.module.training
        if graft.variant == "dropout" and op in OWN_LAW:
            kept: Tensor = OWN_LAW[op](x, rate, training)  # a change of the rate keeps the law
            return kept
        made: Tensor = spec(graft.variant).function(x, rate, training, **graft.options)
        return made

    def refuse_recompute(self, op: str) -> None:
        """Raise where a checkpoint would draw another mask; compiled code keeps its random state itself."""


def routes(graft: Graft) -> tuple[str, ...]:
    """The operations that a graft takes over: attention drops in a kernel, or written out.

    Where its module drops nothing else, a later change of the implementation is followed.
    """
    other = _ROUTES.get(graft.slot.op) if graft.edit.get("alone") else None
    return (graft.slot.op,) if other is None else (graft.slot.op, other)


def call_rate(graft: Graft, carried: float) -> float:
    """The rate of one call: the rule's own, or relative to the one that the call carries."""
    if graft.rate is None:
        return carried
    if isinstance(graft.rate, str):
        return min(carried * float(graft.rate[1:]), 1 - 2**-24)
    return float(graft.rate)


def _handle_dropout(mode: CallGrafts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parsed = FUNCTIONS[func](*args, **kwargs)
    inplace = parsed.inplace or func in IN_PLACE
    x = parsed.x.clone() if inplace and parsed.op in mode.grafts else parsed.x
    made = mode.drop(parsed.op, x, parsed.p, parsed.training)
    if made is None:
        return func(*args, **kwargs)
    made = written_back(parsed.x, made) if inplace else made
    return (made, made != 0) if func in WITH_MASK else made


def written_back(x: Tensor, result: Tensor) -> Tensor:
    """`x` with the result in it, as an in-place dropout leaves it: the caller may go on with either.

    Under vmap there may be no room in `x` for the passes, whose own handling of in-place calls holds there.
    """
    return result if _vmapped() else x.copy_(result)


def _handle_attention(mode: CallGrafts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    graft = mode.grafts.get(ATTENTION)
    if graft is None:
        return func(*args, **kwargs)
    call = {**dict(zip(_ATTENTION_NAMES[: len(args)], args, strict=True)), **kwargs}
    carried = float(call.pop("dropout_p", 0.0))
    if graft.variant in ("dropout", "off"):
        # Only the number changes, so the fused kernel stays; under vmap it cannot draw for each pass.
        rate = call_rate(graft, carried) if graft.variant == "dropout" and mode.module.training else 0.0
        if rate > 0 and _vmapped():
            return attend(**call, drop=lambda scores: mode.drop(ATTENTION, scores, carried, training=True))
        return func(**call, dropout_p=rate)
    if not (mode.module.training or graft.in_eval):
        return func(**call, dropout_p=0.0)
    if graft.variant == "dropkey" and graft.options["keys"] == "column" and not _vmapped():
        mode.refuse_recompute(ATTENTION)
        rate = check_rate(call_rate(graft, carried))
        return func(**(with_dropped_keys(call, rate) if rate > 0 else call), dropout_p=0.0)
    return attend(**call, drop=lambda scores: mode.drop(ATTENTION, scores, carried, training=True))


_ATTENTION_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _vmapped() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def _handle_mha(mode: CallGrafts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    graft = mode.grafts.get(MULTI_HEAD)
    if graft is None or not (mode.module.training or graft.in_eval):
        return func(*args, **kwargs)
    rate = FUNCTIONS[func](*args, **kwargs).p

    def drop(scores: Tensor) -> Tensor | None:
        return mode.drop(MULTI_HEAD, scores, rate, training=True)

    # A rate above 0 makes the function call its dropout; which rate, our dropout knows.
    call = {**dict(zip(_MHA_NAMES[: len(args)], args, strict=True)), **kwargs}
    return multi_head_attention(drop, **{**call, "dropout_p": 0.5, "training": True})


_MHA_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _handle_recurrent(mode: CallGrafts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    op = RECURRENT[func]
    graft = mode.grafts.get(op)
    if graft is None or not (mode.module.training or graft.in_eval):
        return func(*args, **kwargs)
    call = read_recurrence(func, args)

    def drop(x: Tensor) -> Tensor | None:
        return mode.drop(op, x, call.p, training=True)

    if spec(graft.variant).activations:
        return layer_by_layer(call, lambda x: by_example(call, x, drop))
    return layer_by_layer(call, drop)


def _handle_rows(mode: CallGrafts, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    graft = mode.grafts.get(DROP_PATH)
    if graft is None or not mode.module.training or not draws_rows(func, args, kwargs):
        return func(*args, **kwargs)
    mode.refuse_recompute(DROP_PATH)
    if func is not Tensor.bernoulli_:
        return func(*args, **kwargs)
    # Out of place and then copied: the module may go on with the tensor, not with what this returns.
    keep = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return args[0].copy_(torch.bernoulli(torch.ones_like(args[0]) * keep))


HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(FUNCTIONS, _handle_dropout),
    F.scaled_dot_product_attention: _handle_attention,
    F.multi_head_attention_forward: _handle_mha,
    **dict.fromkeys(RECURRENT, _handle_recurrent),
    **dict.fromkeys(ROW_DRAWS, _handle_rows),
}
"""Function -> what is done in its place."""

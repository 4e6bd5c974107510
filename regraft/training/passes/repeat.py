"""Strategy "batch": the inputs repeated n times along the batch, in one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regraft.errors import InputsError
from regraft.training.passes.caches import is_cache, repeated, without_caches
from regraft.training.passes.nested import CONSTANTS, leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# What Transformers' forwards take beside the batch, whatever its first axis happens to be.
_NEVER_BATCHED = frozenset(
    {"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask", "num_items_in_batch"}
)


class ScalarOutputError(InputsError):
    """One number came out for all passes together, so there is none for each."""


@dataclass
class Repeated:
    """Inputs repeated `n` times, and what was left as it was because its first axis is not the batch."""

    n: int
    size: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def repeated_forward(
    forward: Callable[..., Any],
    n: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    main: str | None = None,
    unbatched: Collection[str] = (),
) -> Any:
    """All passes in one forward of a batch n times as long; outputs with a new first axis of n."""
    inputs = repeat_inputs(n, args, kwargs, main=main, unbatched=unbatched)
    try:
        outputs = forward(*inputs.args, **inputs.kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        if not inputs.left or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputsError(
            f"the forward failed on the batch repeated {n} times: {error}",
            where="not repeated, for the first axis is not the batch's: " + ", ".join(inputs.left),
            remedy='strategy="loop" leaves the inputs as they are',
        ) from error
    outputs = without_caches(outputs, kwargs)
    return mapped(lambda name, leaf: _split(name, leaf, inputs), "", outputs)


def repeat_inputs(
    n: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    main: str | None = None,
    unbatched: Collection[str] = (),
) -> Repeated:
    """Every tensor whose first axis is the batch, n times after itself.

    Raises:
        InputsError: no tensor to read the batch size from, or an input of which it cannot be known.
    """
    inputs = Repeated(n, _batch_size(args, kwargs, main))
    inputs.args = tuple(_repeat(f"argument {i}", value, inputs) for i, value in enumerate(args))
    for name, value in kwargs.items():
        fixed = name in _NEVER_BATCHED or name in unbatched
        inputs.kwargs[name] = value if fixed else _repeat(name, value, inputs)
    return inputs


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], main: str | None) -> int:
    named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    first = {main: kwargs[main]} if main in kwargs else {}
    for name, value in (first | named).items():
        if name in _NEVER_BATCHED:
            continue
        for _, leaf in leaves(str(name), value):
            if isinstance(leaf, Tensor) and leaf.dim():
                return leaf.shape[0]
    raise InputsError(
        "no input is a tensor with a batch axis",
        where="inputs: " + (", ".join(named) or "none"),
        remedy='strategy="loop" runs the passes one after the other',
    )


def _repeat(name: str, value: Any, inputs: Repeated) -> Any:
    if is_cache(value):
        return repeated(value, inputs.size, inputs.n)
    if isinstance(value, (list, tuple)) and len(value) == inputs.size and _holds_no_tensor(value):
        raise InputsError(
            f"{name!r} has {inputs.size} entries, as many as the batch: one for each sample, or not?",
            where=name,
            remedy=f'unbatched=({name!r},) passes it as it is, strategy="loop" leaves all inputs alone',
        )
    if isinstance(value, PackedSequence):
        raise _unrepeatable(name, value)
    return mapped(lambda at, leaf: _repeat_leaf(at, leaf, inputs), name, value)


def _repeat_leaf(name: str, leaf: Any, inputs: Repeated) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.dim() and leaf.shape[0] == inputs.size:
            return leaf.repeat(inputs.n, *[1] * (leaf.dim() - 1))
        if leaf.dim() and leaf.shape[0] != 1:
            inputs.left.append(f"{name} {tuple(leaf.shape)}")
        return leaf
    if isinstance(leaf, CONSTANTS):
        return leaf
    raise _unrepeatable(name, leaf)


def _unrepeatable(name: str, value: Any) -> InputsError:
    return InputsError(
        f"{name!r} is a {type(value).__name__}, which cannot be repeated along the batch",
        where=name,
        remedy=f'unbatched=({name!r},) passes it as it is, strategy="loop" leaves all inputs alone',
    )


def _holds_no_tensor(value: Any) -> bool:
    return not any(isinstance(leaf, Tensor) or leaf is None for _, leaf in leaves("", value))


def _split(name: str, leaf: Any, inputs: Repeated) -> Any:
    if not isinstance(leaf, Tensor):
        if isinstance(leaf, CONSTANTS):
            return leaf
        raise InputsError(
            f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
            where=name,
            remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
        )
    if not leaf.dim():
        raise ScalarOutputError(
            f"the output {name or 'itself'!r} is one number for all {inputs.n} passes together",
            where=name or "the output",
            remedy='leave out what makes it (labels), or use strategy="loop", which has one for each pass',
        )
    total = inputs.n * inputs.size
    if total and leaf.shape[0] % total == 0 and leaf.shape[0]:
        # Also (batch * time, ...), as mixture-of-experts routers give it: the passes are the slowest index.
        return leaf.reshape(inputs.n, leaf.shape[0] // inputs.n, *leaf.shape[1:])
    return leaf.expand(inputs.n, *leaf.shape)

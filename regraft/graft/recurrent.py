"""A recurrent network run layer by layer, for variants with a noise of their own between its layers.

Torch runs all layers of an `nn.LSTM` in one kernel, which draws its dropout inside. One layer after the
other computes the same, and what is between them can be dropped by any variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Recurrence:
    """A call of such a kernel, read; its arguments differ between padded and packed sequences.

    Attributes:
        func: the kernel.
        x: the input, or the data of a packed sequence.
        sizes: the batch sizes of a packed sequence, else nothing.
        states: of all layers: h, of an LSTM h and c; each (layers * directions, batch, features).
        weights: of all layers and directions, one after the other.
        biased: have the layers biases?
        layers: how many.
        p: the rate between them.
        training: does it drop?
        rest: what comes behind: bidirectional, and for padded sequences batch_first.
    """

    func: Callable[..., Any]
    x: Tensor
    sizes: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    weights: list[Tensor]
    biased: bool
    layers: int
    p: float
    training: bool
    rest: tuple[bool, ...]


def read_recurrence(func: Callable[..., Any], args: tuple[Any, ...]) -> Recurrence:
    """The call `func(*args)`, read."""
    at = max(index for index, one in enumerate(args) if isinstance(one, (list, tuple)))
    states = args[at - 1]
    biased, layers, p, training, *rest = args[at + 1 :]
    return Recurrence(
        func,
        args[0],
        tuple(args[1 : at - 1]),
        (states,) if isinstance(states, Tensor) else tuple(states),
        list(args[at]),
        biased,
        layers,
        p,
        training,
        tuple(rest),
    )


def layer_by_layer(call: Recurrence, drop: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, ...]:
    """What the call gives, with `drop` between its layers: the output and the last states of all layers."""
    directions = 2 if call.rest[0] else 1
    many = len(call.weights) // call.layers
    x, ends = call.x, []
    for layer in range(call.layers):
        if layer:
            dropped = drop(x)
            x = x if dropped is None else dropped
        states = [one[layer * directions : (layer + 1) * directions] for one in call.states]
        given = states if call.func is torch.lstm else states[0]
        weights = call.weights[layer * many : (layer + 1) * many]
        x, *end = call.func(x, *call.sizes, given, weights, call.biased, 1, 0.0, call.training, *call.rest)
        ends.append(end)
    return x, *(torch.cat(one) for one in zip(*ends, strict=True))


def by_example(call: Recurrence, x: Tensor, drop: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """What `drop` makes of the output of a layer, given to it as (B, T, C) whatever its order here."""
    if call.sizes:
        padded, lengths = pad_packed_sequence(PackedSequence(x, call.sizes[0]), batch_first=True)
        dropped = drop(padded)
        return None if dropped is None else pack_padded_sequence(dropped, lengths, batch_first=True).data
    if call.rest[1]:
        return drop(x)
    dropped = drop(x.transpose(0, 1))
    return None if dropped is None else dropped.transpose(0, 1)

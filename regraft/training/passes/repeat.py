"""Strategy "batch": the inputs repeated along the batch, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regraft.errors import InputsError
from regraft.training.passes.caches import Call, is_cache, with_rows, without_caches
from regraft.training.passes.nested import CONSTANTS, leaves, mapped

# What Transformers' forwards take beside the batch, whatever its first axis happens to be.
_NEVER_BATCHED = frozenset(
    {"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask", "num_items_in_batch"}
)


class NoBatchAxisError(InputsError):
    """An output of the repeated batch has no axis that could be taken apart into passes."""


class Batch:
    """The arguments of a forward, and which of their tensors have the batch as their first axis.

    A tensor with another first axis is left alone. Whether that is right, and whether the axis is the batch
    at all, is for `independence` to show.

    Args:
        call: positional and keyword arguments of the forward.
        main: the keyword argument that says how long the batch is, if it is given.
        unbatched: keyword arguments that are left alone, although their first axis is as long as the batch.

    Attributes:
        size: the length of the batch.
        tensors: those that have it.
        left: names and shapes of tensors with another first axis.

    Raises:
        InputsError: no tensor to read the length from, or an input of which it cannot be known.
    """

    def __init__(self, call: Call, main: str | None = None, unbatched: Collection[str] = ()) -> None:
        self.call = call
        self.unbatched = _NEVER_BATCHED | set(unbatched)
        self.size = self._length(main)
        self.tensors: list[Tensor] = []
        self.left: list[str] = []
        self._mapped(self._note, None)

    def repeated(self, n: int) -> Call:
        """The batch n times after itself."""
        rows = torch.arange(self.size).repeat(n)
        return self._mapped(lambda x: x.repeat(n, *[1] * (x.dim() - 1)), rows)

    def with_rows(self, rows: list[int]) -> Call:
        """A batch of these of its rows."""
        index = torch.tensor(rows)
        return self._mapped(lambda x: x[index.to(x.device)], index)

    def _note(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        return x

    def _length(self, main: str | None) -> int:
        args, kwargs = self.call
        named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        first = {main: kwargs[main]} if main in kwargs else {}
        for name, value in (first | named).items():
            if name in self.unbatched:
                continue
            for _, leaf in leaves(str(name), value):
                if isinstance(leaf, Tensor) and leaf.dim():
                    return leaf.shape[0]
        raise InputsError(
            "no input is a tensor with a batch axis",
            where="inputs: " + (", ".join(named) or "none"),
            remedy='strategy="loop" runs the passes one after the other',
        )

    def _mapped(self, take: Callable[[Tensor], Tensor], rows: Tensor | None) -> Call:
        def change(name: str, leaf: Any) -> Any:
            if is_cache(leaf):
                return leaf if rows is None else with_rows(leaf, rows)
            if isinstance(leaf, Tensor):
                if leaf.dim() and leaf.shape[0] == self.size:
                    return take(leaf)
                if rows is None and leaf.dim() and leaf.shape[0] != 1:
                    self.left.append(f"{name} {tuple(leaf.shape)}")
                return leaf
            if isinstance(leaf, CONSTANTS):
                return leaf
            raise _unrepeatable(name, leaf)

        args, kwargs = self.call
        new = tuple(self._value(f"argument {i}", value, change) for i, value in enumerate(args))
        return new, {
            name: value if name in self.unbatched else self._value(name, value, change)
            for name, value in kwargs.items()
        }

    def _value(self, name: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == self.size and _holds_no_tensor(value):
            raise InputsError(
                f"{name!r} has {self.size} entries, as many as the batch: one for each sample, or not?",
                where=name,
                remedy=f'unbatched=({name!r},) passes it as it is, strategy="loop" leaves all inputs alone',
            )
        if isinstance(value, PackedSequence):
            raise _unrepeatable(name, value)
        return mapped(change, name, value)


def repeated_forward(forward: Callable[..., Any], n: int, batch: Batch) -> Any:
    """All passes in one forward of a batch n times as long; outputs with a new first axis of n.

    Raises:
        InputsError: the forward cannot take such a batch.
        NoBatchAxisError: an output's first axis is not the batch.
    """
    args, kwargs = batch.repeated(n)
    try:
        outputs = forward(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        if not batch.left or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputsError(
            f"the forward failed on the batch repeated {n} times: {error}",
            where="not repeated, for the first axis is not the batch's: " + ", ".join(batch.left),
            remedy='strategy="loop" leaves the inputs as they are',
        ) from error

    def split(name: str, leaf: Any) -> Any:
        check_batched(name, leaf, n * batch.size)
        return leaf.reshape(n, batch.size, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf

    return mapped(split, "", without_caches(outputs, kwargs))


def check_batched(name: str, leaf: Any, size: int) -> None:
    """Raise unless an output is a tensor whose first axis is a batch of `size`, or a constant."""
    if not isinstance(leaf, (Tensor, *CONSTANTS)):
        raise InputsError(
            f"the output {name!r} is a {type(leaf).__name__}, which cannot be taken apart into passes",
            where=name,
            remedy='use_cache=False, if it is a cache of keys and values; or strategy="loop"',
        )
    if not isinstance(leaf, Tensor) or (leaf.dim() and leaf.shape[0] == size):
        return
    what = "is one number for all passes together"
    if leaf.dim():
        what = f"has the shape {tuple(leaf.shape)}, whose first axis is not the batch"
    raise NoBatchAxisError(
        f"the output {name or 'itself'!r} {what}",
        where=name or "the output",
        remedy='leave out what makes it (labels), or use strategy="loop", which has one for each pass',
    )


def _unrepeatable(name: str, value: Any) -> InputsError:
    return InputsError(
        f"{name!r} is a {type(value).__name__}, which cannot be repeated along the batch",
        where=name,
        remedy=f'unbatched=({name!r},) passes it as it is, strategy="loop" leaves all inputs alone',
    )


def _holds_no_tensor(value: Any) -> bool:
    return not any(isinstance(leaf, Tensor) or leaf is None for _, leaf in leaves("", value))

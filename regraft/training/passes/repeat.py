"""Strategy "batch": the inputs repeated along the batch, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regraft.errors import InputsError
from regraft.training.passes.nested import (
    CONSTANTS,
    Call,
    check_output,
    copied,
    is_cache,
    leaves,
    mapped,
    outputs_of,
    tensors_in,
)

# What Transformers' forwards take beside the batch, whatever its first axis happens to be.
_NEVER_BATCHED = frozenset(
    {"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask", "num_items_in_batch"}
)


class NoBatchAxisError(InputsError):
    """An output of the repeated batch has no axis that could be taken apart into passes."""


class Batch:
    """The arguments of a forward, and which of their tensors have the batch as their first axis.

    Those with another first axis are left alone, and so are keyword arguments that `unbatched` names. Whether
    that is right, and whether the axis is the batch at all, is for `rows` to show.
    """

    def __init__(self, call: Call, main: str | None = None, unbatched: Collection[str] = ()) -> None:
        self.call = call
        args, kwargs = call
        left_alone = _NEVER_BATCHED | set(unbatched)
        named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        self._batched = {name: value for name, value in named.items() if name not in left_alone}
        first = {main: named[main]} if main in self._batched else {}
        axes = [len(x) for x in tensors_in(first | self._batched) if x.dim()]
        if not axes:
            raise InputsError(
                "no input is a tensor with a batch axis",
                where="inputs: " + (", ".join(named) or "none"),
                remedy='strategy="loop" runs the passes one after the other',
            )
        self.size = axes[0]
        self._check()
        every = [leaf for name, value in self._batched.items() for leaf in leaves(name, value)]
        tensors = [(name, x) for name, x in every if isinstance(x, Tensor) and x.dim()]
        self.tensors = [x for _, x in tensors if len(x) == self.size]
        # Names and shapes of those with another first axis.
        self.left = [f"{name} {tuple(x.shape)}" for name, x in tensors if len(x) not in (1, self.size)]

    def repeated(self, n: int) -> Call:
        """The batch n times after itself."""
        rows = torch.arange(self.size).repeat(n)
        return self._changed(lambda x: x.repeat(n, *[1] * (x.dim() - 1)), rows)

    def with_rows(self, rows: list[int]) -> Call:
        """A batch of these of its rows."""
        index = torch.tensor(rows)
        return self._changed(lambda x: x[index.to(x.device)], index)

    def with_tensors(self, tensors: Iterable[Tensor]) -> Call:
        """The call with these in the places of its `tensors`."""
        following = iter(tensors)
        return self._changed(lambda _: next(following), torch.zeros(1, dtype=torch.long))

    def _check(self) -> None:
        """Raise for what may hold an entry for each row, or not."""
        for name, value in self._batched.items():
            every = list(leaves(name, value))
            listed = isinstance(value, (list, tuple)) and len(value) == self.size
            what = ""
            if listed and not any(isinstance(leaf, Tensor) or leaf is None for _, leaf in every):
                what = f"{name!r} has {self.size} entries, as many as the batch: one for each sample, or not?"
            for path, leaf in [(name, value)] if isinstance(value, PackedSequence) else every:
                if not isinstance(leaf, (Tensor, *CONSTANTS)) and not is_cache(leaf):
                    what = f"{path!r} is a {type(leaf).__name__}, which cannot be repeated along the batch"
            if what:
                remedy = f'unbatched=({name!r},) passes it as it is, strategy="loop" leaves all inputs alone'
                raise InputsError(what, where=name, remedy=remedy)

    def _changed(self, change: Callable[[Tensor], Tensor], rows: Tensor) -> Call:
        """The call with every tensor of the batch changed, and a copy of each cache for these rows."""

        def new(_: str, leaf: Any) -> Any:
            if is_cache(leaf):
                cache = copied(leaf)
                if cache.get_seq_length():
                    cache.reorder_cache(rows)
                return cache
            return (
                change(leaf) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.size else leaf
            )

        changed = {name: mapped(new, name, value) for name, value in self._batched.items()}
        args, kwargs = self.call
        return tuple(changed.get(f"argument {i}", value) for i, value in enumerate(args)), {
            name: changed.get(name, value) for name, value in kwargs.items()
        }


def repeated_forward(forward: Callable[..., Any], n: int, batch: Batch) -> Any:
    """All passes in one forward of a batch n times as long; outputs with a new first axis of n."""
    try:
        outputs = outputs_of(forward, batch.repeated(n))
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

    return mapped(split, "", outputs)


def check_batched(name: str, leaf: Any, size: int) -> None:
    """Raise unless an output is a tensor whose first axis is a batch of `size`, or a constant."""
    check_output(name, leaf)
    if not isinstance(leaf, Tensor) or (leaf.dim() and len(leaf) == size):
        return
    what = "is one number for all passes together"
    if leaf.dim():
        what = f"has the shape {tuple(leaf.shape)}, whose first axis is not the batch"
    raise NoBatchAxisError(
        f"the output {name or 'itself'!r} {what}",
        where=name or "the output",
        remedy='leave out what makes it (labels), or use strategy="loop", which has one for each pass',
    )

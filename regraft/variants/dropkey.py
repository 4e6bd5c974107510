"""DropKey: random keys take no part in attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from regraft.variants.checks import check_choice
from regraft.variants.draws import HALVES, keep_mask
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def dropkey(x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, keys: str = "column") -> Tensor:
    """Each key is masked with probability p before the softmax: the others share the attention.

    Masking scores before the softmax and dividing what is left of the weights by its sum are the same
    function, so it takes attention weights, which is what a dropout of attention is given. A query all of
    whose keys were drawn keeps them all.

    Options:
        keys: "column" masks the same keys for all queries of a head; "element" draws for each query and
            key, and so needs a mask of L x S.

    Shape:
        (..., L, S): queries and keys on the last two axes; the output's is the input's.

    Source:
        Li, Hu, Nie, Han, Jiang, Guo, Liu (2023), "DropKey for vision transformer"; Wang, Chen, Jiang, Xue,
        Kong, Wu (2024), "LoRA meets dropout under a unified framework" ("HiddenKey": `keys="column"`).

    Differs:
        the paper masks with a large negative number, so that a row without any key attends to all of
        them evenly; here it attends as without DropKey.

    Example:
        >>> import torch
        >>> y = dropkey(torch.full((2, 8, 5, 5), 0.2), p=0.5)
        >>> bool((y == y[..., :1, :]).all()), bool((y.sum(-1) - 1).abs().max() < 1e-6)
        (True, True)
    """
    if not acts(p, training):
        return x
    wide = x.float() if x.dtype in HALVES else x
    kept = wide * keep_mask(wide, key_shape(x.shape, keys), p)
    total = kept.sum(-1, keepdim=True)
    none = total == 0
    shared = kept / total.masked_fill(none, 1)
    # Not `where`, which would give the output the layout of the smaller tensor.
    return torch.addcmul(shared, wide, none.to(wide.dtype)).to(x.dtype)


def key_shape(shape: Sequence[int], keys: str) -> list[int]:
    """The shape of the draw for attention weights of `shape`."""
    return [1 if keys == "column" and axis == len(shape) - 2 else size for axis, size in enumerate(shape)]


@Spec(
    "dropkey", dropkey, checks={"keys": partial(check_choice, choices=("column", "element"))}, attention=True
)
class DropKey(DropoutVariant):
    """`dropkey` as a module, on attention weights: `DropKey(p=0.2, *, keys='column')`."""

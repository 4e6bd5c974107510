"""DropBlock: contiguous blocks of a feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regraft.variants.checks import check_count, check_switch
from regraft.variants.draws import channel_axis_of, keep_mask, times_mask
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def dropblock(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    block_size: int = 7,
    couple_channels: bool = False,
) -> Tensor:
    """Contiguous blocks are dropped from each channel; every element with probability p exactly.

    Blocks have `block_size` elements along every axis but those of examples and channels: squares in
    (B, C, H, W), stretches of positions in (B, T, C), single elements in (B, C). Along a shorter axis
    they are as long as the axis.

    Options:
        block_size: the blocks' side.
        couple_channels: whether all channels of an example lose the same blocks.

    Shape:
        (B, C, H, W), (B, T, C), (B, C), ...; the output's is the input's.

    Source:
        Ghiasi, Lin, Le (2018), "DropBlock: a regularization method for convolutional networks".

    Differs:
        blocks may begin outside the map (only the part inside drops), so that borders are dropped as
        often as the middle, and the rate of blocks allows for overlaps: in the paper p is met only
        roughly. What is kept is divided by 1 - p; the paper divides by the kept share of the whole
        batch, which ties the examples to each other.

    Example:
        >>> import torch
        >>> dropblock(torch.ones(2, 3, 8, 8), p=0.1, block_size=3).shape
        torch.Size([2, 3, 8, 8])
    """
    if not acts(p, training):
        return x
    channels = channel_axis_of(x)
    blocks = [1 if at in (0, channels) else min(block_size, size) for at, size in enumerate(x.shape)]
    # A block reaches an element from as many places as it has elements; all of them are to be clear.
    clear_rate = (1 - p) ** (1 / max(math.prod(blocks), 1))
    axes = [1 if couple_channels and at == channels else size for at, size in enumerate(x.shape)]
    starts = [size + max(block, 1) - 1 for size, block in zip(axes, blocks, strict=True)]
    clear = keep_mask(x, starts, 1 - clear_rate, torch.bool)
    for axis, block in enumerate(blocks):
        clear = _clear_windows(clear, axis, block)
    mask = clear.to(x.dtype)
    del clear  # before the product: one mask at a time is enough
    return times_mask(x, mask, 1 / (1 - p))


def _clear_windows(clear: Tensor, axis: int, width: int) -> Tensor:
    """Where all of `width` neighbours along `axis` are clear, found by doubling the window."""
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        size = clear.shape[axis] - step
        clear = clear.narrow(axis, 0, size) & clear.narrow(axis, step, size)
        reach += step
    return clear


@Spec(
    "dropblock",
    dropblock,
    checks={"block_size": check_count, "couple_channels": check_switch},
    activations=True,
)
class DropBlock(DropoutVariant):
    """`dropblock` as a module: `DropBlock(p=0.2, *, block_size=7, couple_channels=False)`."""

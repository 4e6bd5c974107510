"""The random draws that variants share.

All are out of place, from the device's default generator: `torch.manual_seed`, checkpointing and
`torch.func.vmap(..., randomness="different")` then behave (an in-place draw on a tensor that has no
pass axis yet raises under vmap).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
CODES = 1 << 16
"""How many values a 16-bit draw has."""
SMALLEST_RATE = 2.0**-10
"""Smallest p and 1 - p for which a 16-bit draw is fine enough; below it the draw is exact."""
_VIEWS_UNDER_VMAP = torch._C._dispatch_has_kernel_for_dispatch_key("aten::view.dtype", "FuncTorchBatched")


def keep_mask(
    x: Tensor,
    shape: Sequence[int],
    p: float,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """1 with probability 1 - p, else 0, exactly, in `dtype` or else x's."""
    dtype = dtype or x.dtype
    if torch.compiler.is_compiling():
        # What a compiler makes of bernoulli; written so, a rate that changes is an input of the graph
        # and not a constant, which would compile it anew.
        return (torch.rand(tuple(shape), device=x.device) < 1 - p).to(dtype)
    # On an empty tensor: bernoulli has no derivative, so it must not see an x that requires one.
    whole = tuple(shape) == x.shape
    like = torch.empty_like(x, dtype=dtype) if whole else x.new_empty(tuple(shape), dtype=dtype)
    return torch.bernoulli(like, 1 - p, generator=generator)


def thinned(x: Tensor, p: float, shared: Collection[int] = ()) -> Tensor:
    """X with elements dropped with probability p, the rest divided by 1 - p; one draw along `shared` axes."""
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    return times_mask(x, keep_mask(x, shape, p), 1 / (1 - p))


def channel_axis_of(x: Tensor, given: int | None = None) -> int:
    """The axis of the features: `given`, else 1 of (B, C, H, W) and its like, the last of any other."""
    if given is not None:
        return given % x.dim()
    return 1 if x.dim() >= 4 else x.dim() - 1


def uniform_like(x: Tensor) -> Tensor:
    """Uniform on [0, 1), real, in float32 for half precisions, whose own draw is coarse and biased."""
    dtype = torch.float32 if x.dtype in HALVES else real_dtype(x)
    return torch.rand_like(x, dtype=dtype, requires_grad=False)


def real_dtype(x: Tensor) -> torch.dtype:
    """X's dtype; of a complex x, that of its parts."""
    return x.real.dtype if x.is_complex() else x.dtype


def times_mask(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """X * mask * scale; overwrites the mask."""
    if x.dtype in HALVES:
        # As a number in a tensor the scale would be rounded to 8 or 11 bits, a bias of its own; as a
        # scalar it is multiplied in float32.
        return (x * mask).mul_(scale)
    return x * mask.mul_(scale)


def coarse(x: Tensor, p: float, exact: bool) -> bool:
    """Whether to use a 16-bit draw: not under a compiler, which fuses the plain draw, nor for subclasses."""
    # vmap in older torch has no rule for a view in another dtype.
    viewed = _VIEWS_UNDER_VMAP or not torch._C._are_functorch_transforms_active()
    return not exact and plain(x) and SMALLEST_RATE <= p <= 1 - SMALLEST_RATE and viewed


def plain(x: Tensor) -> bool:
    """Is x an ordinary tensor that runs now: no subclass, nor under a compiler?"""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, nn.Parameter)


def fast_keep_mask(
    x: Tensor, p: float, exact: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """`keep_mask` of x's own shape, at a seventh of the cost: its probability is within 2^-17."""
    if not coarse(x, p, exact):
        return keep_mask(x, x.shape, p, generator=generator)
    codes = in_layout(codes16(x, x.numel(), generator), x).to(torch.float32)
    # 1 where the code is below the threshold, both whole numbers; half the cost of a boolean mask.
    mask = codes.neg_().add_(round((1 - p) * CODES) - CODES // 2).clamp(0, 1)
    return mask.to(x.dtype)


def codes16(x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` uniform 16-bit integers (int16) on x's device, four for each 64-bit draw."""
    size, kind = ((count + 3) // 4,), torch.int64
    words = torch.randint(-(2**63), 2**63 - 1, size, dtype=kind, device=x.device, generator=generator)
    return words.view(torch.int16)[:count]


def in_layout(flat: Tensor, x: Tensor) -> Tensor:
    """A flat tensor of x.numel() values in x's shape, and in its order in memory (channels last, ...)."""
    if x.is_contiguous():
        return flat.view(x.shape)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    back = sorted(range(x.dim()), key=order.__getitem__)
    return flat.view([x.shape[axis] for axis in order]).permute(back)

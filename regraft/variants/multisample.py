"""Multi-sample dropout: the mean of K dropout masks, in one draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from regraft.variants.checks import check_choice, check_count, check_switch
from regraft.variants.draws import CODES, HALVES, SMALLEST_RATE, coarse, codes16, in_layout, plain
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def multisample_dropout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    num_samples: int = 8,
    match: str = "rate",
    exact: bool = False,
) -> Tensor:
    """X times the mean of `num_samples` independent dropout masks: Binomial(K, 1-p) / (K (1-p)).

    The K masks are never drawn: how many of them keep an element is one binomial number, looked up in a
    table by a 16-bit random integer. The backward pass keeps that count, one byte an
    element (plain dropout keeps a whole mask of x's dtype on a CPU).

    Before a linear layer the mean of the masks gives the mean of the K heads' logits. Inoue's method
    proper averages the K *losses*: that is `regraft.stochastic_passes(model, K)` and the mean of the
    losses, which shares everything before the dropout.

    Options:
        p: probability to drop, in each mask; of plain dropout as strong with `match="variance"`.
        num_samples: K, from 1 to 255.
        match: "rate" gives each mask the rate p, so that the noise has 1/K of the variance of dropout at p;
            "variance" gives each mask the higher rate K p / (1 + (K - 1) p), whose noise has that variance.
        exact: draw from 53-bit uniforms. Otherwise each probability is within 2^-16 of the
            binomial's; below p or 1 - p of 2^-10 the draw is exact in any case.

    Shape:
        any; the output's is the input's.

    Source:
        Inoue (2019), "Multi-sample dropout for accelerated training and better generalization".

    Differs:
        the mean of the masks, not of the losses.

    Example:
        >>> import torch
        >>> y = multisample_dropout(torch.ones(1000), p=0.5, num_samples=2)
        >>> sorted(set(y.tolist()))
        [0.0, 1.0, 2.0]
    """
    if not acts(p, training):
        return x
    if match == "variance":
        p = num_samples * p / (1 + (num_samples - 1) * p)
    counts = _counts(x, p, num_samples, exact)
    scale = 1 / (num_samples * (1 - p))
    if plain(x) and not torch._C._are_functorch_transforms_active():
        scaled: Tensor = _Scaled.apply(x, counts, scale)
        return scaled
    # A product with the integer counts keeps them, and nothing larger, for the backward pass.
    if x.dtype is torch.float16:
        return (x * scale) * counts  # the other way round, K times x may overflow on its way
    return (x * counts) * scale


class _Scaled(torch.autograd.Function):
    """X * counts * scale, written by hand: a product of unlike dtypes allocates a second mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(counts)
        ctx.save_for_forward(counts)
        if x.dtype in HALVES:  # in which the scale would be rounded, and K times x may overflow
            return counts.to(x.dtype).mul_(x * scale)
        return counts.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _times(grad, ctx.saved_tensors[0], ctx.scale), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _times(tangent, ctx.saved_tensors[0], ctx.scale)


def _times(slope: Tensor, counts: Tensor, scale: float) -> Tensor:
    if slope.dtype in HALVES:
        return counts.to(slope.dtype) * (slope * scale)
    return counts.to(slope.dtype).mul_(scale) * slope


def _tails(num_samples: int, p: float) -> list[float]:
    """P(Binomial(K, 1-p) >= k) for k = 1..K."""
    counts = range(num_samples, 0, -1)
    masses = (math.comb(num_samples, k) * (1 - p) ** k * p ** (num_samples - k) for k in counts)
    return list(accumulate(masses))[::-1]


def _counts(x: Tensor, p: float, num_samples: int, exact: bool) -> Tensor:
    """How many of the masks keep each element, as uint8."""
    if coarse(x, p, exact):
        table = _table(p, num_samples, x.device)

        def looked_up(size: int) -> Tensor:
            # The index is what takes room, 4 bytes an element.
            return table.index_select(0, codes16(x, size).view(torch.uint16).to(torch.int32))

        return _in_pieces(x, looked_up)
    fine = exact or not SMALLEST_RATE <= p <= 1 - SMALLEST_RATE
    wide = torch.float64 if fine and x.device.type != "mps" else torch.float32  # mps has no float64
    tails = _tails(num_samples, p)
    if plain(x):
        return _in_pieces(x, lambda size: _passed(torch.rand(size, dtype=wide, device=x.device), tails))
    return _passed(torch.rand_like(x, dtype=wide, requires_grad=False), tails)


def _in_pieces(x: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """`draw(count)` for all elements of x; on a CPU in up to 8 parts, which need less memory meanwhile."""
    count = x.numel()
    size = max(1 << 19, -(-count // 8)) if x.device.type == "cpu" else count
    if count <= size:
        counts = draw(count)
    elif torch._C._are_functorch_transforms_active():  # vmap draws for each of its passes
        counts = torch.cat([draw(min(size, count - start)) for start in range(0, count, size)])
    else:
        counts = torch.empty(count, dtype=torch.uint8, device=x.device)
        for part in torch.split(counts, size):
            part.copy_(draw(len(part)))
    return in_layout(counts, x)


def _passed(draw: Tensor, tails: Sequence[float]) -> Tensor:
    """How many of the tails are above the draw.

    A comparison for each tail is what a compiler fuses, and what a CPU does fastest; an accelerator would
    start two kernels for each, and searches the sorted tails in one.
    """
    if draw.device.type != "cpu" and not torch.compiler.is_compiling():
        return torch.bucketize(draw, _edges(tails, draw), out_int32=True, right=True).to(torch.uint8)
    first, *others = tails
    counts = (draw < first).to(torch.uint8)
    for tail in others:
        counts = counts + (draw < tail)
    return counts


_tables: dict[Any, Tensor] = {}


def _table(p: float, num_samples: int, device: torch.device) -> Tensor:
    """The count for each 16-bit code."""

    def build() -> Tensor:
        codes = torch.arange(CODES, device=device)
        table = torch.zeros(CODES, dtype=torch.uint8, device=device)
        for tail in _tails(num_samples, p):
            table = table + (codes < round(tail * CODES))
        return table

    return _kept((p, num_samples, device), build)


def _edges(tails: Sequence[float], draw: Tensor) -> Tensor:
    """One minus each tail, sorted: as many edges are at or below a uniform draw as the count is."""

    def build() -> Tensor:
        numbers = [torch.full((), 1 - tail, dtype=draw.dtype, device=draw.device) for tail in tails]
        return torch.stack(numbers)

    return _kept((tuple(tails), draw.dtype, draw.device), build)


def _kept(key: Any, build: Callable[[], Tensor]) -> Tensor:
    """The tensor built at the first call; on the device itself, so that no call waits for a copy."""
    if key in _tables:
        return _tables[key]
    table = build()
    # A fake tensor belongs to its mode; inside a functorch transform a tensor is a wrapper that dies with
    # it; made while a CUDA graph is captured it holds nothing yet.
    lasts = type(table) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(table)
    if lasts and not (table.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_tables) >= 64:  # a schedule changes p at every step
            _tables.clear()
        _tables[key] = table
    return table


@Spec(
    "multisample",
    multisample_dropout,
    checks={
        "num_samples": partial(check_count, least=1, most=255),
        "match": partial(check_choice, choices=("rate", "variance")),
        "exact": check_switch,
    },
)
class MultiSampleDropout(DropoutVariant):
    """`multisample_dropout` as a module.

    `MultiSampleDropout(p=0.2, *, num_samples=8, match='rate', exact=False)`.
    """

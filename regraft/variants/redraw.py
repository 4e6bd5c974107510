"""Noise on a weight that is drawn anew in the backward pass, from a saved seed, instead of being kept.

A weight and its mask are as large as the layer: kept for the backward pass they would double its memory.
The noise is a function of a seed, so the backward pass draws the same again. Under a compiler, which plans
its own memory, and under `torch.func` the noise is an ordinary tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from regraft.errors import ModelError
from regraft.variants.draws import HALVES, fast_keep_mask, plain


class Noise(NamedTuple):
    """What multiplies a weight: of mean 1 and variance p / (1 - p)."""

    p: float
    kind: str = "bernoulli"
    exact: bool = False

    def draw(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What multiplies a weight, the mask not yet scaled: the same for the same state of the generator."""
        if self.kind == "bernoulli":
            return fast_keep_mask(weight, self.p, self.exact, generator)
        deviation = (self.p / (1 - self.p)) ** 0.5
        wide = torch.float32 if weight.dtype in HALVES else weight.dtype
        if generator is None:
            normal = torch.randn_like(weight, dtype=wide, requires_grad=False)
        else:
            normal = torch.randn(weight.shape, dtype=wide, device=weight.device, generator=generator)
        return normal.mul_(deviation).add_(1)

    def redraw(self, weight: Tensor, seed: int) -> Tensor:
        """What is drawn from a seed, each time the same."""
        return self.draw(weight, torch.Generator(device=weight.device).manual_seed(seed))

    def times(self, x: Tensor, drawn: Tensor) -> Tensor:
        """X times what was drawn for a weight of its shape."""
        product = (x * drawn).to(x.dtype)
        # As a scalar the scale is multiplied in float32; in a tensor of 16 bits it would be rounded.
        return product.mul_(1 / (1 - self.p)) if self.kind == "bernoulli" else product

    def mixed(self, weight: Tensor, base: Tensor | None, drawn: Tensor) -> Tensor:
        """`base + (weight - base) * drawn`; a base of None is 0."""
        return self.times(weight, drawn) if base is None else self.times(weight - base, drawn).add_(base)


def noisy_weight(weight: Tensor, noise: Noise, base: Tensor | None = None) -> Tensor:
    """`base + (weight - base) * noise`; a base of None is 0."""
    if _redraws(weight):
        noisy: Tensor = _Noisy.apply(None, weight, None, base, noise, _seed())
        return noisy
    try:
        return noise.mixed(weight, base, noise.draw(weight))
    except NotImplementedError as error:
        raise ModelError(
            f"the weight is of type {type(weight).__name__}, no plain numbers that could be dropped",
            remedy="call eval(), in which it computes as before; to train, revert before quantizing",
        ) from error


def noisy_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, base: Tensor | None = None
) -> Tensor:
    """A linear layer with `noisy_weight`, which keeps x and the weight, as the plain layer does."""
    if not (plain(x) and _redraws(weight)):
        return linear(x, noisy_weight(weight, noise, base), bias)
    x, weight, bias = as_autocast_has_them(x, weight, bias)
    base = None if base is None else base.to(weight.dtype)
    # As rows: what a function of autograd returns must be no view, or nothing can change it in place.
    product: Tensor = _Noisy.apply(x.reshape(-1, x.shape[-1]), weight, bias, base, noise, _seed())
    return product.view(*x.shape[:-1], len(weight))


def _redraws(weight: Tensor) -> bool:
    # Whether gradients are on must not matter: a checkpoint runs with and without, and draws the same.
    return plain(weight) and not weight.is_meta and not torch._C._are_functorch_transforms_active()


def _seed() -> int:
    # From the CPU's generator, on any device: reading a number from another would wait for it.
    return int(torch.randint(2**62, (), device="cpu"))


class _Noisy(torch.autograd.Function):
    """The noisy weight, or, given rows x, their linear layer with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        base: Tensor | None,
        noise: Noise,
        seed: int,
    ) -> Tensor:
        # Of the weight alone only the shape and the order in memory are needed again: nothing is copied.
        ctx.save_for_backward(x, weight, None if x is None else base)
        ctx.noise, ctx.seed = noise, seed
        noisy = noise.mixed(weight, base, noise.redraw(weight, seed))
        return noisy if x is None else linear(x, noisy, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, base = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        drawn = ctx.noise.redraw(weight, ctx.seed)
        return (
            grad @ ctx.noise.mixed(weight, base, drawn) if for_x else None,
            ctx.noise.times(grad if x is None else grad.T @ x, drawn) if for_weight else None,
            grad.sum(0) if for_bias else None,
            *[None] * 3,
        )


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocast_on(x) else nullcontext()


def _autocast_on(x: Tensor) -> bool:
    device = x.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return False  # such as meta; an older compiler does not know the question
    return torch.is_autocast_enabled(device)


def as_autocast_has_them(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that autocast runs a linear layer in; float64 it leaves alone."""
    if not _autocast_on(x) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

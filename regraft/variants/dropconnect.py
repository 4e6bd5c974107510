"""DropConnect: dropout of a linear layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from regraft.variants.checks import check_choice, check_switch
from regraft.variants.draws import plain
from regraft.variants.module import LinearVariant, check_rate
from regraft.variants.redraw import Noise, as_autocast_has_them, no_autocast, noisy_linear, noisy_weight
from regraft.variants.spec import DEFAULT_RATE, Spec

# Its root is a float too, and no variance that counts is below it.
_TINY = 2.0**-126
_TINY_ROOT = 2.0**-63


def dropconnect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    mask: str = "batch",
    noise: str = "bernoulli",
    eval: str = "plain",
    exact: bool = False,
) -> Tensor:
    """A linear layer whose weights are each dropped with probability p, and divided by 1 - p if kept.

    `mask="batch"` draws one weight mask for the whole input. `mask="example"` gives every row of the
    input noise of its own by the local reparameterization: the output's mean and variance are those
    of a mask for each row (mean W x + b, variance p/(1-p) (W*W)(x*x)), and it is drawn as a normal,
    so that nothing of the size rows x out x in is ever made.

    Options:
        mask: "batch" or "example".
        noise: "bernoulli", or "gaussian": each weight times N(1, p / (1 - p)), as `gaussian` has it.
        eval: "plain", or "sample": it draws in eval too, for Monte Carlo estimates of uncertainty.
        exact: draw the weight mask exactly. Otherwise its probability is within 2^-17 of 1 - p;
            below p or 1 - p of 2^-10 the draw is exact in any case.

    Shape:
        x: (..., in), weight: (out, in), output: (..., out).

    Source:
        Wan, Zeiler, Zhang, LeCun, Fergus (2013), "Regularization of neural networks using
        DropConnect"; Kingma, Salimans, Welling (2015), "Variational dropout and the local
        reparameterization trick".

    Differs:
        the paper draws a mask for each example, drops the bias too, and samples at test time. Here
        "example" is the normal of the same mean and variance, drawn for each position of (B, T, C)
        where a true mask would be shared along T; the bias is kept; eval is the plain linear layer.

    Example:
        >>> import torch
        >>> dropconnect(torch.ones(4, 3), torch.ones(2, 3), p=0.5, mask="example").shape
        torch.Size([4, 2])
    """
    p = check_rate(p)
    if p == 0 or not (training or eval == "sample"):
        return linear(x, weight, bias)
    if mask == "example":
        return _per_example(x, weight, bias, p)
    return noisy_linear(x, weight, bias, Noise(p, noise, exact))


def dropconnect_weight(
    weight: Tensor,
    p: float = DEFAULT_RATE,
    *,
    noise: str = "bernoulli",
    exact: bool = False,
    mixout_weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The weight, of any shape, that multiplies under `dropconnect(mask="batch")` or `mixout`."""
    return noisy_weight(weight, Noise(check_rate(p), noise, exact), mixout_weight) if p else weight


def _unfit(options: Mapping[str, Any], site: Any) -> tuple[str, str] | None:
    if options["mask"] == "example":
        return (
            "a mask for each example acts in a linear layer's own forward, and something else multiplies",
            "leave that option out",
        )
    return None


def _per_example(x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
    x, weight, bias = as_autocast_has_them(x, weight, bias)
    scale = (p / (1 - p)) ** 0.5
    if plain(x) and x.dtype is not torch.float16 and not torch._C._are_functorch_transforms_active():
        rows = x.reshape(
            -1, x.shape[-1]
        )  # or the result would be a view, which nothing could change in place
        noise = torch.randn(len(rows), len(weight), dtype=x.dtype, device=x.device).mul_(scale)
        noisy: Tensor = _Noisy.apply(rows, weight, bias, noise)
        return noisy.view(*x.shape[:-1], len(weight))
    mean = linear(x, weight, bias)
    noise = torch.randn_like(mean, requires_grad=False).mul_(scale)
    # In float16 squares overflow from 256 on, and autocast would take them back there.
    wide = torch.float32 if x.dtype is torch.float16 else x.dtype
    with no_autocast(x):
        deviation = _deviation(x.to(wide), weight.to(wide).square()) - _TINY_ROOT
    return mean + (deviation * noise).to(mean.dtype)


def _deviation(x: Tensor, squares: Tensor) -> Tensor:
    """The root of (W*W)(x*x) and a tiny number more, with which it has a finite slope at 0 too.

    Less the root of that number it is still 0 at 0.
    """
    return (linear(x.square(), squares) + _TINY).sqrt()


class _Noisy(torch.autograd.Function):
    """W x + b + noise * deviation.

    By hand, because in a small batch each tensor of the weight's size that is made on the way costs
    nearly as much as a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor) -> Tensor:
        squares = weight.square()
        deviation = linear(x.square(), squares).add_(_TINY).sqrt_()
        ctx.save_for_backward(x, weight, noise, deviation, squares)
        return linear(x, weight, bias).addcmul_(deviation, noise).sub_(noise, alpha=_TINY_ROOT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, noise, deviation, squares = ctx.saved_tensors
        if torch.is_grad_enabled():  # slopes of slopes: what was computed forwards has to have its own
            squares = weight.square()
            deviation = _deviation(x, squares)
        # Half the slope of the root; the squares' give the other 2.
        upstream = grad * noise / deviation
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            (upstream @ squares).mul_(x).addmm_(grad, weight) if for_x else None,
            (upstream.T @ x.square()).mul_(weight).addmm_(grad.T, x) if for_weight else None,
            grad.sum(0) if for_bias else None,
            None,
        )


@Spec(
    "dropconnect",
    dropconnect,
    ("Linear",),
    {
        "mask": partial(check_choice, choices=("batch", "example")),
        "noise": partial(check_choice, choices=("bernoulli", "gaussian")),
        "eval": partial(check_choice, choices=("plain", "sample")),
        "exact": check_switch,
    },
    changes_eval=lambda options: options["eval"] == "sample",
    weight_function=dropconnect_weight,
    weight_unfit=_unfit,
)
class DropConnectLinear(LinearVariant):
    """`dropconnect` as a module, an `nn.Linear` with a rate and options.

    `DropConnectLinear(4, 2, p=0.1, *, mask='batch', noise='bernoulli', eval='plain', exact=False)`.
    """

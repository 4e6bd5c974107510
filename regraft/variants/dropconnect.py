"""DropConnect: dropout of a linear layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from regraft.variants.checks import check_choice, check_switch
from regraft.variants.draws import fast_keep_mask, times_mask
from regraft.variants.module import LinearVariant, check_rate
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
    exact: bool = False,
) -> Tensor:
    """A linear layer whose weights are each dropped with probability p, and divided by 1 - p if kept.

    `mask="batch"` draws one weight mask for the whole input. `mask="example"` gives every row of the
    input noise of its own by the local reparameterization: the output's mean and variance are those
    of a mask for each row (mean W x + b, variance p/(1-p) (W*W)(x*x)), and it is drawn as a normal,
    so that nothing of the size rows x out x in is ever made.

    Args:
        x: the layer's input.
        weight: (out, in), as `nn.Linear` has it.
        bias: (out,) or None; never dropped.
        p: probability to drop a weight.
        training: False is the plain linear layer.
        mask: "batch" or "example".
        exact: draw the weight mask exactly. Otherwise its probability is within 2^-17 of 1 - p;
            below p or 1 - p of 2^-10 the draw is exact in any case.

    Shape:
        x: (..., in), output: (..., out).

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
    if not training or p == 0:
        return linear(x, weight, bias)
    if mask == "example":
        return _per_example(x, weight, bias, p)
    kept = fast_keep_mask(weight, p, exact)
    return linear(x, times_mask(weight, kept, 1 / (1 - p)), bias)


def _per_example(x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
    mean = linear(x, weight, bias)
    noise = torch.randn_like(mean, requires_grad=False).mul_((p / (1 - p)) ** 0.5)
    return mean + (_deviation(x, weight) * noise).to(mean.dtype)


def _deviation(x: Tensor, weight: Tensor) -> Tensor:
    """The root of (W*W)(x*x), in float32 instead of float16, where squares overflow from 256 on."""
    device, dtype = x.device.type, x.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and dtype is not torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    if dtype is torch.float16:
        dtype = torch.float32
    if autocast:
        with torch.autocast(device, enabled=False):
            return _shifted_root(x.to(dtype), weight.to(dtype))
    return _shifted_root(x.to(dtype), weight.to(dtype))


def _shifted_root(x: Tensor, weight: Tensor) -> Tensor:
    deviation: Tensor = _Deviation.apply(x, weight)
    return deviation - _TINY_ROOT


class _Deviation(torch.autograd.Function):
    """sqrt((W*W)(x*x) + tiny); by hand, because each pass over the weights counts in a small batch.

    The root of 0 has no finite slope; shifted by a tiny number it has one, and less the root of that
    number it is still 0 at 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x * x, weight * weight).add_(_TINY).sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, deviation = ctx.saved_tensors
        upstream = grad / deviation  # half the slope of the root; the squares' give the other 2
        for_x, for_weight = ctx.needs_input_grad
        rows = upstream.reshape(-1, upstream.shape[-1])
        return (
            (upstream @ (weight * weight)) * x if for_x else None,
            (rows.T @ (x * x).reshape(-1, x.shape[-1])) * weight if for_weight else None,
        )


def _check(options: Mapping[str, Any]) -> None:
    check_choice("mask", options["mask"], ("batch", "example"))
    check_switch("exact", options["exact"])


class DropConnectLinear(LinearVariant):
    """`dropconnect` as a module: an `nn.Linear` with a rate.

    Example:
        >>> DropConnectLinear(4, 2, p=0.1)
        DropConnectLinear(in_features=4, out_features=2, bias=True, p=0.1, mask='batch')
    """

    function = staticmethod(dropconnect)
    check = staticmethod(_check)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = DEFAULT_RATE,
        *,
        mask: str = "batch",
        exact: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, p, device=device, dtype=dtype, mask=mask, exact=exact
        )


SPECS = (
    Spec(
        "dropconnect",
        dropconnect,
        ("Linear",),
        DropConnectLinear,
        {"mask": "batch", "exact": False},
        check=_check,
    ),
)

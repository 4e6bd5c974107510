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

# Its root is exact too, and under no variance that is not itself lost to rounding.
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
    # The root of 0 has no finite slope; shifted by a tiny number it has one, and is still 0 at 0.
    deviation = (_variance(x, weight) + _TINY).sqrt() - _TINY_ROOT
    noise = torch.randn_like(mean, requires_grad=False).mul_((p / (1 - p)) ** 0.5)
    return mean + (deviation * noise).to(mean.dtype)


def _variance(x: Tensor, weight: Tensor) -> Tensor:
    """(W*W)(x*x), in float32 where it would be computed in float16: squares overflow there from 256 on."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.get_autocast_dtype(device) is torch.float16:
        with torch.autocast(device, enabled=False):
            return linear(x.float().square(), weight.float().square())
    if x.dtype is torch.float16 and not autocast:
        return linear(x.float().square(), weight.float().square())
    return linear(x.square(), weight.square())


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

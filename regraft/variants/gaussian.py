"""Gaussian dropout (Srivastava et al. 2014, section 10)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regraft.errors import OptionError
from regraft.variants.checks import check_number
from regraft.variants.draws import real_dtype
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spec import DEFAULT_RATE, Spec


def gaussian_dropout(
    x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, sigma: float | None = None
) -> Tensor:
    """X * m with m ~ N(1, s^2), s = sqrt(p / (1 - p)): the mean and variance of dropout at p.

    Options:
        p: the rate of the dropout whose variance the noise has; unused when `sigma` is given.
        sigma: the noise's standard deviation, in place of a rate.

    Shape:
        any; the output's is the input's.

    Source:
        Srivastava et al. (2014), "Dropout: a simple way to prevent neural networks from
        overfitting", section 10.

    Differs:
        nothing.

    Example:
        >>> import torch
        >>> gaussian_dropout(torch.ones(2, 3), p=0.1).shape
        torch.Size([2, 3])
    """
    p = check_rate(p)
    scale = (p / (1 - p)) ** 0.5 if sigma is None else sigma
    if not training or scale == 0:
        return x
    return x * torch.randn_like(x, dtype=real_dtype(x), requires_grad=False).mul_(scale).add_(1)


@Spec(
    "gaussian",
    gaussian_dropout,
    checks={"sigma": partial(check_number, above=0)},
    needs_rate=lambda options: options["sigma"] is None,
)
class GaussianDropout(DropoutVariant):
    """`gaussian_dropout` as a module: `GaussianDropout(p=0.2)`, or `GaussianDropout(sigma=0.5)`."""

    def __init__(self, p: float | None = None, *, sigma: float | None = None) -> None:
        super().__init__(DEFAULT_RATE if p is None else p, sigma=sigma)
        if p is not None and sigma is not None:
            raise OptionError("p plays no part beside sigma", remedy="give p, or sigma")

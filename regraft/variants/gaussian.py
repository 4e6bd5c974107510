"""Gaussian dropout (Srivastava et al. 2014, section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regraft.errors import RateError
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spec import DEFAULT_RATE, Spec


def gaussian_dropout(
    x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, sigma: float | None = None
) -> Tensor:
    """x * m with m ~ N(1, s^2), s = sqrt(p / (1 - p)): the mean and variance of dropout at p."""
    p = check_rate(p)
    scale = (p / (1 - p)) ** 0.5 if sigma is None else sigma
    if not training or scale == 0:
        return x
    return x * torch.randn_like(x).mul_(scale).add_(1)


def _check(options: Mapping[str, Any]) -> None:
    sigma = options["sigma"]
    if sigma is not None and not sigma > 0:
        raise RateError(f"sigma={sigma!r} is not above 0")


class GaussianDropout(DropoutVariant):
    """`gaussian_dropout` as a module."""

    function = staticmethod(gaussian_dropout)

    def __init__(self, p: float = DEFAULT_RATE, *, sigma: float | None = None) -> None:
        super().__init__(p, sigma=sigma)


SPECS = (
    Spec(
        "gaussian",
        gaussian_dropout,
        ("Dropout",),
        GaussianDropout,
        {"sigma": None},
        check=_check,
        needs_rate=lambda options: options["sigma"] is None,
    ),
)

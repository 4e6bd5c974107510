"""Additive Gaussian noise."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regraft.variants.checks import check_number
from regraft.variants.draws import real_dtype
from regraft.variants.module import DropoutVariant
from regraft.variants.spec import Spec


def gaussian_noise(x: Tensor, p: float = 0.0, training: bool = True, *, sigma: float = 0.1) -> Tensor:
    """Adds normal noise of mean 0 and standard deviation `sigma` to each element.

    Options:
        sigma: the noise's standard deviation, in the units of x.

    Shape:
        any; the output's is the input's.

    Source:
        Bishop (1995), "Training with noise is equivalent to Tikhonov regularization"; Keras,
        `keras.layers.GaussianNoise`.

    Differs:
        nothing.

    Example:
        >>> import torch
        >>> gaussian_noise(torch.ones(2, 3), sigma=0.5).shape
        torch.Size([2, 3])
    """
    if not training or sigma == 0:
        return x
    return x + torch.randn_like(x, dtype=real_dtype(x), requires_grad=False).mul_(sigma)


@Spec(
    "noise",
    gaussian_noise,
    checks={"sigma": partial(check_number, least=0)},
    needs_rate=lambda _: False,
    rated=False,
)
class GaussianNoise(DropoutVariant):
    """`gaussian_noise` as a module: `GaussianNoise(sigma=0.1)`; its `p` is 0."""

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__(sigma=sigma)

"""Uniform dropout: multiplicative uniform noise."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.draws import real_dtype, uniform_like
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def uniform_dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Noise x * m, m uniform on 1 +- b, b = sqrt(3p / (1 - p)): the mean and variance of dropout at p.

    Its noise is bounded, which shifts the variance that a BatchNorm after it sees less than dropout.

    Shape:
        any; the output's is the input's.

    Source:
        Li, Chen, Hu, Yang (2019), "Understanding the disharmony between dropout and batch
        normalization by variance shift" ("Uout").

    Differs:
        the paper sets b itself (0.1); here p does, as in every other variant.

    Example:
        >>> import torch
        >>> uniform_dropout(torch.ones(2, 3), p=0.1).shape
        torch.Size([2, 3])
    """
    if not acts(p, training):
        return x
    width = (3 * p / (1 - p)) ** 0.5
    return x * uniform_like(x).mul_(2 * width).add_(1 - width).to(real_dtype(x))


@Spec("uniform", uniform_dropout)
class UniformDropout(DropoutVariant):
    """`uniform_dropout` as a module: `UniformDropout(p=0.2)`."""

"""Alpha dropout: keeps the mean and variance that SELU networks rely on."""

from __future__ import annotations

import math

from torch import Tensor

from regraft.variants.draws import HALVES, keep_mask
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec

# What SELU gives far below 0: -scale * alpha of Klambauer et al.
_FLOOR = -1.7580993408473766


def alpha_dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Dropped elements get SELU's negative limit, then all are scaled and shifted back.

    For inputs of mean 0 and variance 1, which is what SELU keeps, the output's are 0 and 1 too.

    Shape:
        any; the output's is the input's.

    Source:
        Klambauer, Unterthiner, Mayr, Hochreiter (2017), "Self-normalizing neural networks".

    Differs:
        nothing. Unlike `F.alpha_dropout` it draws out of place, and so runs under `torch.func.vmap`.

    Example:
        >>> import torch
        >>> alpha_dropout(torch.ones(2, 3), p=0.1).shape
        torch.Size([2, 3])
    """
    if not acts(p, training):
        return x
    scale = math.sqrt(1 / ((1 - p) * (1 + p * _FLOOR**2)))
    kept = keep_mask(x, x.shape, p)
    floor = _FLOOR * scale
    if x.dtype in HALVES:  # whose digits the sum below would cost
        return (x * kept).mul_(scale).sub_(floor * p).masked_fill_(kept == 0, floor * (1 - p))
    # (kept ? x : floor) * scale - scale * floor * p, with the floor taken out of both cases.
    kept = kept.mul_(scale)
    return (x * kept).sub_(kept, alpha=_FLOOR).add_(floor * (1 - p))


@Spec("alpha", alpha_dropout)
class AlphaDropout(DropoutVariant):
    """`alpha_dropout` as a module: `AlphaDropout(p=0.2)`."""

"""Monte Carlo dropout: dropout that stays on in eval."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.dropout import dropout
from regraft.variants.module import DropoutVariant
from regraft.variants.spec import DEFAULT_RATE, Spec


def mc_dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Dropout that stays on in eval: each evaluation is a sample of the model's prediction.

    The mean of several evaluations is the prediction, their spread its uncertainty; take them with
    `regraft.stochastic_passes`. The rate alone decides: `training` is unused.

    Shape:
        any; the output's is the input's.

    Source:
        Gal and Ghahramani (2016), "Dropout as a Bayesian approximation: representing model
        uncertainty in deep learning".

    Differs:
        nothing.

    Example:
        >>> import torch
        >>> mc_dropout(torch.ones(2, 3), p=0.5, training=False).shape
        torch.Size([2, 3])
    """
    return dropout(x, p, training=True)


@Spec("mc", mc_dropout, changes_eval=lambda _: True)
class MCDropout(DropoutVariant):
    """`mc_dropout` as a module: `MCDropout(p=0.2)`."""

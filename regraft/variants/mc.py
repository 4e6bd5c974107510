"""Monte Carlo dropout: dropout that stays on in eval."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.dropout import dropout
from regraft.variants.module import DropoutVariant
from regraft.variants.spec import DEFAULT_RATE, Spec


def mc_dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Dropout that stays on in eval: each evaluation is a sample of the model's prediction.

    The mean of several evaluations is the prediction, their spread its uncertainty; take them with
    `regraft.stochastic_passes`.

    Args:
        x: any floating tensor.
        p: probability to drop.
        training: unused; the rate alone decides.

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


class MCDropout(DropoutVariant):
    """`mc_dropout` as a module.

    Example:
        >>> MCDropout(0.1).eval()
        MCDropout(p=0.1)
    """

    function = staticmethod(mc_dropout)

    def __init__(self, p: float = DEFAULT_RATE) -> None:
        super().__init__(p)


SPECS = (Spec("mc", mc_dropout, ("Dropout",), MCDropout, changes_eval=lambda _: True),)

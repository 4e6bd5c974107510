"""Elementwise dropout, also where a model drops channels or examples."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.dropout import dropout
from regraft.variants.module import DropoutVariant
from regraft.variants.spec import DEFAULT_RATE, Spec


def elementwise_dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Each element is 0 with probability p, else divided by 1 - p, whatever the site dropped before.

    `dropout` as a rule's value keeps the kind of its site: a Dropout2d still drops channels, an
    AlphaDropout keeps SELU's floor. This one puts plain dropout in their place.

    Shape:
        any; the output's is the input's.

    Source:
        Srivastava et al. (2014), as `dropout`.

    Differs:
        as `dropout`.

    Example:
        >>> import torch
        >>> elementwise_dropout(torch.ones(3), p=0.5, training=False)
        tensor([1., 1., 1.])
    """
    return dropout(x, p, training)


@Spec("elementwise", elementwise_dropout)
class ElementwiseDropout(DropoutVariant):
    """`elementwise_dropout` as a module: `ElementwiseDropout(p=0.2)`."""

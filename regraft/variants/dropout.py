"""Plain dropout: the variant that only sets the rate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from regraft.variants.draws import thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def dropout(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Each element is 0 with probability p, else divided by 1 - p: torch's own dropout.

    As a rule's value it sets the rate of a site and nothing else, which also reaches the dropout of
    fused attention, of `nn.MultiheadAttention` and between the layers of an RNN. A site that drops by a
    law of its own (`nn.Dropout2d`, alpha dropout, DropBlock) keeps it; `elementwise` changes it.

    Shape:
        any; the output's is the input's.

    Source:
        Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), "Dropout: a simple way to
        prevent neural networks from overfitting".

    Differs:
        the paper multiplies the weights by 1 - p at test time; dividing in training is the same in
        expectation and leaves eval alone.

    Example:
        >>> import torch
        >>> dropout(torch.ones(3), p=0.5, training=False)
        tensor([1., 1., 1.])
    """
    if not acts(p, training):
        return x
    if torch.compiler.is_compiling():
        return thinned(x, p)  # a scheduled p compiles once
    return functional.dropout(x, p, training=True)


@Spec("dropout", dropout)
class Dropout(DropoutVariant):
    """`dropout` as a module, an `nn.Dropout` that refuses p = 1: `Dropout(p=0.2)`."""

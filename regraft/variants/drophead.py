"""DropHead: whole attention heads."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.draws import thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def drophead(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Whole attention heads of each example are dropped with probability p, the others divided by 1 - p.

    It takes attention weights, after the softmax: a head whose weights are 0 gives an output of 0.

    Shape:
        (B, H, L, S) or (B * H, L, S): queries and keys on the last two axes; the output's is the input's.

    Source:
        Zhou, Ge, Wei, Zhou, Xu (2020), "Scheduled DropHead: a regularization method for transformer
        models".

    Differs:
        what is kept is divided by 1 - p; the paper divides by the share of heads that are kept in each
        example, which is not defined when none is. Its schedule of rates is `regraft.schedule`.

    Example:
        >>> import torch
        >>> y = drophead(torch.full((2, 8, 5, 5), 0.2), p=0.5)
        >>> bool((y == y[..., :1, :1]).all())
        True
    """
    if not acts(p, training):
        return x
    return thinned(x, p, [x.dim() - 2, x.dim() - 1])


@Spec("drophead", drophead, attention=True)
class DropHead(DropoutVariant):
    """`drophead` as a module, on attention weights: `DropHead(p=0.2)`."""

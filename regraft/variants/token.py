"""Token dropout: whole positions."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.checks import check_axis
from regraft.variants.draws import channel_axis_of, thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def token_dropout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    channel_axis: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Whole positions are dropped, all their features at once: words of a sentence, patches of an image.

    Options:
        channel_axis: where the features are; None is 1 for (B, C, H, W) and its like, the last for
            (B, T, C) and (B, C).
        mask: (B, T), nonzero where there is a token and 0 at padding, which is left as it is; None
            if there is no padding, or it is not known.

    Shape:
        (B, T, C), (B, C), (B, C, H, W), ...; the output's is the input's.

    Source:
        Gal and Ghahramani (2016), "A theoretically grounded application of dropout in recurrent
        neural networks".

    Differs:
        the paper drops all occurrences of a word together; here each position is on its own.

    Example:
        >>> import torch
        >>> y = token_dropout(torch.ones(2, 5, 3), p=0.5)
        >>> bool((y == y[..., :1]).all())
        True
    """
    if not acts(p, training):
        return x
    axis = channel_axis_of(x, channel_axis)
    y = thinned(x, p, [axis])
    return y if mask is None else y.where(mask.bool().unsqueeze(axis), x)


@Spec("token", token_dropout, checks={"channel_axis": check_axis}, activations=True)
class TokenDropout(DropoutVariant):
    """`token_dropout` as a module: `TokenDropout(p=0.2, *, channel_axis=None)`.

    Its `forward` also takes the mask of tokens and padding.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return token_dropout(x, self.p, self.training, **self.options, mask=mask)

"""Token dropout: whole positions."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.draws import channel_axis_of, keep_mask, times_mask
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spatial import check_axes
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

    Args:
        x: features of each position.
        p: probability to drop a position.
        training: False returns x itself.
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
    p = check_rate(p)
    if not training or p == 0:
        return x
    axis = channel_axis_of(x, channel_axis)
    shape = [1 if at == axis else size for at, size in enumerate(x.shape)]
    thinned = times_mask(x, keep_mask(x, shape, p), 1 / (1 - p))
    return thinned if mask is None else thinned.where(mask.bool().unsqueeze(axis), x)


class TokenDropout(DropoutVariant):
    """`token_dropout` as a module; its `forward` also takes the mask of tokens and padding.

    Example:
        >>> TokenDropout(0.1)
        TokenDropout(p=0.1)
    """

    function = staticmethod(token_dropout)
    check = staticmethod(check_axes)

    def __init__(self, p: float = DEFAULT_RATE, *, channel_axis: int | None = None) -> None:
        super().__init__(p, channel_axis=channel_axis)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return token_dropout(x, self.p, self.training, **self.options, mask=mask)


SPECS = (
    Spec(
        "token",
        token_dropout,
        ("Dropout",),
        TokenDropout,
        {"channel_axis": None},
        check=check_axes,
        activations=True,
    ),
)

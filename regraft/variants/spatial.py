"""Spatial dropout: whole channels, one mask for all positions."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.checks import check_axis
from regraft.variants.draws import channel_axis_of, thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def spatial_dropout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    channel_axis: int | None = None,
    batch_axis: int | None = None,
) -> Tensor:
    """Whole channels of each example are dropped, one mask for all its positions.

    Neighbouring positions say nearly the same, so that dropping single elements hides little. In
    sequence models this is the "locked" or "variational" dropout.

    Options:
        channel_axis: where the channels are; None is 1 for (B, C, H, W) and its like, the last for
            (B, T, C) and (B, C). Give -1 for (B, H, W, C), as inside ConvNeXt and Swin.
        batch_axis: where the examples are; None is 0. Give 1 for (T, B, C).

    Shape:
        (B, C), (B, T, C), (B, C, H, W), ...; the output's is the input's.

    Source:
        Tompson, Goroshin, Jain, LeCun, Bregler (2015), "Efficient object localization using
        convolutional networks"; Gal and Ghahramani (2016), "A theoretically grounded application of
        dropout in recurrent neural networks"; Merity, Keskar, Socher (2018), "Regularizing and
        optimizing LSTM language models".

    Differs:
        `nn.Dropout1d` takes axis 1 of (B, T, C) for the channels, and so drops tokens.

    Example:
        >>> import torch
        >>> y = spatial_dropout(torch.ones(2, 5, 3), p=0.5)
        >>> bool((y == y[:, :1]).all())
        True
    """
    if not acts(p, training):
        return x
    batch = 0 if batch_axis is None else batch_axis % x.dim()
    return thinned(x, p, {*range(x.dim())} - {batch, channel_axis_of(x, channel_axis)})


@Spec(
    "spatial",
    spatial_dropout,
    checks={"channel_axis": check_axis, "batch_axis": check_axis},
    activations=True,
)
class SpatialDropout(DropoutVariant):
    """`spatial_dropout` as a module: `SpatialDropout(p=0.2, *, channel_axis=None, batch_axis=None)`."""

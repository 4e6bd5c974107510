"""Spatial dropout: whole channels, one mask for all positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.errors import OptionError
from regraft.variants.draws import channel_axis_of, keep_mask, times_mask
from regraft.variants.module import DropoutVariant, check_rate
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

    Args:
        x: features of each example.
        p: probability to drop a channel.
        training: False returns x itself.
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
    p = check_rate(p)
    if not training or p == 0:
        return x
    axis = channel_axis_of(x, channel_axis)
    batch = 0 if batch_axis is None else batch_axis % x.dim()
    shape = [size if at in (batch, axis) else 1 for at, size in enumerate(x.shape)]
    return times_mask(x, keep_mask(x, shape, p), 1 / (1 - p))


def check_axes(options: Mapping[str, Any]) -> None:
    """`channel_axis` and `batch_axis` are whole numbers or None."""
    for name in ("channel_axis", "batch_axis"):
        axis = options.get(name)
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise OptionError(f"{name}={axis!r} is not a whole number", remedy="for example -1, the last")


class SpatialDropout(DropoutVariant):
    """`spatial_dropout` as a module.

    Example:
        >>> SpatialDropout(0.1, channel_axis=-1)
        SpatialDropout(p=0.1, channel_axis=-1)
    """

    function = staticmethod(spatial_dropout)
    check = staticmethod(check_axes)

    def __init__(
        self, p: float = DEFAULT_RATE, *, channel_axis: int | None = None, batch_axis: int | None = None
    ) -> None:
        super().__init__(p, channel_axis=channel_axis, batch_axis=batch_axis)


SPECS = (
    Spec(
        "spatial",
        spatial_dropout,
        ("Dropout",),
        SpatialDropout,
        {"channel_axis": None, "batch_axis": None},
        check=check_axes,
        activations=True,
    ),
)

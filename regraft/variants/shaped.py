"""Dropout with a mask of a given shape, which is broadcast: Keras' `noise_shape`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regraft.errors import InputsError, OptionError
from regraft.variants.draws import thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def shaped_dropout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    noise_shape: Sequence[int | None] | None = None,
) -> Tensor:
    """Dropout with one draw for all elements along the axes where `noise_shape` is 1.

    Options:
        noise_shape: a list with one entry for each axis of x: None draws along the axis, 1 shares one draw
            along it. `[None, 1, None]` of (B, T, C) is the same mask at all positions. None draws for each
            element.

    Shape:
        any; the output's is the input's.

    Raises:
        InputsError: x has another number of axes than `noise_shape` (also a ValueError).

    Source:
        Keras, `keras.layers.Dropout(noise_shape=...)`.

    Differs:
        an entry is None or 1: the size of an axis is read off x.

    Example:
        >>> import torch
        >>> y = shaped_dropout(torch.ones(2, 5, 3), p=0.5, noise_shape=[None, 1, None])
        >>> bool((y == y[:, :1]).all())
        True
    """
    if not acts(p, training):
        return x
    given = [None] * x.dim() if noise_shape is None else noise_shape
    if len(given) != x.dim():
        raise InputsError(
            f"noise_shape={list(given)} has {len(given)} entries, the input of shape {tuple(x.shape)} has "
            f"{x.dim()} axes",
            remedy="give None or 1 for each axis of the input",
        )
    return thinned(x, p, [axis for axis, entry in enumerate(given) if entry == 1])


def _check(name: str, value: object) -> None:
    if not (isinstance(value, list) and all(entry in (None, 1) for entry in value)):
        raise OptionError(
            f"{name}={value!r} is not a list of None and 1", remedy="for example [None, 1, None]"
        )


@Spec("shaped", shaped_dropout, checks={"noise_shape": _check})
class ShapedDropout(DropoutVariant):
    """`shaped_dropout` as a module: `ShapedDropout(p=0.2, *, noise_shape=None)`."""

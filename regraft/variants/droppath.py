"""DropPath: whole residual branches, one draw per example (stochastic depth)."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.draws import keep_mask, times_mask
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spatial import check_axes
from regraft.variants.spec import DEFAULT_RATE, Spec


def drop_path(
    x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, batch_axis: int | None = None
) -> Tensor:
    """Drops the whole residual branch x of each example with probability p.

    Args:
        x: what a branch adds.
        p: probability to drop it.
        training: False returns x itself.
        batch_axis: where the examples are; None is 0. Give 1 for (T, B, C).

    Shape:
        (B, ...), or as `batch_axis` says; the output's is the input's.

    Source:
        Huang, Sun, Liu, Sedra, Weinberger (2016), "Deep networks with stochastic depth".

    Differs:
        Draws once per example, where the paper draws once per batch. Divides what is kept by 1 - p in
        training, where the paper scales in eval. Rates that grow with depth are kept.

    Example:
        >>> import torch
        >>> y = drop_path(torch.ones(8, 3), p=0.5)
        >>> bool((y == y[:, :1]).all())
        True
    """
    p = check_rate(p)
    if not training or p == 0:
        return x
    batch = 0 if batch_axis is None else batch_axis % x.dim()
    shape = [size if axis == batch else 1 for axis, size in enumerate(x.shape)]
    return times_mask(x, keep_mask(x, shape, p), 1 / (1 - p))


class DropPath(DropoutVariant):
    """`drop_path` as a module.

    Example:
        >>> DropPath(0.1)
        DropPath(p=0.1)
    """

    function = staticmethod(drop_path)
    check = staticmethod(check_axes)

    def __init__(self, p: float = DEFAULT_RATE, *, batch_axis: int | None = None) -> None:
        super().__init__(p, batch_axis=batch_axis)


SPECS = (
    Spec(
        "droppath",
        drop_path,
        ("DropPath", "Dropout"),
        DropPath,
        {"batch_axis": None},
        check=check_axes,
        activations=True,
    ),
)

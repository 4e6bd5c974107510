"""DropPath: whole residual branches, one draw per example (stochastic depth)."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.checks import check_axis
from regraft.variants.draws import thinned
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def drop_path(
    x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, batch_axis: int | None = None
) -> Tensor:
    """Drops the whole residual branch x of each example with probability p.

    Options:
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
    if not acts(p, training):
        return x
    batch = 0 if batch_axis is None else batch_axis % x.dim()
    return thinned(x, p, {*range(x.dim())} - {batch})


@Spec("droppath", drop_path, ("DropPath", "Dropout"), {"batch_axis": check_axis}, activations=True)
class DropPath(DropoutVariant):
    """`drop_path` as a module: `DropPath(p=0.2, *, batch_axis=None)`."""

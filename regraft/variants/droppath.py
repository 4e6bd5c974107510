"""DropPath: whole residual branches, one draw per example (stochastic depth)."""

from __future__ import annotations

from torch import Tensor

from regraft.variants.draws import keep_mask, times_mask
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spec import DEFAULT_RATE, Spec


def drop_path(x: Tensor, p: float = DEFAULT_RATE, training: bool = True) -> Tensor:
    """Drops the whole residual branch x of each example with probability p.

    Shape:
        (B, ...); the output's is the input's.

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
    shape = [size if axis == 0 else 1 for axis, size in enumerate(x.shape)]
    return times_mask(x, keep_mask(x, shape, p), 1 / (1 - p))


class DropPath(DropoutVariant):
    """`drop_path` as a module.

    Example:
        >>> DropPath(0.1)
        DropPath(p=0.1)
    """

    function = staticmethod(drop_path)

    def __init__(self, p: float = DEFAULT_RATE) -> None:
        super().__init__(p)


SPECS = (Spec("droppath", drop_path, ("DropPath", "Dropout"), DropPath),)

"""Multi-sample dropout as its paper has it: the mean of the losses of K dropout samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError
from regraft.training.passes.api import stochastic_passes
from regraft.training.passes.nested import pass_of


def multisample_loss(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    samples: int,
    *args: Any,
    strategy: str = "auto",
    chunk: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mean of the losses of several dropout samples over one input.

    With dropout in the head only, which is where the paper puts it, everything before it is computed
    once, and the samples cost no more than the head.

    Args:
        model: as it is, in training.
        loss_fn: the loss of one sample, from what the model returns for it.
        samples: how many.
        args: for the model's forward.
        strategy: see `regraft.stochastic_passes`.
        chunk: likewise.
        kwargs: for the model's forward.

    Raises:
        LossError: the loss is no single number (also a ValueError).

    Source: Inoue 2019, "Multi-Sample Dropout for Accelerated Training and Better Generalization".

    Differs: the variant "multisample" averages the masks instead: before a linear layer that is the mean
        of the logits, whose loss is at most the mean of the losses.

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> y = torch.tensor([0, 2])
        >>> loss = regraft.multisample_loss(
        ...     net, lambda logits: nn.functional.cross_entropy(logits, y), 8, torch.ones(2, 4)
        ... )
        >>> loss.shape
        torch.Size([])
    """
    outputs = stochastic_passes(model, samples, *args, strategy=strategy, chunk=chunk, **kwargs)
    losses = [loss_fn(pass_of(outputs, i)) for i in range(samples)]
    if any(not isinstance(one, Tensor) or one.dim() for one in losses):
        raise LossError("loss_fn gives no single number", remedy="reduce it: reduction='mean'")
    return torch.stack(losses).mean()

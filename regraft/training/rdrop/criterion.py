"""`regraft.rdrop_criterion`: R-Drop for a loss outside the model; `loss = criterion(model(x), y)` stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from regraft.errors import LossError
from regraft.find.walk import inner_model
from regraft.training.rdrop.options import Key, RDropOptions
from regraft.training.rdrop.rdrop import graft_rdrop
from regraft.training.rdrop.state import RDropCriterion, data_parallel


def rdrop_criterion(
    model: nn.Module,
    criterion: Callable[..., Any],
    alpha: float = 1.0,
    passes: int = 2,
    *,
    logits: Key | None = None,
    task: str | None = None,
    ce: str = "mean",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    class_axis: int | None = None,
    consistency: str = "labelled",
    strategy: str = "auto",
    chunk: int | None = None,
    fork: str | float | None = None,
    inputs: Any = None,
) -> RDropCriterion:
    """A criterion with which a loop trains by R-Drop: `loss = criterion(model(x), y)` stays as it is.

    In training the model makes several passes and returns the first, in its ordinary type and shape. The
    criterion fetches the others, averages the losses of all and adds alpha * the KL. In eval, and without
    gradients, both are what they were. `regraft.revert(model)` undoes it.

    What the criterion is given must be what the model returned, or a part of it, at most reshaped or cast;
    anything else belongs into the criterion: `lambda outputs, y: loss(outputs.float().log_softmax(-1), y)`.

    Args:
        model: as it is trained; DDP and compiled wrappers are looked into.
        criterion: the loss of one pass, from the model's outputs and whatever else it takes.
        alpha: weight of the KL between the passes.
        passes: how many.
        logits: where the model returns several tensors, the one to compare, by name or position.
        task: what the logits mean, for a criterion that is not one of torch's or timm's: "classification",
            "multilabel" or "regression".
        ce: "mean" or "sum", see `regraft.rdrop_loss`.
        reduction: of the KL, see `regraft.rdrop_loss`.
        shift: position t predicts label t + 1.
        ignore_index: positions with this label do not count in the KL; read from a known criterion.
        class_axis: of one pass; read from a known criterion.
        consistency: "all" lets positions without a label count in the KL.
        strategy: of the passes, see `regraft.stochastic_passes`.
        chunk: of the passes, likewise.
        fork: of the passes, likewise.
        inputs: for the look at which dropouts run, see `regraft.inspect`.

    Returns:
        A module that holds `criterion`; `.terms` are the two terms of the last step. The model is not one
        of its submodules.

    Raises:
        LossError: a criterion that is not known, without `task=`; in training, passes that were not
            fetched before the next forward, or outputs that are not the model's.
        ModelError: `nn.DataParallel`.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3))
        >>> criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), alpha=1.0)
        >>> loss = criterion(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.shape
        torch.Size([])
    """
    if not callable(criterion):
        raise LossError(
            f"criterion is a {type(criterion).__name__}, not a function of outputs and labels",
            remedy="criterion = rdrop_criterion(model, nn.CrossEntropyLoss()), once, before training",
        )
    if isinstance(model, nn.DataParallel):
        raise data_parallel()
    graft_rdrop(model, RDropOptions.of(locals(), outside=True), inputs)
    return RDropCriterion(inner_model(model)[0], criterion)

"""What a loss function compares: the criteria of torch and timm are read, any other is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import LossError
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop_loss import divergence


@dataclass(frozen=True)
class Reading:
    """What is known of a criterion.

    Attributes:
        task: which divergence belongs to it.
        class_axis: of one pass; None where a criterion does not fix it.
        ignore_index: labels that it leaves out.
        probabilities: does it take probabilities and not logits?
    """

    task: str
    class_axis: int | None = None
    ignore_index: int | None = None
    probabilities: bool = False

    def logits(self, outputs: Tensor) -> Tensor:
        """What a divergence is computed from."""
        if not self.probabilities:
            return outputs
        p = outputs if outputs.dtype == torch.float64 else outputs.float()
        return p.clamp(torch.finfo(p.dtype).tiny, 1 - torch.finfo(p.dtype).eps).logit()


_CLASSES = Reading("classification", class_axis=1, ignore_index=-100)
_SOFT = Reading("classification", class_axis=-1)
_COLUMNS = Reading("multilabel")
_VALUES = Reading("regression")

# The log-softmax of log-probabilities is themselves, so that NLLLoss reads as CrossEntropyLoss.
_MODULES: dict[type[nn.Module], Reading] = {
    nn.CrossEntropyLoss: _CLASSES,
    nn.NLLLoss: _CLASSES,
    nn.BCEWithLogitsLoss: _COLUMNS,
    nn.MultiLabelSoftMarginLoss: _COLUMNS,
    nn.BCELoss: Reading("multilabel", probabilities=True),
    nn.MSELoss: _VALUES,
    nn.L1Loss: _VALUES,
    nn.SmoothL1Loss: _VALUES,
    nn.HuberLoss: _VALUES,
}
_FUNCTIONS: dict[Any, Reading] = {
    F.cross_entropy: _CLASSES,
    F.nll_loss: _CLASSES,
    F.binary_cross_entropy_with_logits: _COLUMNS,
    F.multilabel_soft_margin_loss: _COLUMNS,
    F.binary_cross_entropy: Reading("multilabel", probabilities=True),
    F.mse_loss: _VALUES,
    F.l1_loss: _VALUES,
    F.smooth_l1_loss: _VALUES,
    F.huber_loss: _VALUES,
}
_ELSEWHERE = {
    "timm.loss.SoftTargetCrossEntropy": _SOFT,
    "timm.loss.LabelSmoothingCrossEntropy": _SOFT,
    "timm.loss.BinaryCrossEntropy": _COLUMNS,
    "transformers.trainer_pt_utils.LabelSmoother": Reading("classification", -1, -100),
}
"""Classes of other libraries, by name, so that these need not be there."""


def read_criterion(criterion: Callable[..., Any], options: RDropOptions) -> Reading:
    """What `criterion` compares.

    Raises:
        LossError: it is not known, and no `task=` says it.
    """
    known = _known(criterion)
    if known is None and options.task is None:
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise LossError(
            f"{name} is not a loss of torch that regraft reads, so what its outputs mean is not known",
            where="criterion",
            remedy='say task="classification" (logits of classes), "multilabel" (logits of yes or no) or '
            '"regression"; class_axis= and ignore_index= where they are not the last axis and -100',
        )
    return Reading(
        task=options.task or known.task,  # type: ignore[union-attr]
        class_axis=options.class_axis if options.class_axis is not None or not known else known.class_axis,
        ignore_index=known.ignore_index if known and options.ignore_index == -100 else options.ignore_index,
        probabilities=known is not None and known.probabilities and options.task in (None, known.task),
    )


def _known(criterion: Any) -> Reading | None:
    settings: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        settings = {**criterion.keywords, **settings}
        criterion = criterion.func
    reading = None
    cls = type(criterion)
    if isinstance(criterion, nn.Module):
        for base, each in _MODULES.items():
            if isinstance(criterion, base) and cls.forward is base.forward:
                reading, settings = each, vars(criterion)
    library = cls.__module__.rpartition(".")[0] if cls.__module__.startswith("timm.") else cls.__module__
    elsewhere = _ELSEWHERE.get(f"{library}.{cls.__name__}")
    if elsewhere is not None:
        reading, settings = elsewhere, vars(criterion)
    elif not isinstance(criterion, nn.Module) and callable(criterion):
        reading = _FUNCTIONS.get(criterion) if getattr(criterion, "__hash__", None) else None
    if reading is not None and reading.ignore_index is not None:
        ignored = int(settings.get("ignore_index", -100))
        return Reading(reading.task, reading.class_axis, ignored, reading.probabilities)
    return reading


def divergence_of(
    logits: Tensor,
    labels: Any,
    reading: Reading,
    options: RDropOptions,
    items: Any = None,
    mask: Any = None,
) -> Tensor:
    """The KL term of what a criterion compares; `mask` says which positions without a label count."""
    logits, compared = _compared_positions(logits, labels, reading, options)
    if options.consistency == "all" and isinstance(mask, Tensor) and mask.shape == compared.shape:
        compared = mask.bool()
    return divergence(logits, compared, options, reading.task, items)


def _compared_positions(
    logits: Tensor, labels: Any, reading: Reading, options: RDropOptions
) -> tuple[Tensor, Tensor]:
    """Logits of all passes as the divergence takes them, and which of their positions count.

    Raises:
        LossError: it cannot be told on which axis the classes are.
    """
    logits = reading.logits(logits)
    if reading.task != "classification":
        compared = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
        if reading.task == "multilabel":
            compared = compared & ~torch.isneginf(logits).any(0)
            if options.consistency != "all" and isinstance(labels, Tensor) and labels.shape == compared.shape:
                compared = compared & (labels != options.ignore_index)
        return logits, compared
    if reading.class_axis is not None:
        axis = reading.class_axis
        if logits.dim() > 2:
            logits = logits.movedim(axis + 1 if axis >= 0 else axis, -1)
    elif logits.dim() > 3:
        raise LossError(
            f"outputs of shape {tuple(logits.shape[1:])}: on which axis are the classes?",
            where="criterion",
            remedy="class_axis=1 for (batch, classes, ...), class_axis=-1 for (batch, ..., classes)",
        )
    if logits.shape[-1] == 1:
        raise LossError("there is one class, which all passes agree on", remedy='task="multilabel"')
    places = logits.shape[1:-1]
    compared = torch.ones(places, dtype=torch.bool, device=logits.device)
    indices = isinstance(labels, Tensor) and not labels.is_floating_point()
    if options.consistency == "all" or not indices or reading.ignore_index is None:
        return logits, compared
    labels = labels.to(logits.device)
    if labels.shape == places:
        if options.shift:
            labels = F.pad(labels, (0, 1), value=reading.ignore_index)[..., 1:]
        return logits, labels != reading.ignore_index
    if labels.shape == logits.shape[1:]:  # one-hot, as integers
        return logits, compared
    raise LossError(
        f"labels of shape {tuple(labels.shape)} for positions of shape {tuple(places)}",
        where="criterion",
        remedy="class_axis= says on which axis the classes are",
    )

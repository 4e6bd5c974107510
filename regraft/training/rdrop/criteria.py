"""What a loss function compares: the criteria of torch and timm are read, any other is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import LossError
from regraft.training.rdrop.labels import classes_last
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
_RATES = Reading("multilabel", probabilities=True)
_VALUES = Reading("regression")
_KNOWN: dict[Any, Reading] = {
    # The log-softmax of log-probabilities is themselves, so that NLLLoss reads as CrossEntropyLoss.
    **dict.fromkeys([nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss], _CLASSES),
    **dict.fromkeys([nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits], _COLUMNS),
    **dict.fromkeys([nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss], _COLUMNS),
    **dict.fromkeys([nn.BCELoss, F.binary_cross_entropy], _RATES),
    **dict.fromkeys([nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss], _VALUES),
    **dict.fromkeys([F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss], _VALUES),
    # Classes of other libraries, by name, so that these need not be there.
    "timm.loss.SoftTargetCrossEntropy": _SOFT,
    "timm.loss.LabelSmoothingCrossEntropy": _SOFT,
    "timm.loss.BinaryCrossEntropy": _COLUMNS,
    "transformers.trainer_pt_utils.LabelSmoother": Reading("classification", -1, -100),
}


def read_criterion(criterion: Callable[..., Any], options: RDropOptions) -> Reading:
    """What `criterion` compares; a `LossError` if that is not known, and no `task=` says it."""
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
    cls = type(criterion)
    library = cls.__module__.rpartition(".")[0] if cls.__module__.startswith("timm.") else cls.__module__
    reading = _KNOWN.get(f"{library}.{cls.__name__}")
    if isinstance(criterion, nn.Module):
        bases = [
            base for base in cls.__mro__ if base in _KNOWN and cls.forward is getattr(base, "forward", None)
        ]
        reading = _KNOWN[bases[0]] if bases else reading
    elif reading is None:
        return _ignoring(_KNOWN.get(criterion) if isinstance(criterion, Hashable) else None, settings)
    return _ignoring(reading, vars(criterion)) if reading else None


def _ignoring(reading: Reading | None, settings: Mapping[str, Any]) -> Reading | None:
    """The reading with the labels that these settings of its criterion leave out."""
    if reading is None or reading.ignore_index is None:
        return reading
    return replace(reading, ignore_index=int(settings.get("ignore_index", -100)))


def divergence_of(
    logits: Tensor, labels: Any, reading: Reading, options: RDropOptions, items: Any = None, mask: Any = None
) -> Tensor:
    """The KL term of what a criterion compares; `mask` says which positions without a label count."""
    logits = reading.logits(logits)
    if reading.task == "classification":
        logits = _classes_last(logits, reading.class_axis)
        compared = _labelled(logits, labels, reading, options)
    else:
        compared = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
        if reading.task == "multilabel":
            compared &= ~torch.isneginf(logits).any(0)
            if options.consistency != "all" and isinstance(labels, Tensor) and labels.shape == compared.shape:
                compared &= labels != options.ignore_index
    if options.consistency == "all" and isinstance(mask, Tensor) and mask.shape == compared.shape:
        compared = mask.bool()
    return divergence(logits, compared, options, reading.task, items)


def _classes_last(logits: Tensor, axis: int | None) -> Tensor:
    if axis is None and logits.dim() > 3:
        raise LossError(
            f"outputs of shape {tuple(logits.shape[1:])}: on which axis are the classes?",
            where="criterion",
            remedy="class_axis=1 for (batch, classes, ...), class_axis=-1 for (batch, ..., classes)",
        )
    if axis is not None and logits.dim() > 2:
        logits = classes_last(logits, axis)
    if logits.shape[-1] == 1:
        raise LossError("there is one class, which all passes agree on", remedy='task="multilabel"')
    return logits


def _labelled(logits: Tensor, labels: Any, reading: Reading, options: RDropOptions) -> Tensor:
    """Which positions count: those with a label, where labels are indices."""
    places = logits.shape[1:-1]
    indices = isinstance(labels, Tensor) and not labels.is_floating_point()
    ignores = indices and reading.ignore_index is not None and options.consistency != "all"
    if not ignores or labels.shape == logits.shape[1:]:  # or one-hot, as integers
        return torch.ones(places, dtype=torch.bool, device=logits.device)
    if labels.shape != places:
        raise LossError(
            f"labels of shape {tuple(labels.shape)} for positions of shape {tuple(places)}",
            where="criterion",
            remedy="class_axis= says on which axis the classes are",
        )
    if options.shift:
        labels = F.pad(labels, (0, 1), value=reading.ignore_index)[..., 1:]
    kept: Tensor = labels.to(logits.device) != reading.ignore_index
    return kept

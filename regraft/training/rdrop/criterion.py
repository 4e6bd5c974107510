"""Loss functions outside the model: what they compare, and the one that fetches all passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import LossError
from regraft.training.passes.nested import leaves, mapped
from regraft.training.rdrop.labels import classes_last
from regraft.training.rdrop.layer import armed
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop_loss import Apart, RDropTerms, divergence, wide


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
        p = wide(outputs)
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
    logits: Tensor,
    labels: Any,
    reading: Reading,
    options: RDropOptions,
    items: Any = None,
    mask: Any = None,
    by: Callable[[Apart], Tensor] | None = None,
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
    return divergence(logits, compared, options, reading.task, items, by)


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


class RDropCriterion(nn.Module):
    """What `rdrop_criterion` returns.

    Args:
        model: the model whose passes it fetches.
        criterion: the loss of one pass.
        strict: raise in training where the model is no longer grafted; else it is the criterion then.

    Attributes:
        terms: the task's loss and the KL of the last step.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., Any], *, strict: bool = True) -> None:
        super().__init__()
        self.criterion, self.strict = criterion, strict
        self.terms: RDropTerms | None = None
        self.__dict__["_model"] = model  # no submodule: its parameters are not the criterion's

    @property
    def model(self) -> nn.Module:
        """The model whose passes it fetches."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def forward(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The R-Drop loss in training; the criterion of the outputs otherwise."""
        model = self.model
        state = armed(model)
        grafted = state is not None and state.outside
        trains = model.training and torch.is_grad_enabled() and _has_gradient(outputs)
        if not trains or not (grafted or self.strict):
            return self.criterion(outputs, *args, **kwargs)  # type: ignore[no-any-return]
        if not grafted:
            raise LossError(
                "the model is no longer grafted with R-Drop, and its criterion still is",
                where=type(model).__name__,
                remedy="train plain with the criterion itself: criterion.criterion",
            )
        if state.kept is None:
            raise LossError(
                "there are no passes to fetch: these outputs do not come from the last training forward",
                where=f"{type(model).__name__} grafted by regraft.rdrop_criterion",
                remedy="call the criterion once after each forward; a second loss goes into one criterion: "
                "lambda outputs, y: first(outputs, y) + second(outputs, y)",
            )
        kept, state.kept = state.kept, None
        loss = state.loss_of(self.criterion, outputs, _of_all_passes(outputs, *kept), args, kwargs)
        self.terms = state.terms
        return loss  # type: ignore[no-any-return]


def _has_gradient(outputs: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf in leaves("", outputs))


def _of_all_passes(given: Any, first: Any, stacked: Any) -> Any:
    """What the criterion was given, of all passes: each tensor is found among the outputs of the first."""
    pairs = [
        (leaf, whole)
        for (_, leaf), (_, whole) in zip(leaves("", first), leaves("", stacked), strict=True)
        if isinstance(leaf, Tensor)
    ]

    def find(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for output, whole in pairs:
            if is_same(leaf, output):
                return whole.reshape(len(whole), *leaf.shape).to(leaf.dtype)
        raise LossError(
            "the criterion was given something else than the model returned: what are its other passes?",
            where=name or f"a tensor of shape {tuple(leaf.shape)}",
            remedy="give it the model's outputs, at most reshaped or cast, and do the rest inside: "
            "rdrop_criterion(model, lambda outputs, y: criterion(change(outputs), y))",
        )

    return mapped(find, "", given)


_KEEPS_VALUES = {
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
    *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "ToCopyBackward0", "_DDPSinkBackward"),
}
"""Steps of the graph behind which the same values stand, in the same order."""


def is_same(given: Tensor, output: Tensor) -> bool:
    """Whether `given` is `output`, at most reshaped or cast, as its graph shows."""
    if given is output:
        return True
    if given.numel() != output.numel():
        return False
    node, number = given.grad_fn, given.output_nr
    while node is not None:
        if (node, number) == (output.grad_fn, output.output_nr):
            return True
        if node.name() not in _KEEPS_VALUES:
            return False
        node, number = node.next_functions[number]
    return False

"""What a model's own loss is: shown by forwards on logits and labels that could have come out otherwise.

The model's loss is used as it is, once for each pass, unless it has been shown to be the plain loss of its
logits: then it can be computed from the logits of all passes at once. For that the logits are disturbed
inside the forward, and the labels drawn anew, so that every class appears, a loss of the labels as they
are differs from one of labels shifted by a position, and what agrees by chance does not agree again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regraft.errors import LossError
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.training.rdrop.fields import logits_in, loss_in
from regraft.training.rdrop.labels import infer_task
from regraft.training.rdrop.layer import Call, Forward
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop_loss import rdrop_terms

_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}
_MOST_LOOKS, _MOST_LOOKS_FOR_SMOOTHING = 64, 256
"""Forwards without gradients before the first step, so that each class has been the label of a position."""
_SPREAD = 1.0
"""The standard deviation of what is added to the logits."""


@dataclass(frozen=True)
class OwnLoss:
    """What has been shown of a model's loss.

    Attributes:
        plain: it is the plain loss of its logits.
        shift: position t predicts label t + 1.
        items: it is divided by `num_items_in_batch`, as Trainer passes it; None where it was not passed.
        why: what speaks against `plain`.
    """

    plain: bool
    shift: bool
    items: bool | None = None
    why: str = ""


def problem_of(model: nn.Module) -> str | None:
    """The task that a Transformers model has set in its configuration, with its first labelled forward."""
    return _PROBLEMS.get(getattr(getattr(model, "config", None), "problem_type", None) or "")


def infer_loss(model: nn.Module, forward: Forward, call: Call, options: RDropOptions) -> OwnLoss | None:
    """What the model's own loss is; None while its labels show nothing.

    Raises:
        LossError: it gives no loss, or it cannot be seen which label a position predicts.
    """
    with torch.no_grad(), buffers_kept(list(model.modules())):
        return _Trial(model, forward, call, options).run()


def disagreement(
    model: nn.Module, forward: Forward, call: Call, options: RDropOptions, own: OwnLoss
) -> str | None:
    """How the model's own loss differs from the plain one on a call as it is; None if it does not."""
    with torch.no_grad(), buffers_kept(list(model.modules())):
        trial = _Trial(model, forward, call, options)
        value, logits = trial.forward(trial.labels, trial.items)
        plain = trial.plain(logits, trial.labels, own.shift, trial.items if own.items else None)
    return None if _equal(value, plain) else f"{_number(value)}, not {_number(plain)}"


class _Trial:
    """Forwards of one call with other labels and disturbed logits; the noise is the same in each."""

    def __init__(self, model: nn.Module, forward: Forward, call: Call, options: RDropOptions) -> None:
        self.model, self.run_forward, self.options = model, forward, options
        self.args, kwargs = call
        self.name = str(options.labels)
        self.labels: Tensor = kwargs[self.name]
        self.ignored = self.labels == options.ignore_index
        self.items = kwargs.get("num_items_in_batch")
        self.kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        self.where = type(model).__name__
        self.disturb = _Disturbed()

    @property
    def task(self) -> str | None:
        """What the options say, or the model, once a labelled forward has shown it."""
        return self.options.task or problem_of(self.model)

    def run(self) -> OwnLoss | None:
        if bool(self.ignored.all()):
            return None
        _, logits = self.forward(self.labels, disturbed=True)
        self.disturb.target = self.disturb.made.get(id(logits))
        items = None
        if self.items is not None:
            items = not _equal(*(self.forward(self.labels, times * self.items)[0] for times in (1, 2)))
        shift, why = self._show_plain(logits, self.items if items else None)
        if not why and not self._runs_without_labels(logits):
            why = "its logits are others when it has no labels"
        if why and self.options.label_smoothing:
            raise LossError(
                f"label_smoothing is of the plain cross-entropy, and {self.where}'s own loss is not: {why}",
                remedy="give the whole loss: regraft.rdrop(model, criterion=...)",
            )
        if shift is None:
            shift = self.options.shift
        if shift is None and self.options.alpha and self._has_time(logits):
            shift = self._show_shift(logits)
        return OwnLoss(not why, bool(shift), items, why)

    def forward(self, labels: Tensor, items: Any = None, *, disturbed: bool = False) -> tuple[Tensor, Tensor]:
        """The model's own loss and its logits."""
        kwargs = {**self.kwargs, self.name: labels}
        if items is not None:
            kwargs["num_items_in_batch"] = items
        with random_state_kept(), self.disturb if disturbed else nullcontext():
            outputs = self.run_forward(*self.args, **kwargs)
        own = loss_in(outputs, self.options.loss)
        if own is None:
            raise LossError(
                f"{self.where} was given labels and returned no loss",
                where=f"{self.where}.forward",
                remedy="name the output: loss=1 or loss='name'; a criterion= computes one",
            )
        key = self.options.logits
        assert not isinstance(key, tuple)
        return own, logits_in(outputs, key, labelled=True, where=self.where)

    def plain(self, logits: Tensor, labels: Tensor, shift: bool, items: Any = None) -> Tensor | None:
        """The plain loss of these logits and labels; None where there is none."""
        plain = {"alpha": 0.0, "ce": "mean", "label_smoothing": 0.0, "reduction": "sum"}
        options = replace(self.options, shift=shift, task=self.task, **plain)  # type: ignore[arg-type]
        try:
            return rdrop_terms(logits[None], labels.to(logits.device), options, items=items).task
        except LossError:
            return None

    def _show_plain(self, logits: Tensor, items: Any) -> tuple[bool | None, str]:
        """The alignment with which the loss is plain, and what speaks against its being plain."""
        if self.options.loss is not None:
            return None, "loss= says that the model's own is used"
        if self.disturb.target is None:
            return None, "its logits could not be disturbed"
        try:
            task = self.task or infer_task(logits[None], self.labels, self.options.ignore_index)
        except LossError:
            return None, "its labels can mean several tasks"
        classes = logits.shape[-1]
        sets = _label_sets(task, self.labels, self.ignored, classes)
        if len(sets) > (_MOST_LOOKS_FOR_SMOOTHING if self.options.label_smoothing else _MOST_LOOKS):
            return None, f"showing each of {classes} classes takes {len(sets)} forwards"
        shifts = [False, True] if self._has_time(logits) else [False]
        if self.options.shift is not None:
            shifts = [self.options.shift]
        told_apart = len(shifts) == 1
        for labels in sets:
            self.disturb.add = _noise(logits)
            value, seen = self.forward(labels, disturbed=True)
            if torch.equal(seen, logits):
                return None, "its logits could not be disturbed"
            values = {shift: self.plain(seen, labels, shift) for shift in shifts}
            if len(values) == 2 and not _equal(*values.values()):
                told_apart = True
            shifts = [shift for shift, plain in values.items() if _equal(value, plain)]
            if not shifts:
                listed = " or ".join(map(_number, values.values()))
                return None, f"it is {_number(value)} where the plain one is {listed}"
        if not told_apart or len(shifts) != 1:
            return None, "labels as they are and shifted ones give the same loss"
        value, seen = self.forward(self.labels, self.items)
        plain = self.plain(seen, self.labels, shifts[0], items)
        same = _equal(value, plain)
        return shifts[0], "" if same else f"it is {_number(value)} where the plain one is {_number(plain)}"

    def _runs_without_labels(self, logits: Tensor) -> bool:
        """Whether the model gives the same logits when it is given no labels."""
        kwargs = without_labels(self.model, self.kwargs, self.name)
        try:
            with random_state_kept():
                outputs = self.run_forward(*self.args, **kwargs)
            seen = logits_in(outputs, self.options.logits, labelled=False)  # type: ignore[arg-type]
        except Exception:
            return False
        same = seen.shape == logits.shape
        return same and torch.allclose(seen, logits, rtol=1e-3, atol=1e-3, equal_nan=True)

    def _has_time(self, logits: Tensor) -> bool:
        integers = not self.labels.is_floating_point() and self.labels.dim() > 1
        return integers and self.labels.shape == logits.shape[:-1] and self.labels.shape[-1] > 1

    def _show_shift(self, logits: Tensor) -> bool:
        """Which logits a label depends on: those of its own position, or of the one before.

        The last label of a row that counts belongs to no later logits, so that disturbing the logits at its
        own position changes an aligned loss and no shifted one.
        """
        kept = (~self.ignored).flatten(0, -2)
        row = int(kept.sum(-1).argmax())
        last = int(kept[row].nonzero()[-1])
        if self.disturb.target is not None and last > 0:
            losses = []
            for position in (None, last, last - 1):
                self.disturb.add = torch.zeros_like(logits)
                if position is not None:
                    place = self.disturb.add.flatten(0, -3)[row, position]
                    place.copy_(5 * _noise(place))
                losses.append(self.forward(self.labels, disturbed=True)[0])
            aligned, shifted = (not torch.equal(loss, losses[0]) for loss in losses[1:])
            if aligned or shifted:
                return not aligned
        raise LossError(
            f"it cannot be seen which label a position of {self.where} predicts",
            where=f"{self.where}.forward",
            remedy="say shift=True (position t predicts label t + 1, as in a causal model) or shift=False",
        )


class _Disturbed(TorchFunctionMode):
    """Notes which operation made a tensor; adds `add` to what the operation `target` made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}
        self.target: int | None = None
        self.add: Tensor | None = None
        self.count = 0

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(result is argument for argument in args):
            if self.target is None:
                self.made[id(result)] = self.count
            elif self.count == self.target and self.add is not None and result.shape == self.add.shape:
                result.add_(self.add.to(result.dtype))
            self.count += 1
        return result


def _label_sets(task: str, labels: Tensor, ignored: Tensor, classes: int) -> list[Tensor]:
    """Labels drawn anew: each class, each of 0 and 1, other values; what is ignored stays so."""
    generator = torch.Generator().manual_seed(0)
    if task == "regression" or (task == "classification" and labels.is_floating_point()):
        # Values, or probabilities of classes, which stay valid when they are exchanged between positions.
        if task == "classification":
            flat = labels.flatten(0, -2)
            wheel = torch.randperm(classes, generator=generator).to(labels.device)
            return [flat[:, wheel].view_as(labels), flat.flip(-1).view_as(labels)]
        noise = torch.randn(2, *labels.shape, generator=generator).to(labels.device)
        return [(labels + add).to(labels.dtype) for add in noise]
    if task == "multilabel":
        bits = torch.randint(0, 2, labels.shape, generator=generator).to(labels.device)
        return [labels.where(ignored, each.to(labels.dtype)) for each in (bits, 1 - bits)]
    count = int((~ignored).sum())
    sets = max(2, -(-classes // count))
    if sets > _MOST_LOOKS_FOR_SMOOTHING:
        return [labels] * sets
    order = torch.randperm(classes, generator=generator).repeat(-(-sets * count // classes))
    drawn = order[: sets * count].view(sets, count).to(labels)
    made = [labels.clone() for _ in range(sets)]
    for each, values in zip(made, drawn, strict=True):
        each[~ignored] = values
    return made


def _noise(like: Tensor) -> Tensor:
    with random_state_kept():
        return _SPREAD * torch.randn_like(like)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    # A loss computed in half precision is off by more than its rounding: it sums many terms.
    half = a.dtype in (torch.float16, torch.bfloat16)
    tolerance = 2e-2 if half else 2e-5
    return torch.allclose(a.float(), b.float().to(a.device), rtol=tolerance, atol=tolerance / 10)


def _number(value: Tensor | None) -> str:
    return "undefined" if value is None else f"{value.item():.6g}"


def without_labels(model: nn.Module, kwargs: dict[str, Any], name: str = "labels") -> dict[str, Any]:
    """The arguments of a forward that shall compute no loss; a decoder still gets its inputs from them."""
    rest = {key: value for key, value in kwargs.items() if key not in (name, "num_items_in_batch")}
    make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    given = rest.get("decoder_input_ids") is not None or rest.get("decoder_inputs_embeds") is not None
    if make is not None and not given:
        rest["decoder_input_ids"] = make(labels=kwargs[name])
    return rest

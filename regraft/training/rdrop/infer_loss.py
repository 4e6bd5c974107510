"""What a model's own loss is: shown by forwards on logits and labels that could have come out otherwise.

The model's loss is used as it is, once for each pass, unless it has been shown to be the plain loss of its
logits: then it can be computed from the logits of all passes at once. For that the logits are disturbed
inside the forward, and the labels drawn anew, so that every class appears, a loss of the labels as they
are differs from one of labels shifted by a position, and what agrees by chance does not agree again.
"""

from __future__ import annotations

from contextlib import ExitStack
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
        return (
            None if plain is not None and _equal(value, plain) else f"{_number(value)}, not {_number(plain)}"
        )


class _Trial:
    """Forwards of one call with other labels and disturbed logits; the noise is the same in each."""

    def __init__(self, model: nn.Module, forward: Forward, call: Call, options: RDropOptions) -> None:
        self.model, self.run_forward, self.options = model, forward, options
        self.args, kwargs = call
        self.name = str(options.labels)
        self.labels: Tensor = kwargs[self.name]
        self.items = kwargs.get("num_items_in_batch")
        self.kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        self.where = type(model).__name__

    def run(self) -> OwnLoss | None:
        labels, ignored = self.labels, self.labels == self.options.ignore_index
        if bool(ignored.all()):
            return None
        disturb = _Disturbed()
        _, logits = self.forward(labels, mode=disturb)
        disturb.target = disturb.made.get(id(logits))
        items = self._uses_items()
        plain, shift, why = self._show_plain(logits, ignored, disturb, self.items if items else None)
        if plain and not _runs_without_labels(self, logits):
            plain, why = False, "its logits are others when it has no labels"
        if not plain and self.options.label_smoothing:
            raise LossError(
                f"label_smoothing is of the plain cross-entropy, and {self.where}'s own loss is not: {why}",
                remedy="give the whole loss: regraft.rdrop(model, criterion=...)",
            )
        if shift is None:
            shift = self.options.shift
        if shift is None and self.options.alpha and self._has_time(logits):
            shift = self._show_shift(logits, ignored, disturb)
        return OwnLoss(plain, bool(shift), items, why)

    def forward(
        self, labels: Tensor, items: Any = None, *, mode: TorchFunctionMode | None = None
    ) -> tuple[Tensor, Tensor]:
        """The model's own loss and its logits."""
        kwargs = {**self.kwargs, self.name: labels}
        if items is not None:
            kwargs["num_items_in_batch"] = items
        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            if mode is not None:
                stack.enter_context(mode)
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
        task = self.options.task or problem_of(self.model)
        options = replace(
            self.options, alpha=0.0, ce="mean", shift=shift, task=task, label_smoothing=0.0, reduction="sum"
        )
        try:
            return rdrop_terms(logits[None], labels.to(logits.device), options, items=items).task
        except LossError:
            return None

    def _show_plain(
        self, logits: Tensor, ignored: Tensor, disturb: _Disturbed, items: Any
    ) -> tuple[bool, bool | None, str]:
        """Whether the loss is plain, the alignment with which it is, and else why it is not."""
        if self.options.loss is not None:
            return False, None, "loss= says that the model's own is used"
        if disturb.target is None:
            return False, None, "its logits could not be disturbed"
        try:
            task = self.options.task or problem_of(self.model) or self._task(logits)
        except LossError:
            return False, None, "its labels can mean several tasks"
        sets = _label_sets(task, self.labels, ignored, logits.shape[-1])
        most = _MOST_LOOKS_FOR_SMOOTHING if self.options.label_smoothing else _MOST_LOOKS
        if len(sets) > most:
            return False, None, f"showing each of {logits.shape[-1]} classes takes {len(sets)} forwards"
        shifts = [False, True] if self._has_time(logits) else [False]
        if self.options.shift is not None:
            shifts = [self.options.shift]
        told_apart = len(shifts) == 1
        for labels in sets:
            disturb.add = _noise(logits)
            value, seen = self.forward(labels, mode=disturb)
            if torch.equal(seen, logits):
                return False, None, "its logits could not be disturbed"
            values = {shift: self.plain(seen, labels, shift) for shift in shifts}
            if len(values) == 2 and not _equal(*values.values()):
                told_apart = True
            shifts = [shift for shift, plain in values.items() if plain is not None and _equal(value, plain)]
            if not shifts:
                return (
                    False,
                    None,
                    f"it is {_number(value)} where the plain one is "
                    + " or ".join(map(_number, values.values())),
                )
        if not told_apart or len(shifts) != 1:
            return False, None, "labels as they are and shifted ones give the same loss"
        value, seen = self.forward(self.labels, self.items)
        plain = self.plain(seen, self.labels, shifts[0], items)
        if plain is None or not _equal(value, plain):
            return False, shifts[0], f"it is {_number(value)} where the plain one is {_number(plain)}"
        return True, shifts[0], ""

    def _uses_items(self) -> bool | None:
        if self.items is None:
            return None
        values = [self.forward(self.labels, times * self.items)[0] for times in (1, 2)]
        return not _equal(*values)

    def _task(self, logits: Tensor) -> str:
        return infer_task(logits[None], self.labels, self.options.ignore_index)

    def _has_time(self, logits: Tensor) -> bool:
        integers = not self.labels.is_floating_point() and self.labels.dim() > 1
        return integers and self.labels.shape == logits.shape[:-1] and self.labels.shape[-1] > 1

    def _show_shift(self, logits: Tensor, ignored: Tensor, disturb: _Disturbed) -> bool:
        """Which logits a label depends on: those of its own position, or of the one before.

        The last label of a row that counts belongs to no later logits, so that disturbing the logits at its
        own position changes an aligned loss and no shifted one.
        """
        row = int((~ignored).flatten(0, -2).sum(-1).argmax())
        last = int((~ignored).flatten(0, -2)[row].nonzero()[-1])
        if disturb.target is not None and last > 0:
            changes = []
            disturb.add = torch.zeros_like(logits)
            before, _ = self.forward(self.labels, mode=disturb)
            for position in (last, last - 1):
                add = torch.zeros_like(logits)
                add.flatten(0, -3)[row, position] = _noise(add.flatten(0, -3)[row, position]) * 5
                disturb.add = add
                value, _ = self.forward(self.labels, mode=disturb)
                changes.append(not torch.equal(value, before))
            if changes[0] or changes[1]:
                return not changes[0]
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
        return a is b
    # A loss computed in half precision is off by more than its rounding: it sums many terms.
    half = a.dtype in (torch.float16, torch.bfloat16)
    tolerance = 2e-2 if half else 2e-5
    return torch.allclose(a.float(), b.float().to(a.device), rtol=tolerance, atol=tolerance / 10)


def _number(value: Tensor | None) -> str:
    return "undefined" if value is None else f"{value.item():.6g}"


def _runs_without_labels(trial: _Trial, logits: Tensor) -> bool:
    """Whether the model gives the same logits when it is given no labels."""
    kwargs = without_labels(trial.model, trial.kwargs, trial.name)
    try:
        with random_state_kept():
            outputs = trial.run_forward(*trial.args, **kwargs)
        seen = logits_in(outputs, trial.options.logits, labelled=False)  # type: ignore[arg-type]
    except Exception:
        return False
    return seen.shape == logits.shape and torch.allclose(seen, logits, rtol=1e-3, atol=1e-3, equal_nan=True)


def without_labels(model: nn.Module, kwargs: dict[str, Any], name: str = "labels") -> dict[str, Any]:
    """The arguments of a forward that shall compute no loss; a decoder still gets its inputs from them."""
    rest = {key: value for key, value in kwargs.items() if key not in (name, "num_items_in_batch")}
    make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    given = rest.get("decoder_input_ids") is not None or rest.get("decoder_inputs_embeds") is not None
    if make is not None and not given:
        rest["decoder_input_ids"] = make(labels=kwargs[name])
    return rest

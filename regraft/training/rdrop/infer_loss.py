"""What R-Drop must know of a model's own loss: whether it is the plain loss of its task, and of which labels.

Found out by one forward before the first step, not from names: a loss with class weights, label smoothing
or a router's part in it is used as it is, a plain one is computed from the logits, which every strategy
can do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.training.passes.outputs import logits_of, loss_of
from regraft.training.rdrop.rdrop_loss import rdrop_terms

_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def learn(
    model: nn.Module, forward: Callable[..., Any], call: Call, *, task: str | None, ignore_index: int
) -> tuple[bool, bool]:
    """Whether the model's own loss has to be used, and whether its labels are shifted."""
    if torch.compiler.is_compiling():
        return False, _shifts_by_name(model)
    args, kwargs = call
    kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    with torch.no_grad(), random_state_kept(), buffers_kept(list(model.modules())):
        outputs = forward(*args, **kwargs)
        own = loss_of(outputs)
        if own is None or own.dim():
            raise LossError(
                f"{type(model).__name__} was given labels and returned no loss",
                remedy="regraft.rdrop(model, criterion=...) computes one",
            )
        logits = logits_of(outputs, labelled=True, where=type(model).__name__)
        shift = _matching_shift(own, logits, kwargs["labels"], task or problem_of(model), ignore_index)
        unlabelled = shift is not None and _runs_without_labels(model, forward, args, kwargs)
    return not unlabelled, _shifts_by_name(model) if shift is None else shift


def _matching_shift(
    own: Tensor, logits: Tensor, labels: Tensor, task: str | None, ignore_index: int
) -> bool | None:
    """With which alignment of labels the plain loss is the model's own; None if with neither."""
    # A loss computed in half precision is off by more than its rounding: it sums many terms.
    tolerance = 2e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    options: dict[str, Any] = {"task": task, "ce": "mean", "ignore_index": ignore_index}
    for shift in (False, True):
        try:
            plain = rdrop_terms(logits[None], labels.to(logits.device), 0, shift=shift, **options).task
        except LossError:
            continue
        if torch.allclose(plain.float(), own.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
            return shift
    return None


def _runs_without_labels(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    try:
        logits_of(forward(*args, **without_labels(model, kwargs)), labelled=False)
    except Exception:
        return False
    return True


def without_labels(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that shall compute no loss; a decoder still gets its inputs from them."""
    rest = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
    make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    given = rest.get("decoder_input_ids") is not None or rest.get("decoder_inputs_embeds") is not None
    if make is not None and not given:
        rest["decoder_input_ids"] = make(labels=kwargs["labels"])
    return rest


def with_named_labels(forward: Callable[..., Any], call: Call) -> Call:
    """The same call with its labels as a keyword, if they were given by position."""
    args, kwargs = call
    if "labels" in kwargs or not args:
        return call
    names = list(inspect.signature(forward).parameters)
    if "labels" not in names[: len(args)]:
        return call
    named = dict(zip(names, args, strict=False))
    return (), {**named, **kwargs}


def problem_of(model: nn.Module) -> str | None:
    """The task that a Transformers model says it has; it knows after its first forward with labels."""
    return _PROBLEMS.get(getattr(getattr(model, "config", None), "problem_type", None) or "")


def _shifts_by_name(model: nn.Module) -> bool:
    names = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encodes and type(model).__name__.endswith(names)

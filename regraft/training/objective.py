"""What a model grafted with R-Drop computes in training: its passes, the loss over them, its outputs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.errors import LossError
from regraft.training.passes import run_passes
from regraft.training.rdrop_loss import RDropTerms, rdrop_terms
from regraft.training.tree import mapped

_log = logging.getLogger("regraft")
_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}

Options = dict[str, Any]


class RDropOutput(NamedTuple):
    """What a model with a criterion returns when it is called with labels."""

    loss: Tensor
    logits: Any


@dataclass
class State:
    """What is learnt of a model by its first step, and the terms of its last one.

    Attributes:
        own_loss: whether the model's own loss is another than the plain one of its task, and so is used.
        shift: whether position t predicts label t + 1.
        terms: task's loss and KL of the last step, for a log.
        told: reasons that were logged.
    """

    own_loss: bool | None = None
    shift: bool = False
    terms: RDropTerms | None = None


_states: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()
_told: set[tuple[str, str]] = set()


def state_of(model: nn.Module) -> State:
    """The state of a model's R-Drop; it is no part of the model, and starts anew in a copy."""
    return _states.setdefault(model, State())


def rdrop_forward(
    model: nn.Module, forward: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: Options
) -> Any:
    """One forward of a grafted model: R-Drop's in training with labels, else the model's own."""
    if options["criterion"] is not None:
        return _by_criterion(model, forward, options, args, kwargs)
    if not model.training:
        return forward(*args, **kwargs)
    args, kwargs, labels = _labels(forward, args, kwargs)
    if labels is None:
        _tell(model, "it is trained without labels, so without R-Drop (label smoothing is rdrop's option)")
        return forward(*args, **kwargs)
    state = state_of(model)
    if state.own_loss is None and options["label_smoothing"]:
        state.own_loss, state.shift = False, bool(options["shift"])
    if state.own_loss is None:
        _learn(model, state, forward, options, args, kwargs, labels)
    if state.own_loss:
        return _by_own_loss(model, state, forward, options, args, kwargs, labels)
    return _by_logits(model, state, forward, options, args, kwargs, labels)

"""Trainers of Transformers and TRL that compute the loss from the model's outputs, without its labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def loss_of_trainer() -> tuple[Any, str]:
    """The Trainer whose `compute_loss` runs, and which of its attributes computes the loss; None without."""
    for trainer, method in _callers():
        for name in ("compute_loss_func", "label_smoother"):
            if method == "compute_loss" and getattr(trainer, name, None) is not None:
                return trainer, name
    return None, ""


def use_logits(model: nn.Module) -> None:
    """Let the TRL trainer that calls this compute its loss from logits, and not in a fused head.

    Without label smoothing it would, for `loss_type="nll"`, compute the loss in a forward that it puts on
    the model, which gives no logits to compare; with a smoothing of 0 it computes the same from them.
    """
    forwards = [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]
    codes = [getattr(getattr(forward, "__func__", forward), "__code__", None) for forward in forwards]
    if not any(code is not None and "fused_lm_head" in code.co_varnames for code in codes):
        return
    for trainer, _ in _callers():
        if hasattr(trainer, "label_smoother") and trainer.label_smoother is None:
            from transformers.trainer_pt_utils import LabelSmoother

            trainer.label_smoother = LabelSmoother(epsilon=0.0)


def _callers() -> Iterator[tuple[Any, str]]:
    """Objects whose methods are running, the innermost first, and the methods' names."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals["self"], frame.f_code.co_name
        frame = frame.f_back

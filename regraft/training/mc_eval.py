"""A model whose evaluation is a Monte Carlo prediction: what evaluates it need not know."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError
from regraft.find.walk import inner_model
from regraft.graft.classes import Namespace
from regraft.graft.slots import set_graft
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.training.mc import Reading, sampling
from regraft.training.passes.api import check_count, is_passing, passing, run_passes
from regraft.training.passes.measure import Forward
from regraft.training.passes.nested import Call, pass_of
from regraft.training.rdrop.fields import loss_in, parts_of, with_loss
from regraft.training.rdrop.rdrop_loss import wide

_SLOT = Slot("passes", "mc")
_KEY = str(_SLOT)


def mc_eval(
    model: nn.Module,
    n: int,
    *,
    task: str = "classification",
    class_axis: int | None = None,
    droppath: bool = False,
    strategy: str = "auto",
    chunk: int | None = None,
) -> nn.Module:
    """Graft a model so that in eval, without gradients, it predicts by n stochastic passes.

    Its logits are then those of the mean prediction: the logarithm of the mean probabilities
    (classification), the logit of the mean rate ("multilabel", "binary"), or the mean ("regression"). Its
    loss is the mean of the passes' losses. Training is as before; `regraft.revert(model)` undoes it.

    Args:
        model: one that returns logits.
        n: how many passes, 2 or more.
        task: see `regraft.mc_predict`.
        class_axis: likewise.
        droppath: likewise.
        strategy: likewise.
        chunk: likewise.

    Returns:
        The model.
    """
    check_count("n", n, 2)
    root, _ = inner_model(model)
    passes = _MonteCarlo(n, Reading(task, class_axis), droppath, strategy, chunk)
    set_graft(root, _SLOT, Graft(_SLOT, Layer(mc_layer), options={"passes": passes}))
    return model


def without_mc(model: nn.Module) -> nn.Module:
    """The model that evaluates by one pass; its other grafts stay."""
    root, _ = inner_model(model)
    if _KEY in grafts_of(root):
        set_graft(root, _SLOT, None)
    return model


def mc_layer(base: type[nn.Module]) -> Namespace:
    """The layer of Monte Carlo prediction."""
    own = base.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graft: Graft | None = (self.__dict__.get(RECORD) or {}).get(_KEY)
        if graft is None or self.training or torch.is_grad_enabled() or is_passing(self):
            return own(self, *args, **kwargs)
        passes: _MonteCarlo = graft.options["passes"]
        return passes.forward(self, functools.partial(own, self), (args, kwargs))

    return {"forward": forward}


@dataclass
class _MonteCarlo:
    n: int
    reading: Reading
    droppath: bool
    strategy: str
    chunk: int | None
    warned: bool = False

    def forward(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        if call[1].get("past_key_values") is not None or call[1].get("use_cache"):
            raise LossError(
                "a cache of keys and values is of one pass: Monte Carlo prediction cannot generate",
                remedy="regraft.revert(model) before model.generate",
            )
        with passing(model), sampling(model, call, None, self.droppath):
            outputs = run_passes(model, forward, self.n, call, strategy=self.strategy, chunk=self.chunk)
        logits, axis = self.reading.logits(outputs, type(model).__name__)
        if not self.warned and torch.equal(logits[0], logits[1]):
            self.warned = True
            warnings.warn(
                f"the passes of {type(model).__name__} are equal: no dropout at a rate above 0 runs",
                stacklevel=2,
            )
        mean = _mean_logits(wide(logits), self.reading.task, axis)
        if isinstance(outputs, Tensor):
            return mean
        loss = loss_in(outputs, "loss", dims=1)
        key = next(key for key, value in parts_of(outputs).items() if value is logits)
        result = with_loss(pass_of(outputs, 0), mean, key, labelled=True)
        return result if loss is None else with_loss(result, loss.mean(), "loss", labelled=True)


def _mean_logits(logits: Tensor, task: str, axis: int) -> Tensor:
    if task == "classification":
        return logits.log_softmax(axis).logsumexp(0) - math.log(len(logits))
    if task == "regression":
        return logits.mean(0)
    mean: Tensor = torch.special.logit(logits.sigmoid().mean(0), eps=torch.finfo(logits.dtype).eps)
    return mean

"""For Hugging Face `Trainer`: R-Drop, schedules of rates and max-norm as callbacks.

The classes are made when they are first asked for, so that reading this file does not load Transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from regraft.find.selectors import read_selector
from regraft.training.max_norm import MaxNorm, max_norm
from regraft.training.mc import mc_eval
from regraft.training.rdrop.layer import disarm
from regraft.training.rdrop.rdrop import RDropLog, rdrop
from regraft.training.rdrop.state import state_of, use_logits
from regraft.training.schedule import Schedule, schedule


class _RDrop:
    """Trains with R-Drop while `Trainer` trains, and logs its two terms apart.

    The model is grafted when the Trainer is made, and is as before when training ends. Each entry of the
    log has `task_loss` and `kl`, the means since the entry before; reporters that are to see them come
    behind this callback in `trainer.callback_handler.callbacks`.

    Args:
        alpha: weight of the KL.
        passes: how many.
        options: of `regraft.rdrop`.

    Example:
        >>> from regraft.integrations.transformers import RDropCallback
        >>> callback = RDropCallback(alpha=1.0)  # Trainer(model, arguments, callbacks=[callback], ...)
    """

    def __init__(self, alpha: float = 1.0, passes: int = 2, **options: Any) -> None:
        self.options = {"alpha": alpha, "passes": passes, **options}
        self.log = RDropLog()

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        rdrop(model, **self.options)

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        if state_of(model) is None:
            rdrop(model, **self.options)
        use_logits(model)
        self.log.watch(model)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.log.substep()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.log.step()

    def on_log(self, _: Any, state: Any, *__: Any, logs: Any = None, **___: Any) -> None:
        if logs is not None and "loss" in logs:
            terms = self.log.means()
            logs.update(terms)
            state.log_history[-1].update(terms)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        disarm(model)


class _MonteCarlo:
    """Lets `Trainer` evaluate and predict by Monte Carlo dropout: n passes, whose mean is the prediction.

    Training, and what is logged of it, are as without. Metrics are of the mean prediction, and
    `predictions` of `Trainer.predict` its logarithm; the loss is the mean of the passes' losses.

    Args:
        n: how many passes.
        options: of `regraft.training.mc.mc_eval`: task, class_axis, droppath, strategy, chunk.

    Example:
        >>> from regraft.integrations.transformers import MonteCarloCallback
        >>> callback = MonteCarloCallback(32)  # Trainer(model, arguments, callbacks=[callback], ...)
    """

    def __init__(self, n: int, **options: Any) -> None:
        self.n, self.options = n, options

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        mc_eval(model, self.n, **self.options)


class _Scheduled:
    """Lets rates change while `Trainer` trains, and logs the rate with each loss.

    A run that is resumed from a checkpoint goes on where it was: the rate follows Trainer's own count of
    steps. When training ends every rate is what it was before.

    Args:
        p: as of `regraft.schedule`; without `steps` the whole training.
        selector: which sites, likewise.
        inputs: for the probe, likewise.

    Example:
        >>> from regraft.integrations.transformers import ScheduleCallback
        >>> early = ScheduleCallback({"start": 0.1, "steps": 500, "shape": "early"}, "Dropout")
    """

    def __init__(self, p: Mapping[str, Any], selector: Any = None, inputs: Any = None) -> None:
        self.p, self.selector, self.inputs = dict(p), selector, inputs
        self.schedule: Schedule | None = None

    def _begin(self, model: Any) -> Schedule:
        # How many steps the training has is known when it begins.
        self.schedule = schedule(model, {"steps": 1, **self.p}, self.selector, self.inputs)
        return self.schedule

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self._begin(model)

    def on_train_begin(self, _: Any, state: Any, *__: Any, model: Any = None, **___: Any) -> None:
        made = self.schedule or self._begin(model)
        if "steps" not in self.p:
            made.extend(state.max_steps)

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if self.schedule is not None:
            self.schedule.step(to=state.global_step)

    def on_log(self, _: Any, state: Any, *__: Any, logs: Any = None, **___: Any) -> None:
        if self.schedule is not None and logs is not None and "loss" in logs:
            logs["rate"] = state.log_history[-1]["rate"] = self.schedule.rate

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.schedule is not None:
            self.schedule.remove()
            self.schedule = None


class _Limited:
    """Holds rows of weights to a norm while `Trainer` trains: `regraft.max_norm` with its optimizer.

    Relative bounds are written into Trainer's checkpoints, so that a resumed run keeps those that it began
    with.

    Args:
        limits: of `regraft.max_norm`.

    Attributes:
        held: what it returned.

    Example:
        >>> from regraft.integrations.transformers import MaxNormCallback
        >>> callback = MaxNormCallback({"Linear": "1.1x"})
    """

    def __init__(self, limits: Mapping[Any, Any]) -> None:
        self.limits = dict(limits)
        self.held: MaxNorm | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON values."""
        bounds = {} if self.held is None else self.held.state_dict()
        return {
            "args": {"limits": {read_selector(key).text: bound for key, bound in self.limits.items()}},
            "attributes": {"saved": {path: bound.tolist() for path, bound in bounds.items()}},
        }

    def on_train_begin(
        self, _: Any, state: Any, *__: Any, model: Any = None, optimizer: Any = None, **___: Any
    ) -> None:
        # Watch the optimizer, which is there now; of a resumed run take the bounds in its checkpoint.
        self.held = max_norm(model, self.limits, optimizer)
        own, name = self.state(), type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, own)
        saved = saved if isinstance(saved, list) else [saved]
        entries = [one for one in saved if one["args"] == own["args"]]
        bounds = entries[-1]["attributes"]["saved"] if entries and state.global_step else {}
        if bounds and entries[-1] is not own:
            self.held.load_state_dict({path: torch.tensor(bound) for path, bound in bounds.items()})
        elif state.global_step and own["attributes"]["saved"]:
            warnings.warn(
                "the checkpoint has no bounds of max-norm: they are relative to the norms as they are now",
                stacklevel=2,
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.held is not None:
            self.held.remove()


if TYPE_CHECKING:
    from transformers import TrainerCallback

    class RDropCallback(_RDrop, TrainerCallback):  # type: ignore[misc, unused-ignore]
        """See `_RDrop`."""

    class MonteCarloCallback(_MonteCarlo, TrainerCallback):  # type: ignore[misc, unused-ignore]
        """See `_MonteCarlo`."""

    class ScheduleCallback(_Scheduled, TrainerCallback):  # type: ignore[misc, unused-ignore]
        """See `_Scheduled`."""

    class MaxNormCallback(_Limited, TrainerCallback):  # type: ignore[misc, unused-ignore]
        """See `_Limited`."""


__all__ = ["MaxNormCallback", "MonteCarloCallback", "RDropCallback", "ScheduleCallback"]

_METHODS = {
    "RDropCallback": _RDrop,
    "MonteCarloCallback": _MonteCarlo,
    "ScheduleCallback": _Scheduled,
    "MaxNormCallback": _Limited,
}


def __dir__() -> list[str]:
    there = find_spec("transformers") is not None
    return [*globals(), *(_METHODS if there else ())]


def __getattr__(name: str) -> Any:
    if name not in _METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers.trainer_callback import ExportableState, TrainerCallback

    methods = _METHODS[name]
    bases = (TrainerCallback, ExportableState) if hasattr(methods, "state") else (TrainerCallback,)
    made = type(name, (methods, *bases), {"__module__": __name__, "__doc__": methods.__doc__})
    globals()[name] = made
    return made

"""For Lightning: R-Drop and schedules of rates as callbacks.

The classes are made when they are first asked for, so that reading this file does not load Lightning.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from regraft.training.rdrop.layer import disarm
from regraft.training.rdrop.rdrop import RDropLog, rdrop
from regraft.training.schedule import Schedule, schedule


class _RDrop:
    """Trains with R-Drop while a Lightning `Trainer` fits, and logs its two terms apart.

    It grafts the model that the LightningModule holds. One that returns a loss, as those of Transformers
    do, needs no change; with a `criterion`, `training_step` calls `self.model(x, labels=y)` and returns
    the first of what it gives.

    Args:
        alpha: weight of the KL.
        passes: how many.
        attribute: where the LightningModule holds the model.
        options: of `regraft.rdrop`.
    """

    def __init__(self, alpha: float = 1.0, passes: int = 2, attribute: str = "model", **options: Any) -> None:
        self.options = {"alpha": alpha, "passes": passes, **options}
        self.attribute = attribute
        self.terms = RDropLog()  # not `log`: Lightning puts a method of that name on every callback

    def setup(self, _: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.terms.watch(rdrop(getattr(pl_module, self.attribute), **self.options))

    def on_train_batch_end(self, _: Any, pl_module: Any, *__: Any) -> None:
        self.terms.step()
        for name, value in self.terms.means().items():
            pl_module.log(name, value)

    def on_fit_end(self, _: Any, pl_module: Any) -> None:
        disarm(getattr(pl_module, self.attribute))


class _Scheduled:
    """Lets rates change while a Lightning `Trainer` fits, and logs the rate.

    It follows the trainer's own count of steps, also in a run that is resumed. When the fit ends every
    rate is what it was before.

    Args:
        p: as of `regraft.schedule`; without `steps` all that the trainer estimates.
        selector: which sites, likewise.
        inputs: for the probe, likewise.
        attribute: where the LightningModule holds the model.
    """

    def __init__(
        self, p: Mapping[str, Any], selector: Any = None, inputs: Any = None, attribute: str = "model"
    ) -> None:
        self.p, self.selector, self.inputs, self.attribute = dict(p), selector, inputs, attribute
        self.schedule: Schedule | None = None

    def setup(self, _: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            model = getattr(pl_module, self.attribute)
            self.schedule = schedule(model, {"steps": 1, **self.p}, self.selector, self.inputs)

    def on_train_start(self, trainer: Any, _: Any) -> None:
        if self.schedule is not None and "steps" not in self.p:
            self.schedule.extend(int(trainer.estimated_stepping_batches))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.schedule is not None:
            pl_module.log("rate", self.schedule.step(to=trainer.global_step))

    def on_fit_end(self, *_: Any) -> None:
        if self.schedule is not None:
            self.schedule.remove()
            self.schedule = None


if TYPE_CHECKING:
    from lightning.pytorch import Callback

    class RDropCallback(_RDrop, Callback):  # type: ignore[misc, unused-ignore]
        """See `_RDrop`."""

    class ScheduleCallback(_Scheduled, Callback):  # type: ignore[misc, unused-ignore]
        """See `_Scheduled`."""


__all__ = ["RDropCallback", "ScheduleCallback"]

_METHODS = {"RDropCallback": _RDrop, "ScheduleCallback": _Scheduled}


def __dir__() -> list[str]:
    there = any(map(find_spec, ("lightning", "pytorch_lightning")))
    return [*globals(), *(_METHODS if there else ())]


def __getattr__(name: str) -> Any:
    if name not in _METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "lightning.pytorch" if find_spec("lightning") is not None else "pytorch_lightning"
    base, methods = importlib.import_module(home).Callback, _METHODS[name]
    made = type(name, (methods, base), {"__module__": __name__, "__doc__": methods.__doc__})
    globals()[name] = made
    return made

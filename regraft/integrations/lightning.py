"""For Lightning: R-Drop as a callback."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from regraft.training.rdrop import RDropLog, rdrop, without_rdrop

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback


class RDropCallback(Callback):  # type: ignore[misc, unused-ignore]
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
        self.log = RDropLog()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before anything wraps the model."""
        del trainer
        if stage == "fit":
            self.log.watch(rdrop(getattr(pl_module, self.attribute), **self.options))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the terms of this step."""
        del trainer
        self.log.step()
        for name, value in self.log.means().items():
            pl_module.log(name, value)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """A plain model again."""
        del trainer
        without_rdrop(getattr(pl_module, self.attribute))

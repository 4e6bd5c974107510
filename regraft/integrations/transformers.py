"""For Hugging Face `Trainer`: R-Drop as a callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from regraft.training.rdrop import RDropLog, objective_of, rdrop, without_rdrop


class RDropCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
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
        """Graft the model before anything wraps it."""
        rdrop(model, **self.options)

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Graft it again, if it was trained before."""
        if objective_of(model) is None:
            rdrop(model, **self.options)
        self.log.watch(model)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Note the terms of a step within an accumulation."""
        self.log.step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the terms of a step."""
        self.log.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the terms to the entry of a training loss."""
        if logs is not None and "loss" in logs:
            terms = self.log.means()
            logs.update(terms)
            state.log_history[-1].update(terms)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Leave a plain model."""
        without_rdrop(model)

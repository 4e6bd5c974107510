"""`RDropOptions`: everything that R-Drop can be told, checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regraft.errors import LossError, RateError, nearest
from regraft.training.passes.api import check_strategy

TASKS = ("classification", "multilabel", "regression")
Key = int | str
"""Where an output or an argument is: its position or its name."""

_CHOICES = {
    "task": (*TASKS, None),
    "ce": ("mean", "sum"),
    "reduction": ("batchmean", "sum", "none"),
    "consistency": ("labelled", "all"),
}


@dataclass(frozen=True)
class RDropOptions:
    """The options of `regraft.rdrop`, `rdrop_criterion` and `rdrop_loss`, which document them."""

    alpha: float = 1.0
    passes: int = 2
    criterion: Callable[..., Any] | None = None
    task: str | None = None
    ce: str = "mean"
    reduction: str = "batchmean"
    shift: bool | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_axis: int | None = None
    consistency: str = "labelled"
    logits: Key | tuple[Key, ...] | None = None
    loss: Key | None = None
    labels: Key | tuple[Key, ...] = "labels"
    strategy: str = "auto"
    chunk: int | None = None
    fork: str | float | None = None
    outside: bool = False
    """The criterion is called outside the model."""

    def __post_init__(self) -> None:
        alpha, passes = self.alpha, self.passes
        if isinstance(alpha, Tensor) and alpha.dim():
            raise LossError(
                "the third argument is alpha, and is a tensor here",
                remedy="both passes go into one tensor: rdrop_loss(torch.stack([first, second]), labels)",
            )
        if not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
            raise RateError(f"alpha={alpha!r} is not a number of 0 or more")
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < (2 if alpha else 1):
            raise RateError(f"passes={passes!r} is too few", remedy="R-Drop compares 2 or more")
        if not 0 <= self.label_smoothing < 1:
            raise RateError(f"label_smoothing={self.label_smoothing!r} is not in [0, 1)")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                texts = list(filter(None, known))
                listed = " or ".join(map(repr, texts))
                raise LossError(f"{name}={value!r} is not {listed}", remedy=nearest(str(value), texts))
        check_strategy(self.strategy)

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **more: Any) -> RDropOptions:
        """The options among the arguments of a function."""
        names = {field.name for field in dataclasses.fields(cls)} - set(more)
        return cls(**{name: value for name, value in arguments.items() if name in names}, **more)

    @property
    def label_keys(self) -> tuple[Key, ...]:
        """The arguments that hold labels."""
        return self.labels if isinstance(self.labels, tuple) else (self.labels,)

    def loss_of(self, task: Tensor, kl: Tensor) -> Tensor:
        """The loss of its two terms."""
        return task + self.alpha * kl if self.alpha else task

    @property
    def ce_weight(self) -> int:
        """What the mean of the passes' losses is multiplied by."""
        return 2 if self.ce == "sum" else 1

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values; a criterion is only named."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        if self.criterion is not None:
            changed["criterion"] = getattr(self.criterion, "__name__", type(self.criterion).__name__)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], criterion: Callable[..., Any] | None = None
    ) -> RDropOptions:
        """The options that `to_dict` wrote."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise LossError(f"R-Drop has no option {name!r}", remedy=nearest(name, names))
        if values.get("criterion") is not None and criterion is None:
            raise LossError(
                f"R-Drop was made with criterion={values['criterion']}, which a file cannot hold",
                remedy="give the criterion again: regraft.rdrop(model, criterion=...)",
            )
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**{**given, "criterion": criterion})

"""One architecture of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RATE = 0.1
"""Every rate in the zoo. Most configurations come with 0, where there is nothing to reach."""

Inputs = dict[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: its name, its library, and how it and its inputs are made."""

    library: str
    name: str
    make: Callable[[], tuple[nn.Module, Inputs]]

    @property
    def id(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model in training mode, and inputs for one forward; the same ones for the same seed."""
        torch.manual_seed(seed)
        model, inputs = self.make()
        return model.train(), inputs


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """One forward."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dict__") and not isinstance(output, (list, tuple)):
        output = list(vars(output).values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors(item)]
    return []

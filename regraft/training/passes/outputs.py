"""A model's outputs of several passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regraft.training.passes.nested import mapped


def pass_of(outputs: Any, number: int) -> Any:
    """What one of the passes gave."""
    return mapped(lambda _, leaf: leaf[number] if isinstance(leaf, Tensor) else leaf, "", outputs)

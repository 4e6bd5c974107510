"""Call sites: functional and fused dropout, recorded with the module inside whose forward it ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.find.frames import caller_line
from regraft.find.kinds import op_of

_OPS: dict[Callable[..., Any], tuple[str, str]] = {
    F.dropout: ("dropout", "p"),
    torch.dropout: ("dropout", "p"),
    torch.dropout_: ("dropout", "p"),
    F.dropout1d: ("dropout1d", "p"),
    F.dropout2d: ("dropout2d", "p"),
    F.dropout3d: ("dropout3d", "p"),
    F.alpha_dropout: ("alpha_dropout", "p"),
    torch.alpha_dropout: ("alpha_dropout", "p"),
    F.feature_alpha_dropout: ("feature_alpha_dropout", "p"),
    torch.feature_alpha_dropout: ("feature_alpha_dropout", "p"),
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", "dropout_p"),
}
"""Function -> operation, and the name of its rate."""
_POSITIONS = {F.scaled_dot_product_attention: 4}
_TRAINING = {"p": 0.5, "dropout_p": 0.0}


@dataclass
class Called:
    """A functional dropout that ran inside a module's forward."""

    owner: nn.Module
    op: str
    p: float
    source: str
    calls: int = 0


class CallRecorder(TorchFunctionMode):
    """Records functional dropouts; `owners` is the stack of modules that are running."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[nn.Module] = []
        self._called: dict[tuple[int, str, str], Called] = {}

    def called(self) -> list[Called]:
        return list(self._called.values())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPS and self.owners:
            self._record(func, args, kwargs)
        if func is torch.rand and _draws_a_scalar(args):
            # LayerDrop: a scalar decides whether a layer runs. 1.0 keeps every layer.
            return torch.tensor(1.0)
        return func(*args, **kwargs)

    def _record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner = self.owners[-1]
        op, _ = _OPS[func]
        if op_of(owner) is not None:
            return  # a module site: it is counted as the module
        rate = call_rate(func, args, kwargs)
        if rate is None:
            return
        source = caller_line()
        key = (id(owner), op, source)
        called = self._called.setdefault(key, Called(owner, op, rate, source))
        called.calls += 1


def call_rate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The rate at which a call drops; None if it is one in eval."""
    _, name = _OPS[func]
    position = _POSITIONS.get(func, 1)
    default = _TRAINING[name]
    rate = kwargs.get(name, args[position] if len(args) > position else default)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    if name == "p" and not training:
        return None
    return float(rate)


def _draws_a_scalar(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and (args[0] == [] or args[0] == () or args[0] == 1 or args[0] == [1])



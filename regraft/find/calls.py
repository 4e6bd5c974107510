"""Call sites: functional and fused dropout, recorded with the module inside whose forward it ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from regraft.find.frames import caller_line, calling_frames, line_of
from regraft.find.functions import ATTENTION, FUNCTIONS, Parsed
from regraft.find.graphs import running_node
from regraft.find.kinds import FAMILIES, op_of


@dataclass
class Called:
    """The calls of one operation inside one module's own forward."""

    owner: nn.Module
    op: str
    rates: list[float] = field(default_factory=list)
    """The rate of each call, 0 for one that says it is not training."""
    sources: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    """Methods of the owner that were running."""
    score_bytes: int = 0
    """Of attention: the size of the largest score matrix of one call."""
    node: str = ""
    """Of a call in a graph: the name of the node that ran."""

    @property
    def p(self) -> float:
        """The rate of the calls; the first that is not 0 where they differ."""
        return next((rate for rate in self.rates if rate > 0), 0.0)


class CallRecorder(TorchFunctionMode):
    """Records functional dropouts; `owners` is the stack of modules that are running.

    With `modules_too` also those of dropouts that are modules of their own, which count as the module.
    """

    def __init__(self, *, modules_too: bool = False) -> None:
        super().__init__()
        self.modules_too = modules_too
        self.owners: list[nn.Module] = []
        self.layer_drops: list[str] = []
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
        if func in FUNCTIONS and self.owners:
            self._record(FUNCTIONS[func](*args, **kwargs))
        if func is torch.rand and _draws_a_scalar(args):
            # LayerDrop: a scalar decides whether a layer runs. 1.0 keeps every layer.
            self.layer_drops.append(caller_line())
            return torch.tensor(1.0)
        return func(*args, **kwargs)

    def _record(self, parsed: Parsed) -> None:
        owner = self.owners[-1]
        if not self.modules_too and op_of(owner) in FAMILIES and parsed.op != ATTENTION:
            return  # a module site: it is counted as the module
        frames = calling_frames()
        owner, node = running_node(self.owners, frames)
        key = (id(owner), node, parsed.op)
        called = self._called.setdefault(key, Called(owner, parsed.op, node=node))
        called.rates.append(parsed.p if parsed.training or parsed.p == 0 else 0.0)  # as it came: marked
        called.sources.append(line_of(frames))
        called.methods |= _methods(owner, frames)
        called.score_bytes = max(called.score_bytes, parsed.score_bytes)


def _methods(owner: nn.Module, frames: list[FrameType]) -> set[str]:
    """Names of the owner's methods among the frames: each of them may be an entrance of its own."""
    found = set()
    for frame in frames:
        name = frame.f_code.co_name
        if frame.f_locals.get("self") is owner and callable(getattr(type(owner), name, None)):
            found.add(name)
    return found - {"__call__", "_call_impl", "_wrapped_call_impl"}


def _draws_a_scalar(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and args[0] in ([], (), 1, [1], (1,))

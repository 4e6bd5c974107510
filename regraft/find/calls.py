"""Call sites: functional and fused dropout, recorded with the module inside whose forward it ran."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from regraft.find.frames import caller_line, calling_frames, line_of
from regraft.find.functions import ATTENTION, DRAWS, DROP_PATH, FUNCTIONS, Parsed, draws_rows
from regraft.find.graph_calls import running_node
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

    A module that the forward itself makes (`nn.Dropout(0.1)(x)`) is no site, for it is not there yet: what
    it calls is a call of the innermost module of the model.

    Args:
        known: the modules of the model, by id.
        modules_too: also record those of dropouts that are modules of their own, which count as the module.
    """

    def __init__(self, known: Container[int], *, modules_too: bool = False) -> None:
        super().__init__()
        self.known = known
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
        if func in DRAWS and self.owners and draws_rows(func, args, kwargs):
            self._record_rows()
        if func is torch.rand and _draws_a_scalar(args):
            # LayerDrop: a scalar decides whether a layer runs. 1.0 keeps every layer.
            self.layer_drops.append(caller_line())
            return torch.tensor(1.0)
        return func(*args, **kwargs)

    def _record_rows(self) -> None:
        """A DropPath that is no module: the draw of its mask, in a forward or a function that it calls."""
        owners = self._known_owners()
        if not owners:
            return
        owner, frames = owners[-1], calling_frames()
        rate = _rate_of_rows(self.owners[-1], frames)
        if rate is None or op_of(owner) in FAMILIES or isinstance(owner, fx.GraphModule):
            return
        called = self._called.setdefault((id(owner), "", DROP_PATH), Called(owner, DROP_PATH))
        called.rates.append(rate)
        called.sources.append(line_of(frames))
        called.methods |= _methods(owner, frames)

    def _known_owners(self) -> list[nn.Module]:
        return [owner for owner in self.owners if id(owner) in self.known]

    def _record(self, parsed: Parsed) -> None:
        owners = self._known_owners()
        if not owners:
            return
        owner = owners[-1]
        if not self.modules_too and op_of(owner) in FAMILIES and parsed.op != ATTENTION:
            return  # a module site: it is counted as the module
        frames = calling_frames()
        owner, node = running_node(owners, frames)
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


def _rate_of_rows(owner: nn.Module, frames: list[FrameType]) -> float | None:
    """The rate at which rows are dropped; None where nothing says that they are."""
    for frame in frames:
        if _DROP_PATH_FUNCTION.search(frame.f_code.co_name):
            given = [frame.f_locals.get(name) for name in ("drop_prob", "p", "drop_rate", "rate")]
            return next((float(one) for one in given if isinstance(one, (int, float))), 0.0)
    named = [value for name, value in vars(owner).items() if "drop" in name and isinstance(value, float)]
    return next((value for value in named if value > 0), None)


_DROP_PATH_FUNCTION = re.compile(r"drop_?path|stochastic_?depth", re.IGNORECASE)


def _draws_a_scalar(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and args[0] in ([], (), 1, [1], (1,))

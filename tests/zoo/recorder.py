"""Which stock dropouts a forward really runs, seen from outside: no code of regraft is used here.

Two modes look at one forward. The function mode sees each call of a public dropout function by its name,
with its rate; what such a function calls inside is not seen again, so `nn.Dropout`, `F.dropout` and
`torch.dropout` are one call, and the attention inside `F.multi_head_attention_forward` is one with it. The
dispatch mode sees every draw of random numbers, whoever asked for it; a draw outside the named calls is told
apart by the Python frames above it: a DropPath, a dropout written by hand, or other randomness.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .entry import Inputs, forward
from .named import DROPOUTS, named_call, size_of

PLAIN = frozenset(
    {"dropout", "scaled_dot_product_attention", "multi_head_attention_forward", "rnn", "private dropout"}
)
"""What the selector "Dropout" means, however it is written."""
DROP_PATH = frozenset({"drop_path", "inline drop_path"})

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HERE = frozenset(
    {os.path.abspath(__file__), os.path.abspath(forward.__code__.co_filename)}
)  # not the zoo's models
_RANDOM = re.compile(
    r"aten::(bernoulli|rand|normal|uniform|native_dropout|exponential|geometric|multinomial|log_normal|cauchy)"
)
_DROP_PATH_NAME = re.compile(r"drop_?path|stochastic_?depth|drop_?connect", re.IGNORECASE)
_BLOCK_NAME = re.compile(r"drop_?block", re.IGNORECASE)
_TOKEN_NAME = re.compile(r"(patch|token)_?dropout", re.IGNORECASE)
_DROPOUT_NAME = re.compile(r"dropout", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One regularizer that ran.

    Attributes:
        kind: what ran: "dropout", "dropout2d", "scaled_dot_product_attention", "drop_path", ...
        path: the innermost module that runs it, or None where no module of the model is above it.
        type: the class of that module.
        source: the file and line of the call, outside torch.
        p: its rate, where it can be seen.
        walked: ran inside the forward of an `nn.Dropout` (or `Dropout2d`, ...), which a walk over the
            modules finds and swaps.
    """

    kind: str
    path: str | None
    type: str
    source: str
    p: float | None
    walked: bool = False


@dataclass
class Recording:
    """What one forward did: its stock regularizers, other draws, and draws made by the code under test."""

    calls: list[Call]
    other: list[Call]
    own_draws: int
    output: Any

    @property
    def plain(self) -> list[Call]:
        return [call for call in self.calls if call.kind in PLAIN]

    @property
    def drop_path(self) -> list[Call]:
        return [call for call in self.calls if call.kind in DROP_PATH]


def record(model: nn.Module, inputs: Inputs, own: tuple[str, ...] = ()) -> Recording:
    """Run one forward of `model` and record it.

    Args:
        model: in training mode, or whatever mode is asked about.
        inputs: its arguments.
        own: folders of code whose draws are no stock regularizers: the library under test.
    """
    watch = _Watch(model, own)
    with _Functions(watch), _Draws(watch):
        output = forward(model, inputs)
    return Recording(watch.calls, watch.other, watch.own_draws, output)


class _Watch:
    """What both modes write down."""

    def __init__(self, model: nn.Module, own: tuple[str, ...]) -> None:
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.own = own
        self.calls: list[Call] = []
        self.other: list[Call] = []
        self.own_draws = 0
        self.inside = 0  # in how many named calls we are
        self._last: FrameType | None = None

    def named(self, kind: str, p: float) -> None:
        self.calls.append(self._call(kind, p, sys._getframe(2)))

    def drawn(self, shape: tuple[int, ...]) -> None:
        """A draw: the tested code's, part of a named call, or one whose frames say what it is."""
        start = sys._getframe(2)
        nearest = next((f for f in _frames(start) if not f.f_code.co_filename.startswith(_TORCH)), start)
        if nearest.f_code.co_filename.startswith(self.own):
            self.own_draws += 1
            return
        if self.inside:
            return
        kind, frame = self._kind(start, shape)
        if kind is None:
            self.other.append(self._call("other", None, start))
        elif frame is not self._last:  # one that draws twice in one run is one
            self._last = frame
            self.calls.append(self._call(kind, _rate(frame), start))

    def _kind(self, start: FrameType, shape: tuple[int, ...]) -> tuple[str | None, FrameType]:
        for frame in _frames(start):
            name = _function_name(frame)
            if _DROP_PATH_NAME.search(name):
                return "drop_path", frame
            if _BLOCK_NAME.search(name):
                return "block dropout", frame
            if _DROPOUT_NAME.search(name):
                return "token dropout" if _TOKEN_NAME.search(name) else "private dropout", frame
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                inline = _is_row_mask(shape) and _has_drop_rate(module)
                return ("inline drop_path" if inline else None), frame
        return None, start

    def _call(self, kind: str, p: float | None, start: FrameType) -> Call:
        owner, source, walked = None, "", False
        for frame in _frames(start):
            module = frame.f_locals.get("self")
            if owner is None and isinstance(module, nn.Module) and id(module) in self.paths:
                owner = module
                # Only its own forward: a subclass with another forward is no nn.Dropout to a walk.
                walked = isinstance(module, _DropoutNd) and kind in DROPOUTS.values()
            if not source and not frame.f_code.co_filename.startswith(_TORCH):
                source = f"{'/'.join(frame.f_code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno}"
            if owner is not None and source:
                break
        path = None if owner is None else self.paths[id(owner)]
        return Call(kind, path, type(owner).__name__ if owner is not None else "", source, p, walked)


class _Functions(TorchFunctionMode):
    """Sees calls of public functions by name."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        seen = named_call(func, args, kwargs)
        if func is torch.rand and size_of(args, kwargs) == ():
            # LayerDrop: a layer left out would leave out its dropouts.
            return func(*args, **kwargs).fill_(1.0)
        if seen is None:
            return func(*args, **kwargs)
        kind, p = seen
        if p > 0:
            self.watch.named(kind, p)
        self.watch.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.watch.inside -= 1


class _Draws(TorchDispatchMode):
    """Sees every draw of random numbers."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _RANDOM.match(func._schema.name):
            one = result[0] if isinstance(result, tuple) else result
            self.watch.drawn(tuple(one.shape))
        return result


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if frame.f_code.co_filename not in _HERE:
            yield frame
        frame = frame.f_back


def _function_name(frame: FrameType) -> str:
    """The function's name with that of its class, also before Python 3.11 has it."""
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return name if "." in name or first is None else f"{type(first).__name__}.{name}"


def _is_row_mask(shape: tuple[int, ...]) -> bool:
    """One number for each row: a DropPath written out."""
    return len(shape) > 1 and shape[0] > 1 and all(size == 1 for size in shape[1:])


def _has_drop_rate(module: nn.Module) -> bool:
    return any("drop" in name and isinstance(value, float) for name, value in vars(module).items())


def _rate(frame: FrameType) -> float | None:
    for name in ("drop_prob", "p", "dropout", "drop"):
        value = frame.f_locals.get(name, getattr(frame.f_locals.get("self"), name, None))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None

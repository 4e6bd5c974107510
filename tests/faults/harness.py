"""Faults at every line: what an interrupted operation leaves of a model.

A tracer runs an operation once and lists the lines of regraft that it executes; then once more for each of
them, with a fault there. The model must come out as it went in, to the identity of each object.
"""

from __future__ import annotations

import linecache
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from snapshots import differences, snapshot
from torch import nn

import regraft

PACKAGE = str(Path(regraft.__file__).parent)
Line = tuple[str, int]


@dataclass
class Tracer:
    """Lists the lines of regraft that run; at `target`, the first time, `fault` is called."""

    target: Line | None = None
    fault: object = None
    lines: list[Line] = field(default_factory=list)
    _seen: set[Line] = field(default_factory=set)

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return self._line

    def _line(self, frame, event, _):
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            if line not in self._seen:
                self._seen.add(line)
                self.lines.append(line)
                if line == self.target:
                    sys.settrace(None)
                    self.fault()
        return self._line

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def interrupt():
    """A Ctrl-C: Python delivers it at this very line."""
    signal.raise_signal(signal.SIGINT)


def out_of_memory():
    raise MemoryError("injected")


def too_deep():
    raise RecursionError("injected")


FAULTS = {"KeyboardInterrupt": interrupt, "MemoryError": out_of_memory, "RecursionError": too_deep}


_NEVER_FAIL = ("try:", "return self", "return", "pass", "raise")
"""Statements at which Python allocates nothing and calls nothing: only a Ctrl-C can come there."""


def can_fail(line: Line) -> bool:
    return linecache.getline(*line).strip() not in _NEVER_FAIL


def lines_of(operation, build) -> list[Line]:
    """The lines of regraft that the operation runs on a model that `build` makes."""
    operation(build())  # what is imported and cached the first time is no part of it
    model = build()
    with Tracer() as tracer:
        operation(model)
    return tracer.lines


def surroundings() -> dict[str, object]:
    """What a model shares with the rest of the program."""
    return {
        "numpy generator": str(np.random.get_state()[1].tolist()),
        "python generator": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "function mode": torch.overrides._get_current_function_mode(),
        "hooks of all modules": len(nn.modules.module._global_forward_pre_hooks),
        "SIGINT": signal.getsignal(signal.SIGINT),
    }


def broken_by(operation, build, line: Line, fault=interrupt) -> list[str]:
    """What is different after a fault at `line`, and what of the model no longer works."""
    if fault is not interrupt and not can_fail(line):
        return []
    torch.manual_seed(0)
    model = build()
    before, around = snapshot(model), surroundings()
    try:
        with Tracer(line, fault):
            operation(model)
    except BaseException:
        broken = differences(before, snapshot(model))
    else:
        broken = []  # the fault was taken as one of those that the operation is made to meet
    now = surroundings()
    broken += [name for name in now if now[name] != around[name]]
    try:
        repr(model)
        regraft.revert(model)
    except BaseException as error:
        broken.append(f"afterwards {type(error).__name__}: {error}")
    return broken

"""Watch one forward: which modules run, from which line, and which functional dropouts they call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from regraft.find.calls import Called, CallRecorder
from regraft.find.frames import caller_line
from regraft.find.probe.products import ProductRecorder, RecordProducts
from regraft.find.tensor_io import Flow, flow


@dataclass
class Watched:
    """What one forward did; modules by id."""

    counts: dict[int, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)
    layer_drops: list[str] = field(default_factory=list)
    flows: dict[int, tuple[Flow | None, Flow | None]] = field(default_factory=dict)


def watch(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: set[int],
    *,
    known: Container[int],
    modules_too: bool = False,
    recorders: Sequence[ProductRecorder] = (),
) -> Watched:
    """Run `forward` and record it; of `known` modules `sites` are those whose calling lines are wanted.

    The hooks are torch's global ones: hooks on the modules themselves would turn its fused paths off, and
    the user's model is not to be touched.
    """
    seen = Watched()
    recorder = CallRecorder(known, modules_too=modules_too)
    thread = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        recorder.owners.append(module)
        seen.counts[id(module)] = seen.counts.get(id(module), 0) + 1
        if id(module) in sites and id(module) not in seen.lines:
            seen.lines[id(module)] = caller_line()

    def leave(module: nn.Module, given: Any, returned: Any) -> None:
        if threading.get_ident() == thread and recorder.owners and recorder.owners[-1] is module:
            recorder.owners.pop()
            seen.flows.setdefault(id(module), (flow(given), flow(returned)))

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        for products in recorders:
            stack.enter_context(
                RecordProducts(products, lambda: recorder.owners[-1] if recorder.owners else None)
            )
        forward(*args, **kwargs)
    seen.called = recorder.called()
    seen.layer_drops = recorder.layer_drops
    return seen

"""The probe: one forward on fake tensors that records which sites run, how often and from which line."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_map

from regraft.find.calls import CallRecorder, Called
from regraft.find.frames import caller_line
from regraft.find.inputs import Inputs
from regraft.find.unchanged import buffers_kept, random_state_kept, unchanged
from regraft.find.walk import Named


@dataclass
class Probe:
    """What one training forward did.

    Attributes:
        how: "fake tensors", "real forward", or None if no forward ran.
        reason: why it did not run, or not on fake tensors.
        seconds: how long it took.
        counts: forwards of each module, by id.
        lines: the line that first called each module, by id.
        called: the functional dropouts that ran, innermost owner and operation.
    """

    how: str | None = None
    reason: str | None = None
    seconds: float | None = None
    counts: dict[int, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)

    @property
    def ran(self) -> bool:
        return self.how is not None

    def to_dict(self) -> dict[str, Any]:
        return {"ran": self.ran, "how": self.how, "reason": self.reason, "seconds": self.seconds}


def run_probe(model: nn.Module, modules: list[Named], inputs: Inputs, sites: set[int]) -> Probe:
    """One training forward of `model`, which is left as it was; `sites` are the modules to trace lines of."""
    began = time.perf_counter()
    try:
        probe = _on_fake_tensors(model, modules, inputs, sites)
        probe.how = "fake tensors"
    except Exception as error:
        reason = f"the forward cannot run on fake tensors: {_one_line(error)}"
        probe = _for_real(model, modules, inputs, sites, reason)
    probe.seconds = round(time.perf_counter() - began, 3)
    return probe


def _for_real(
    model: nn.Module, modules: list[Named], inputs: Inputs, sites: set[int], reason: str
) -> Probe:
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        return Probe(reason=reason)
    try:
        placed = tree_map(lambda leaf: _moved(leaf, devices), (inputs.args, inputs.kwargs))
        every = [named.module for named in modules]
        with buffers_kept(every), _training(every), random_state_kept():
            probe = _watch(model, placed, sites)
    except Exception as error:
        return Probe(reason=f"{reason}; nor does a real one run: {_one_line(error)}")
    probe.how, probe.reason = "real forward", reason
    return probe


def _moved(leaf: Any, devices: set[torch.device]) -> Any:
    return leaf.to(next(iter(devices))) if isinstance(leaf, Tensor) and devices else leaf


def _on_fake_tensors(
    model: nn.Module, modules: list[Named], inputs: Inputs, sites: set[int]
) -> Probe:
    every = [named.module for named in modules]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), _training(every), random_state_kept():
        warnings.simplefilter("ignore")
        fake_state, device = _faked_state(model, mode)
        placed = tree_map(lambda leaf: _faked(leaf, mode, device), (inputs.args, inputs.kwargs))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, fake_state, args, kwargs)

        with mode:
            return _watch(forward, placed, sites)


def _faked_state(model: nn.Module, mode: FakeTensorMode) -> tuple[dict[str, Tensor], torch.device]:
    # A tied weight must stay one tensor, so fakes are made by identity.
    fakes: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    device = torch.device("cpu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _faked(tensor, mode, None)
        state[name] = fakes[id(tensor)]
        device = state[name].device
    return state, device


def _faked(leaf: Any, mode: FakeTensorMode, device: torch.device | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    place = device or (torch.device("cpu") if leaf.is_meta else leaf.device)
    if device is None and not leaf.is_meta:
        return mode.from_tensor(leaf, static_shapes=True)
    if leaf.is_meta or leaf.numel() == 0:
        with mode:
            return torch.empty_like(leaf, device=place)
    # Values are kept for the user's inputs (token ids may decide a branch), only the place is changed.
    with mode:
        return mode.from_tensor(leaf, static_shapes=True).to(place)


@contextmanager
def _training(modules: list[nn.Module]) -> Iterator[None]:
    """All modules in training mode, LayerDrop at 0 so that no layer is missed, and all as before after it."""
    with unchanged(modules):
        for module in modules:
            module.__dict__["training"] = True
            for name in ("layerdrop", "layer_drop"):
                if isinstance(module.__dict__.get(name), float):
                    module.__dict__[name] = 0.0
        yield


def _watch(forward: Any, placed: tuple[Any, Any], sites: set[int]) -> Probe:
    probe = Probe()
    recorder = CallRecorder()
    thread = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        recorder.owners.append(module)
        probe.counts[id(module)] = probe.counts.get(id(module), 0) + 1
        if id(module) in sites and id(module) not in probe.lines:
            probe.lines[id(module)] = caller_line()

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if threading.get_ident() == thread and recorder.owners and recorder.owners[-1] is module:
            recorder.owners.pop()

    with ExitStack() as stack:
        for handle in (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        args, kwargs = placed
        forward(*args, **kwargs)
    probe.called = recorder.called()
    return probe


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

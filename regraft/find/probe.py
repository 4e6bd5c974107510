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

from regraft.find.calls import Called, CallRecorder
from regraft.find.frames import caller_line
from regraft.find.inputs import Inputs
from regraft.find.kinds import op_of
from regraft.find.original import stand_aside
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
        twins: the modules whose rate a call used, by the id of the call's owner and its operation.
    """

    how: str | None = None
    reason: str | None = None
    seconds: float | None = None
    counts: dict[int, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)
    twins: dict[tuple[int, str], list[nn.Module]] = field(default_factory=dict)

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


def _for_real(model: nn.Module, modules: list[Named], inputs: Inputs, sites: set[int], reason: str) -> Probe:
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        return Probe(reason=reason)
    try:
        placed = tree_map(lambda leaf: _moved(leaf, devices), (inputs.args, inputs.kwargs))
        every = [named.module for named in modules]
        with buffers_kept(every), _training(every) as marks, random_state_kept():
            probe = _watch(model, placed, sites)
            _name_twins(probe, marks)
    except Exception as error:
        return Probe(reason=f"{reason}; nor does a real one run: {_one_line(error)}")
    probe.how, probe.reason = "real forward", reason
    return probe


def _moved(leaf: Any, devices: set[torch.device]) -> Any:
    return leaf.to(next(iter(devices))) if isinstance(leaf, Tensor) and devices else leaf


def _on_fake_tensors(model: nn.Module, modules: list[Named], inputs: Inputs, sites: set[int]) -> Probe:
    every = [named.module for named in modules]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), _training(every) as marks, random_state_kept():
        warnings.simplefilter("ignore")
        fake_state, device = _faked_state(model, mode)
        placed = tree_map(lambda leaf: _faked(leaf, mode, device), (inputs.args, inputs.kwargs))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, fake_state, args, kwargs)

        with mode:
            probe = _watch(forward, placed, sites)
        _name_twins(probe, marks)
        return probe


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
def _training(modules: list[nn.Module]) -> Iterator[dict[float, tuple[nn.Module, float]]]:
    """All modules in training mode, LayerDrop at 0 so that no layer is missed, and all as before after it.

    Each dropout's rate is moved by less than any model can notice, so that a call that uses it tells
    which module it got it from; yields the modules by those rates.
    """
    marks: dict[float, tuple[nn.Module, float]] = {}
    with unchanged(modules), _originals(modules):
        for module in modules:
            attributes = module.__dict__
            attributes["training"] = True
            for name in ("layerdrop", "layer_drop"):
                if isinstance(attributes.get(name), float):
                    attributes[name] = 0.0
            rate = attributes.get("p")
            if isinstance(rate, float) and 0 < rate < 1 and op_of(module) is not None:
                attributes["p"] = rate * (1 - 1e-12 * (len(marks) + 1))
                marks[attributes["p"]] = (module, rate)
        yield marks


@contextmanager
def _originals(modules: list[nn.Module]) -> Iterator[None]:
    """Grafts stand aside: a rule is read against the original."""
    grafted = [(module, cls) for module in modules if (cls := stand_aside(module)) is not None]
    try:
        yield
    finally:
        for module, cls in grafted:
            module.__class__ = cls


def _name_twins(probe: Probe, marks: dict[float, tuple[nn.Module, float]]) -> None:
    """Find the modules whose rates were used by calls, and give the calls the true rates again."""
    for called in probe.called:
        used = {id(module): module for module, _ in (marks[rate] for rate in called.rates if rate in marks)}
        probe.twins[id(called.owner), called.op] = list(used.values())
        called.rates = [marks[rate][1] if rate in marks else rate for rate in called.rates]


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

"""The probe: one forward in training, one in eval, on fake tensors, to learn which sites really run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from regraft.errors import InputsError
from regraft.find.calls import Called
from regraft.find.probe.example_inputs import Inputs
from regraft.find.probe.memoized import forgotten
from regraft.find.probe.modes import MarkedRate, marked, set_training
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept, silent
from regraft.find.probe.products import ProductRecorder
from regraft.find.probe.trace_forward import watch
from regraft.find.tensor_io import Flow


@dataclass
class Probe:
    """What one training forward did, and which draws one in eval made.

    Attributes:
        how: "fake tensors", "real forward", or None if no forward ran.
        reason: why it did not run, or not on fake tensors.
        seconds: how long it took.
        counts: forwards of each module in training, by id.
        lines: the line that first called each module, by id.
        called: the functional dropouts that ran in training, by innermost owner and operation.
        twins: the modules whose rate a call used, by the id of the call's owner and its operation.
        eval_called: the functional dropouts that drew in eval.
        flows: the first tensor that went into and came out of each module, by id; None where not known.
        layer_drops: lines that drew a scalar to decide whether a layer runs.
    """

    how: str | None = None
    reason: str | None = None
    seconds: float | None = None
    counts: dict[int, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)
    twins: dict[tuple[int, str], list[nn.Module]] = field(default_factory=dict)
    eval_called: list[Called] = field(default_factory=list)
    layer_drops: list[str] = field(default_factory=list)
    flows: dict[int, tuple[Flow | None, Flow | None]] = field(default_factory=dict)
    covered: set[int] | None = None
    """Where only parts of the model could be run: the modules inside those, by id."""

    def covers(self, module: nn.Module) -> bool:
        """Would a run of `module` have been seen?"""
        return self.ran and (self.covered is None or id(module) in self.covered)

    @property
    def ran(self) -> bool:
        return self.how is not None

    def add(self, part: Probe) -> None:
        """Take over what a probe of a part of the model has seen."""
        self.counts |= part.counts
        self.lines |= part.lines
        self.called += part.called
        self.twins |= part.twins
        self.eval_called += part.eval_called
        self.layer_drops += part.layer_drops
        self.flows |= part.flows
        self.seconds = round((self.seconds or 0) + (part.seconds or 0), 3)

    def to_dict(self) -> dict[str, Any]:
        return {"ran": self.ran, "how": self.how, "reason": self.reason, "seconds": self.seconds}


Forward = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def run_probe(
    model: nn.Module,
    every: list[nn.Module],
    candidates: Iterable[Inputs],
    sites: set[int],
    recorders: Sequence[ProductRecorder] = (),
) -> Probe:
    """Look at a training and an eval forward of `model`, which is left as it was.

    `every` are its modules, `sites` those whose calling lines are wanted. Of the candidates the first that
    runs is taken. Where fake tensors do not carry the forward (it branches on data), it is run for real.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        # A lazy module makes its weights in its first forward, which is not the probe's to run.
        return Probe(reason="a module of it is lazy, and has no weights before its first forward")
    began = time.perf_counter()
    probe = _first_that_runs(model, every, candidates, sites, recorders)
    probe.seconds = None if probe.reason == _UNKNOWN else round(time.perf_counter() - began, 3)
    return probe


_UNKNOWN = "regraft does not know this model's inputs; give inputs="


def _first_that_runs(
    model: nn.Module,
    every: list[nn.Module],
    candidates: Iterable[Inputs],
    sites: set[int],
    recorders: Sequence[ProductRecorder],
) -> Probe:
    failed: list[tuple[Inputs, Exception]] = []
    for inputs in candidates:
        try:
            if any(hasattr(module, "reshard") for module in every):
                # Fake tensors would stay behind in the state that FSDP keeps of its shards.
                raise InputsError("its parameters are sharded by FSDP")
            probe = _on_fake_tensors(model, every, inputs, sites, recorders)
        except Exception as error:
            failed.append((inputs, error))
        else:
            probe.how = "fake tensors"
            return probe
    if not failed:
        return Probe(reason=_UNKNOWN)
    # Inputs that failed only for being fake are the ones a real forward may take.
    faked = [one for one in failed if _is_for_being_fake(one[1])]
    probes = []
    for inputs, why in faked[:_MOST_REAL] or failed[:1]:
        reason = f"the forward cannot run on fake tensors: {_one_line(why)}"
        probes.append(_for_real(model, every, inputs, sites, reason, recorders))
        if probes[-1].ran:
            return probes[-1]
    return probes[0]


def _is_for_being_fake(error: Exception) -> bool:
    return isinstance(error, (InputsError, *_FAKE_ERRORS))


_MOST_REAL = 3
"""Real forwards tried: they take time."""
_FAKE_ERRORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


def _on_fake_tensors(
    model: nn.Module,
    every: list[nn.Module],
    inputs: Inputs,
    sites: set[int],
    recorders: Sequence[ProductRecorder],
) -> Probe:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with silent(), forgotten(every), marked(every), random_state_kept():
        state, device = _faked_state(model, mode)
        args, kwargs = tree_map(lambda leaf: _faked(leaf, mode, device), (inputs.args, inputs.kwargs))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, state, args, kwargs)

        for recorder in recorders:
            recorder.start(state)
        with mode:
            return _both(model, every, (forward, args, kwargs), sites, recorders)


def _for_real(
    model: nn.Module,
    every: list[nn.Module],
    inputs: Inputs,
    sites: set[int],
    reason: str,
    recorders: Sequence[ProductRecorder],
) -> Probe:
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        return Probe(reason=reason)
    args, kwargs = tree_map(lambda leaf: _moved(leaf, devices), (inputs.args, inputs.kwargs))
    try:
        with silent(), buffers_kept(every), marked(every), random_state_kept():
            for recorder in recorders:
                recorder.start({**dict(model.named_parameters()), **dict(model.named_buffers())})
            probe = _both(model, every, (model, args, kwargs), sites, recorders)
    except Exception as error:
        return Probe(reason=f"{reason}; nor does a real one run: {_one_line(error)}")
    probe.how, probe.reason = "real forward", reason
    return probe


def _both(
    model: nn.Module,
    every: list[nn.Module],
    forward: Forward,
    sites: set[int],
    recorders: Sequence[ProductRecorder],
) -> Probe:
    known = {id(module) for module in every}
    seen = watch(*forward, sites, known=known, recorders=recorders)
    probe = Probe(
        **{name: getattr(seen, name) for name in ("counts", "lines", "called", "layer_drops", "flows")}
    )
    # With those that the first forward made and kept.
    set_training([*every, *model.modules()], mode=False)
    try:
        in_eval = watch(*forward, set(), known=known, modules_too=True).called
    except Exception:  # only the diagnosis of eval is lost; the training forward stands
        in_eval = []
    probe.eval_called = [called for called in in_eval if called.p > 0]
    _name_twins(probe)
    return probe


def _name_twins(probe: Probe) -> None:
    """Find the modules whose rates were used by calls."""
    for called in probe.called:
        owners = [rate.module for rate in called.rates if isinstance(rate, MarkedRate)]
        probe.twins[id(called.owner), called.op] = list({id(owner): owner for owner in owners}.values())
    for called in [*probe.called, *probe.eval_called]:
        called.rates = [float(rate) for rate in called.rates]


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
    with mode:
        if leaf.is_meta:
            return torch.empty_like(leaf, device=place)
        return mode.from_tensor(leaf, static_shapes=True).to(place)


def _moved(leaf: Any, devices: set[torch.device]) -> Any:
    return leaf.to(next(iter(devices))) if isinstance(leaf, Tensor) and devices else leaf


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

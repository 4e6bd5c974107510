"""The probe: one forward in training, one in eval, on fake tensors, to learn which sites really run."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from regraft.errors import InputsError
from regraft.find.frames import own_line
from regraft.find.probe.copied import NotCopiedError, copied
from regraft.find.probe.example_inputs import Inputs, describe
from regraft.find.probe.fake import fake, fake_state
from regraft.find.probe.ledger import GENERATORS, Draw, Ledger, ObservedFakeMode, Recorder, observe
from regraft.find.probe.preserve_state import (
    MarkedRate,
    buffers_kept,
    forgotten,
    marked,
    preserving,
    random_state_kept,
    seed_generators,
    set_training,
    silent,
)
from regraft.find.probe.products import ProductRecorder
from regraft.find.site import Called
from regraft.libraries import is_fsdp


@dataclass
class Probe(Ledger):
    """The ledger of one training forward, and what one in eval drew.

    Attributes:
        how: "fake tensors", "real forward", or None if no forward ran.
        reason: why it did not run, or not on fake tensors.
        seconds: how long it took.
        twins: the modules whose rate a call used, by the id of the call's owner and its operation.
        eval_called: the functional dropouts that drew in eval.
        eval_draws: every draw of the forward in eval.
        read: modules whose weight an operation read, by id.
    """

    how: str | None = None
    reason: str | None = None
    seconds: float | None = None
    twins: dict[tuple[int, str], list[nn.Module]] = field(default_factory=dict)
    eval_called: list[Called] = field(default_factory=list)
    eval_draws: list[Draw] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
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
        self.draws += part.draws
        self.eval_draws += part.eval_draws
        self.read |= part.read
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
    recorders: Sequence[Recorder] = (),
    *,
    given: bool = False,
) -> Probe:
    """Look at a training and an eval forward of `model`, which is left as it was.

    `every` are its modules, `sites` those whose calling lines are wanted. Of the candidates the first that
    runs is taken. Where fake tensors do not carry the forward (it branches on data), it is run for real.
    `recorders` are told every operation of the training forward.

    Raises:
        InputsError: the inputs are `given` by the user, and the forward does not run on them.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        # A lazy module makes its weights in its first forward, which is not the probe's to run.
        return Probe(reason="a module of it is lazy, and has no weights before its first forward")
    began = time.perf_counter()
    with _probing:
        probe = _first_that_runs(_Look(model, every, sites, recorders, given), candidates)
    probe.seconds = None if probe.reason == UNKNOWN else round(time.perf_counter() - began, 3)
    return probe


_probing = threading.RLock()
"""One probe at a time: they share the generators, the filters of warnings and the caches of model files."""
UNKNOWN = "regraft does not know this model's inputs; give inputs="


@dataclass(frozen=True)
class _Look:
    """What is looked at: the model, its modules, and what is wanted of it."""

    model: nn.Module
    every: list[nn.Module]
    sites: set[int]
    recorders: Sequence[Recorder]
    given: bool


def _first_that_runs(look: _Look, candidates: Iterable[Inputs]) -> Probe:
    failed: list[tuple[Inputs, Exception]] = []
    for inputs in candidates:
        try:
            if any(is_fsdp(module) for module in look.every):
                # Fake tensors would stay behind in the state that FSDP keeps of its shards.
                raise InputsError("its parameters are sharded by FSDP")
            probe = _on_fake_tensors(look, inputs)
        except Exception as error:
            failed.append((inputs, error))
        else:
            probe.how = "fake tensors"
            return probe
    if not failed:
        return Probe(reason=UNKNOWN)
    # Inputs that failed only for being fake are the ones a real forward may take.
    faked = [one for one in failed if _is_for_being_fake(one[1])]
    probes = []
    for inputs, why in faked[:_MOST_REAL] or failed[:1]:
        reason = f"the forward cannot run on fake tensors: {_one_line(why)}"
        probes.append(_for_real(look, inputs, reason))
        if probes[-1].ran:
            return probes[-1]
    return probes[0]


def _is_for_being_fake(error: Exception) -> bool:
    return isinstance(error, (InputsError, *_FAKE_ERRORS))


_FEWEST_FORWARDS, _MOST_FORWARDS = 4, 8
"""Training forwards with other numbers, of a model that goes by numbers whose range is not known."""
_LAST = 1 - 2**-24
"""The greatest number that `torch.rand` gives; the smallest is 0."""
_MOST_REAL = 3
"""Real forwards tried: they take time."""
_FAKE_ERRORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


def _on_fake_tensors(look: _Look, inputs: Inputs) -> Probe:
    mode = ObservedFakeMode(allow_non_fake_inputs=True)
    with preserving(silent(), forgotten(look.every), random_state_kept()):
        state = fake_state(look.model, mode)
        device = next(reversed(state.values())).device if state else torch.device("cpu")
        args, kwargs = tree_map(lambda leaf: fake(leaf, mode, device), (inputs.args, inputs.kwargs))

        def in_place(*args: Any, **kwargs: Any) -> Any:
            return functional_call(look.model, state, args, kwargs)

        with mode:
            return _on_copies(look, (in_place, args, kwargs), state, mode)


def _on_copies(
    look: _Look, forward: Forward, state: dict[str, Tensor], mode: ObservedFakeMode | None = None
) -> Probe:
    """The probe by copies of the modules on the tensors of `state`.

    Where those would reach the modules themselves, the modules are run, by `forward`, and put back.
    """
    run, args, kwargs = forward
    own = dict([*look.model.named_parameters(), *look.model.named_buffers()])
    try:
        copies = copied(look.every, {id(own[name]): tensor for name, tensor in state.items()})
        with marked(copies):
            return _both(look, (copies[0], args, kwargs), state, copies, mode)
    except NotCopiedError:
        with preserving(marked(look.every)):
            return _both(look, (run, args, kwargs), state, look.every, mode)


def _for_real(look: _Look, inputs: Inputs, reason: str) -> Probe:
    model, every = look.model, look.every
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        return Probe(reason=reason)
    args, kwargs = tree_map(lambda leaf: _moved(leaf, devices), (inputs.args, inputs.kwargs))
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    state = {**dict(model.named_parameters()), **buffers}
    try:
        with preserving(silent(), buffers_kept(every), random_state_kept()):
            probe = _on_copies(look, (model, args, kwargs), state)
    except Exception as error:
        if look.given:
            raise InputsError(
                f"the forward does not run on the inputs: {_one_line(error)}",
                where=own_line(traceback.extract_tb(error.__traceback__)) or type(model).__name__,
                remedy=f"tried {describe(inputs)}",
            ) from error
        return Probe(reason=f"{reason}; nor does a real one run: {_one_line(error)}")
    probe.how, probe.reason = "real forward", reason
    return probe


def _both(
    look: _Look,
    forward: Forward,
    state: Mapping[str, Tensor],
    running: list[nn.Module],
    mode: ObservedFakeMode | None = None,
) -> Probe:
    """The probe by `forward`, in training and then in eval; `running` are the modules that it runs."""
    known = {id(module): module for module in look.every}
    seen = _train(look, forward, known, state, mode)
    probe = Probe(**vars(seen), read=_modules_read(look.model, seen.names_read))
    # With those that the first forward made and kept.
    set_training([*running, *running[0].modules()], mode=False)
    try:
        by_hand = any(draw.call is None for draw in seen.draws)
        in_eval = observe(
            *forward, known=known, modules_too=True, operations=by_hand, fake_mode=mode, number=_LAST
        )
    except NotCopiedError:
        raise
    except Exception:  # only the diagnosis of eval is lost; the training forward stands
        return _with_twins(probe)
    probe.eval_called = [called for called in in_eval.called if called.p != 0]
    probe.eval_draws = in_eval.draws
    return _with_twins(probe)


def _train(
    look: _Look,
    forward: Forward,
    known: dict[int, nn.Module],
    state: Mapping[str, Tensor],
    mode: ObservedFakeMode | None,
) -> Ledger:
    """The ledger of the training forward; of several, where it goes by numbers that it draws.

    Such a forward leaves modules out. It runs again with other numbers, and what it does then in modules
    that have not run is taken over. A draw by which modules below its own run or do not is LayerDrop.
    """

    def run(recorders: Sequence[Recorder], seed: int) -> Ledger:
        seed_generators(seed)
        number = 0.0 if seed == 1 else _LAST
        return observe(
            *forward,
            known=known,
            sites=look.sites,
            state=state,
            recorders=recorders,
            fake_mode=mode,
            number=number,
            locate=locate,
        )

    locate = False
    seen = run(look.recorders, 0)
    locate = any(draw.op in GENERATORS for draw in seen.draws)
    if locate:
        seen = run(look.recorders, 0)
    deciding = [draw for draw in seen.draws if draw.may_decide]
    if not deciding:
        return seen
    forced = all(draw.op == "rand" for draw in deciding)  # by both ends of its range
    first, differ = dict(seen.counts), set[int]()
    for seed in range(1, _MOST_FORWARDS):
        own = ProductRecorder(name for name, _ in look.model.named_parameters())
        again = run([own], seed)
        differ |= {key for key in known if first.get(key, 0) != again.counts.get(key, 0)}
        seen.take(again)
        for recorder in look.recorders:
            if isinstance(recorder, ProductRecorder):
                recorder.add(own, "")
        if forced or (seed >= _FEWEST_FORWARDS and all(map(seen.counts.get, differ))):
            break
    below = {id(draw.module): {id(one) for one in draw.module.modules()} for draw in deciding}
    for draw in deciding:
        inside = below[id(draw.module)] - {id(draw.module)}
        inner = [below[key] - {key} for key in inside & below.keys()]
        if differ & inside.difference(*inner):
            draw.kind = "LayerDrop"
    return seen


def _modules_read(model: nn.Module, names: set[str]) -> set[int]:
    """The modules whose weights are those of these names, tied ones included."""
    weights = {id(p) for name, p in model.named_parameters() if name in names}
    return {
        id(module)
        for module in model.modules()
        if "weight" in module._parameters and id(module._parameters["weight"]) in weights
    }


def _with_twins(probe: Probe) -> Probe:
    """The probe with the modules whose rates were used by calls; the marks are taken off."""
    for called in probe.called:
        owners = [rate.module for rate in called.rates if isinstance(rate, MarkedRate)]
        probe.twins[id(called.owner), called.op] = list({id(owner): owner for owner in owners}.values())
    for called in [*probe.called, *probe.eval_called]:
        called.rates = [None if rate is None else float(rate) for rate in called.rates]
    for draw in [*probe.draws, *probe.eval_draws]:
        draw.p = None if draw.p is None else float(draw.p)
    return probe


def _moved(leaf: Any, devices: set[torch.device]) -> Any:
    return leaf.to(next(iter(devices))) if isinstance(leaf, Tensor) and devices else leaf


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

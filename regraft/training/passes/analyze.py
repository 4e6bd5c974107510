"""Which strategies are right for a model as it stands, and what they cost: analyzed once, then kept."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import InputsError
from regraft.find.locks import lock_of
from regraft.find.walk import inner_model
from regraft.record import grafts_of
from regraft.training.passes.draws import LAST, Decided
from regraft.training.passes.fork import Fork, ForkError
from regraft.training.passes.independence import UNDECIDED, why_dependent
from regraft.training.passes.measure import (
    Forward,
    Meter,
    measured,
    on_fake_tensors,
    on_real_tensors,
)
from regraft.training.passes.nested import Call, leaves, tensors_changed, tensors_in
from regraft.training.passes.per_pass_modules import PerPass, held_next, modules_of, nothing_kept
from regraft.training.passes.repeat import Batch, repeated_forward
from regraft.training.passes.sharded import why_not_shared
from regraft.training.passes.vmap import is_compiled, shared_forward

log = logging.getLogger("regraft")
_PROBED = 2
_OVERHEAD = 1.12
"""Under vmap an operation costs about this much of what it costs in a batch as long."""
_SHARED_DRAW = "it draws once for the whole batch (a mask of weights or layers), so passes would share it"
_DECIDES = "it draws a number to decide what runs, which each pass has to decide for itself"
_ELSEWHERE = "it draws from Python's or numpy's generator, which says nothing of passes"
_COMPILING = "a region that is being compiled cannot be analyzed"
_UNASKED = "not asked for yet"
_IN_OTHER_WORDS = {
    "running_mean or running_var": "a BatchNorm in training comes behind the first random operation, and its "
    "running statistics would have to move for each pass",
    "data-dependent control flow": "behind the first random operation it branches on a value",
    ".item()": "behind the first random operation it reads a value",
    "Cannot access data pointer": "behind the first random operation it reads values",
    "dynamic shape": "behind the first random operation a shape depends on values",
}
"""What torch says -> what it means for the passes."""
_NO_VALUES = torch.empty(0)
_READ = (
    *("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "drop_rate", "layerdrop"),
    *("gradient_checkpointing", "grad_checkpointing"),
)
"""Attributes of modules that an analysis depends on."""
_known: WeakKeyDictionary[nn.Module, dict[Any, PassAnalysis]] = WeakKeyDictionary()

Reason = str | InputsError | None
Trial = Callable[..., Any]
"""`trial(forward, call, meter, fork)` gives the outputs of what is measured."""


@dataclass(frozen=True)
class Inputs:
    """What the passes are of.

    Attributes:
        call: the arguments of the forward.
        main: the name of the argument that says how long the batch is.
        unbatched: names of arguments that are not of the batch.
        fork: the path of the module where passes part, or None.
    """

    call: Call
    main: str | None = None
    unbatched: Collection[str] = ()
    fork: str | None = None

    def batch(self) -> Batch:
        """The arguments as a batch."""
        return Batch(self.call, self.main, self.unbatched)


@dataclass
class PassAnalysis:
    """What is known of a model's passes over inputs of one kind.

    Attributes:
        no_sharing: why "shared" cannot be, or None.
        prefix: the part of one pass that all passes have in common under "shared", in [0, 1].
        draws: whether "shared" has to take draws over.
        per_pass: classes of modules that "shared" runs once for each pass, see there.
        decides: whether such a module draws a number to decide something.
        no_batch: why "batch" would not be independent passes.
        dependent: why the rows of the batch may see one another.
        plain: one pass as it is, measured for inputs of so many `elements`; None where it could not be.
        place: on what tensors that was.
        at_once: whether one vmap over the rows of a batch gives each the same noise; None until asked for.
        template: the outputs of one pass, without the values of their tensors.
    """

    no_sharing: str | None = None
    prefix: float = 0.0
    draws: bool = True
    per_pass: PerPass = field(default_factory=dict)
    decides: bool = False
    no_batch: Reason = _UNASKED
    dependent: str | None = _UNASKED
    plain: Meter | None = None
    elements: int = 0
    place: Any = on_fake_tensors
    template: Any = None
    at_once: bool | None = None

    def cost(self, n: int, chunk: int) -> float:
        """Of n shared passes in chunks, in single passes."""
        part = (1 - self.prefix) * _OVERHEAD
        return sum(1 + (min(chunk, n - start) - 1) * part for start in range(0, n, chunk))

    def why_dependent(self, model: nn.Module, forward: Forward, batch: Batch) -> str | None:
        """Why the rows of the batch may see one another, or None where it was shown that they do not."""
        if self.dependent in (_UNASKED, UNDECIDED):
            self.dependent = why_dependent(model, forward, batch)
        return self.dependent

    def why_no_batch(self, model: nn.Module, forward: Forward, inputs: Inputs) -> Reason:
        """Why the repeated batch would not be independent passes, or None where it was shown that it is."""
        if self.no_batch in (_UNASKED, UNDECIDED):
            try:
                batch = inputs.batch()
                self.no_batch = _batch_draws(self, model, inputs) or self.why_dependent(model, forward, batch)
            except InputsError as error:
                self.no_batch = copy.copy(error)  # without the frames that it came through
            if self.no_batch not in (None, UNDECIDED):
                reason = self.no_batch.what if isinstance(self.no_batch, InputsError) else self.no_batch
                log.info("%s: the batch is not repeated: %s", type(model).__name__, reason)
        return self.no_batch


def analysis_of(model: nn.Module, inputs: Inputs) -> PassAnalysis:
    """What is known of `model`'s passes over inputs like these, in the state it is in.

    Raises:
        ForkError: passes cannot part at `inputs.fork`.
    """
    if torch.compiler.is_compiling():
        return _unknown(_COMPILING)
    with lock_of(model):
        known = _known.setdefault(model, {})
        key = _state(model, inputs)
        if key not in known:
            known[key] = _analyzed(model, inputs)
            known[key].elements = _elements(inputs.call)
            if known[key].no_sharing is not None:
                log.info("%s: passes share nothing: %s", type(model).__name__, known[key].no_sharing)
        return known[key]


def work_of(model: nn.Module, call: Call, fork: str | None = None) -> tuple[float, float]:
    """The part of one pass that passes can share, in [0, 1]; and about how many flops a pass has."""
    analysis = analysis_of(model, Inputs(call, main_input(model), fork=fork))
    prefix = 0.0 if analysis.no_sharing is not None else analysis.prefix
    if analysis.plain is None:
        return prefix, math.inf
    # It was measured once, perhaps for a smaller batch.
    return prefix, analysis.plain.cost * _elements(call) / max(1, analysis.elements)


def _elements(call: Call) -> int:
    return sum(tensor.numel() for tensor in tensors_in(call))


def _unknown(reason: str) -> PassAnalysis:
    return PassAnalysis(no_sharing=reason, no_batch=reason, dependent=reason)


def _state(model: nn.Module, inputs: Inputs) -> Any:
    # What an analysis depends on. Where something else changes it stays right, and may be slower.
    def number(value: Any) -> Any:
        return value if isinstance(value, (int, float)) else None

    modules = tuple(
        (
            *(type(module), module.training),
            *(number(module.__dict__.get(name)) for name in _READ),
            *(getattr(graft, "sampling", False) for graft in grafts_of(module).values()),
        )
        for module in model.modules()
    )
    lengths: dict[int, int] = {}  # which first axes are equally long, whatever they are
    kinds = tuple(
        (name, leaf.dim(), lengths.setdefault(leaf.shape[0], len(lengths)) if leaf.dim() else None)
        if isinstance(leaf, Tensor)
        else (name, leaf if isinstance(leaf, (bool, str)) else type(leaf))
        for name, leaf in leaves("", inputs.call)
    )
    options = inputs.main, tuple(sorted(inputs.unbatched)), inputs.fork
    return modules, kinds, options, torch.is_grad_enabled(), _autocasts(model)


def main_input(model: nn.Module) -> str | None:
    """The argument that says how long a Transformers model's batch is: of several, the first."""
    name = getattr(model, "main_input_name", None)
    if isinstance(name, (list, tuple)):
        name = next(iter(name), None)
    return name if isinstance(name, str) else None


def _analyzed(model: nn.Module, inputs: Inputs) -> PassAnalysis:
    inner = inner_model(model)[0]
    analysis = PassAnalysis(no_sharing=_opaque(model, inner))
    for place in (on_fake_tensors, on_real_tensors):
        try:
            plain = _tried(place, inner, inputs, _plain)
            break
        except ForkError:
            raise
        except Exception as error:
            # The forward that was asked for will say so better.
            reason = why(error)
    else:
        return _unknown(reason)
    analysis.place, analysis.plain = place, plain
    drawn, common = (counts.draws + counts.scalars for counts in (plain.own, plain.common))
    if common and not drawn and not plain.elsewhere:
        fork = Fork(inner, str(inputs.fork))
        raise fork.unfit("has no draw behind it: all passes would be equal", "name a module further in front")
    if plain.elsewhere:
        analysis.no_sharing = analysis.no_batch = _ELSEWHERE
    elif analysis.no_sharing is None:
        _try_sharing(analysis, inner, inputs)
        if is_compiled(model) and analysis.no_sharing is None and (analysis.per_pass or analysis.draws):
            analysis.no_sharing = (
                "a compiler cannot follow how its draws, or modules run once for each pass, are taken over"
            )
    return analysis


def _opaque(model: nn.Module, inner: nn.Module) -> str | None:
    if getattr(inner, "_compiled_call_impl", None) is not None:
        return f"{type(inner).__name__} is compiled in place, by compile() and not by torch.compile"
    if inner is not model and not is_compiled(model):
        return f"{type(model).__name__} is a wrapper"
    return why_not_shared(inner)


def _try_sharing(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> None:
    assert analysis.plain is not None
    # Without taking draws over it is faster, and fails on what there is to take over; a kernel that vmap
    # runs pass by pass, as fused attention, is better taken over too, and autocast and decisions need it.
    draws = _autocasts(model) or analysis.plain.own.scalars > 0
    per_pass: PerPass = {}
    while True:
        more = None
        try:
            both = _tried(analysis.place, model, inputs, _sharing(analysis, model, draws, per_pass))
            each = _each(analysis, model, inputs)
            reason = _flaw(both, each)
            if reason is None:
                analysis.no_sharing, analysis.draws, analysis.per_pass = None, draws, per_pass
                analysis.decides = both.decides
                cost = sum(one.cost for one in each) / _PROBED
                suffix = (both.cost - cost) / max(cost, 1) / (_PROBED - 1)
                analysis.prefix = min(max(1 - suffix, 0.0), 1.0)
                return
        except Exception as error:
            reason = why(error)
            more = held_next(error, model, per_pass) if draws else None
        if draws and analysis.no_sharing is None:
            # What is wrong with modules that run once for each pass would say nothing to anyone.
            analysis.no_sharing = reason
        if draws and more is None:
            return
        draws, per_pass = True, more or per_pass


def _plain(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
    args, kwargs = call
    with nullcontext() if fork is None else fork.reached(meter.forked):
        return forward(*args, **kwargs)


def _sharing(analysis: PassAnalysis, model: nn.Module, draws: bool, per_pass: PerPass) -> Trial:
    def trial(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
        modules = modules_of(model, per_pass)
        with nothing_kept(modules):
            outputs = shared_forward(
                forward, _PROBED, call, draws=draws, per_pass=modules, fork=fork, observer=meter
            )
        analysis.template = tensors_changed(lambda _: _NO_VALUES, outputs)
        return outputs

    return trial


def _each(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> list[Meter]:
    """The same passes one after the other, with decisions at the ends of what they can be."""
    assert analysis.plain is not None
    if not analysis.plain.own.scalars:
        return [analysis.plain] * _PROBED

    def trial_at(number: float) -> Trial:
        def trial(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
            with Decided(number, meter):
                return _plain(forward, call, meter, fork)

        return trial

    return [_tried(analysis.place, model, inputs, trial_at(number)) for number in (0.0, LAST)]


def _flaw(both: Meter, each: list[Meter]) -> str | None:
    if both.own.scalars:
        return _DECIDES
    if both.own.draws != sum(one.own.draws for one in each):
        return "an operation draws once for all passes, behind vmap's back"
    if both.reads_replaced:
        return "a tensor is used after a change in place that would tell the passes apart"
    if both.outputs != each[0].outputs:
        return "its outputs are gathered by hooks in modules that run once for each pass"
    return None


def _batch_draws(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> str | None:
    """Why the draws of a repeated batch would not be those of so many passes.

    Raises:
        InputsError: the inputs cannot be repeated, or the outputs cannot be taken apart.
    """
    if analysis.plain is None:
        return None
    if analysis.decides:
        return _SHARED_DRAW

    def trial(forward: Trial, call: Call, _: Meter, __: Fork | None) -> Any:
        return repeated_forward(forward, _PROBED, Batch(call, inputs.main, inputs.unbatched))

    inner = inner_model(model)[0]
    try:
        # The analysis may be of a smaller batch.
        single = _tried(analysis.place, inner, inputs, _plain)
        both = _tried(analysis.place, inner, inputs, trial)
    except InputsError:
        raise
    except Exception as error:
        return why(error)
    # Draws of a single number that decide nothing (LayerDrop at rate 0) may be common: both ends were tried.
    decided = analysis.plain.own.scalars and analysis.no_sharing is not None
    return _SHARED_DRAW if decided or both.own.draws != _PROBED * single.own.draws else None


def _tried(place: Any, model: nn.Module, inputs: Inputs, trial: Trial) -> Meter:
    fork = None if inputs.fork is None else Fork(model, inputs.fork)
    with place(model, *inputs.call) as (forward, args, kwargs):
        return measured(lambda meter: trial(forward, (args, kwargs), meter, fork))


def _autocasts(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return torch.is_autocast_enabled("cpu" if first is None else first.device.type)


def why(error: Exception) -> str:
    """An error in one line; those of torch that models meet under vmap, in the words of passes."""
    lines = str(error).strip().split("\n")
    line = lines[0][:300] if lines[0] else type(error).__name__
    return next((ours for theirs, ours in _IN_OTHER_WORDS.items() if theirs in line), line)

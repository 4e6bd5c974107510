"""Which strategies are right for a model as it stands, and what they cost: analyzed once, then kept."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import InputsError
from regraft.find.probe.preserve_state import same_entries, snapshot
from regraft.find.walk import inner_model, lock_of
from regraft.record import grafts_of
from regraft.training.passes.fork import Fork, ForkError
from regraft.training.passes.intercept import RecomputeError
from regraft.training.passes.measure import Forward, Meter, measured, on_fake_tensors, on_real_tensors
from regraft.training.passes.nested import Call, leaves, tensors_in
from regraft.training.passes.repeat import Batch, repeated_forward
from regraft.training.passes.rows import UNDECIDED, why_dependent
from regraft.training.passes.sharded import why_not_shared
from regraft.training.passes.vmap import LAST, decided, is_compiled, pass_by_pass, shared_forward

log = logging.getLogger("regraft")
_PROBED = 2
_OVERHEAD = 1.12  # under vmap an operation costs about this much of what it costs in a batch as long
_SHARED_DRAW = "it draws once for the whole batch (a mask of weights or layers), so passes would share it"
_ELSEWHERE = "it draws from Python's or numpy's generator, which says nothing of passes"
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
_READ = (
    *("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "drop_rate", "layerdrop"),
    *("gradient_checkpointing", "grad_checkpointing"),
)
"""Attributes of modules that an analysis depends on."""
_known: WeakKeyDictionary[nn.Module, dict[Any, PassAnalysis]] = WeakKeyDictionary()

PerPass = Mapping[type[nn.Module], bool]
"""Classes -> whether their modules run once for each pass even where nothing tells their arguments apart."""
Reason = str | InputsError | None
Trial = Callable[..., Any]  # `trial(forward, call, meter, fork)` gives the outputs of what is measured


@dataclass(frozen=True)
class Inputs:
    """What the passes are of."""

    call: Call
    main: str | None = None  # the argument that says how long the batch is
    unbatched: Collection[str] = ()  # arguments that are not of the batch
    fork: str | None = None  # the path of the module where passes part

    def batch(self) -> Batch:
        """The arguments as a batch."""
        return Batch(self.call, self.main, self.unbatched)


@dataclass
class PassAnalysis:
    """What is known of a model's passes over inputs of one kind."""

    no_sharing: str | None = None  # why "shared" cannot be
    prefix: float = 0.0  # the part of one pass that all have in common under "shared", in [0, 1]
    draws: bool = True  # whether "shared" has to take draws over
    per_pass: PerPass = field(default_factory=dict)  # classes of modules that it runs once for each pass
    decides: bool = False  # whether such a module draws a number to decide something
    template: Any = None  # the outputs of one pass, without the values of their tensors
    no_batch: Reason = _UNASKED  # why "batch" would not be independent passes
    dependent: str | None = _UNASKED  # why the rows of the batch may see one another
    at_once: bool | None = None  # whether one vmap over the rows gives each the same noise
    plain: Meter | None = None  # one pass as it is, of inputs of so many
    elements: int = 0
    place: Any = on_fake_tensors  # on what tensors that was measured

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
    """What is known of `model`'s passes over inputs like these, in the state it is in."""
    if torch.compiler.is_compiling():
        return _unknown("a region that is being compiled cannot be analyzed")
    with lock_of(model):
        known = _known.setdefault(model, {})
        key = _state(model, inputs)
        if key not in known:
            known[key] = _analyzed(model, inputs)
            known[key].elements = sum(map(Tensor.numel, tensors_in(inputs.call)))
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
    elements = sum(map(Tensor.numel, tensors_in(call)))
    return prefix, analysis.plain.cost * elements / max(1, analysis.elements)


def _unknown(reason: str) -> PassAnalysis:
    return PassAnalysis(no_sharing=reason, no_batch=reason, dependent=reason)


def _state(model: nn.Module, inputs: Inputs) -> Any:
    # What an analysis depends on. Where something else changes it stays right, and may be slower.
    modules = tuple(
        (
            *(type(module), module.training),
            *(value for name in _READ if isinstance(value := module.__dict__.get(name), (int, float))),
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
            shared = partial(_shared, modules_of(model, per_pass), draws)
            both = _tried(analysis.place, model, inputs, shared)
            each = [analysis.plain] * _PROBED
            if analysis.plain.own.scalars:  # what they decide is at the ends of what it can be
                ends = [partial(_plain, number=number) for number in (0.0, LAST)]
                each = [_tried(analysis.place, model, inputs, end) for end in ends]
            reason = _flaw(both, each)
            if reason is None:
                analysis.no_sharing, analysis.draws, analysis.per_pass = None, draws, per_pass
                analysis.decides, analysis.template = both.decides, both.outputs
                cost = sum(one.cost for one in each) / _PROBED
                suffix = (both.cost - cost) / max(cost, 1) / (_PROBED - 1)
                analysis.prefix = min(max(1 - suffix, 0.0), 1.0)
                return
        except Exception as error:
            reason = why(error)
            more = _held_next(error, model, per_pass) if draws else None
        if draws and analysis.no_sharing is None:
            # What is wrong with modules that run once for each pass would say nothing to anyone.
            analysis.no_sharing = reason
        if draws and more is None:
            return
        draws, per_pass = True, more or per_pass


def _plain(forward: Trial, call: Call, meter: Meter, fork: Fork | None, number: float | None = None) -> Any:
    """One pass; what it draws to decide something is `number`."""
    args, kwargs = call
    decisions = nullcontext() if number is None else decided(number, meter)
    with decisions, nullcontext() if fork is None else fork.reached(meter.forked):
        return forward(*args, **kwargs)


def _shared(modules: Any, draws: bool, forward: Any, call: Call, meter: Meter, fork: Fork | None) -> Any:
    with _nothing_kept(modules):
        return shared_forward(
            forward, _PROBED, call, draws=draws, per_pass=modules, fork=fork, observer=meter
        )


def modules_of(model: nn.Module, per_pass: PerPass) -> dict[nn.Module, bool]:
    """The modules of `model` that are of these classes, itself left out."""
    every = (module for module in model.modules() if module is not model)
    return {module: per_pass[type(module)] for module in every if type(module) in per_pass}


def _held_next(error: Exception, model: nn.Module, per_pass: PerPass) -> PerPass | None:
    """`per_pass` with the class of the innermost module that `error` came through and that is not in it.

    None where there is none, where the error is of a part that is recomputed in the backward, or where the
    module has a BatchNorm in training: its running statistics are of one forward, not of one for each pass.
    """
    if isinstance(error, RecomputeError):
        return None
    inside = {id(module) for module in model.modules() if module is not model}
    in_a_pass = False
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        in_a_pass |= frame.f_code is pass_by_pass.__code__
        module: Any = frame.f_locals.get("self")
        if id(module) not in inside or (type(module) in per_pass and (in_a_pass or per_pass[type(module)])):
            continue
        # One that is among them, and failed outside a pass, had nothing yet that told its arguments apart.
        held = {type(module): type(module) in per_pass}
        return None if any(map(_moves_statistics, modules_of(model, held))) else {**per_pass, **held}
    return None


def _moves_statistics(module: nn.Module) -> bool:
    return any(one.training and one._buffers.get("running_mean") is not None for one in module.modules())


@contextmanager
def _nothing_kept(modules: Collection[nn.Module]) -> Iterator[None]:
    """Raises if meanwhile an attribute of the modules, or of those inside, was given a tensor."""
    every = {id(one): one for module in modules for one in module.modules()}.values()
    before = [(one, snapshot(one)) for one in every]
    yield
    for module, attributes in before:
        for name, value in module.__dict__.items():
            old, entries = attributes.get(name, (None, None))
            same = value is old and (entries is None or same_entries(value, entries))
            if not same and name != "_buffers" and tensors_in(value):
                kept = f"{type(module).__name__}.{name}"
                raise RuntimeError(f"{kept} keeps a tensor, which would be that of one pass")


def _flaw(both: Meter, each: list[Meter]) -> str | None:
    if both.own.scalars:
        return "it draws a number to decide what runs, which each pass has to decide for itself"
    if both.own.draws != sum(one.own.draws for one in each):
        return "an operation draws once for all passes, behind vmap's back"
    if both.reads_replaced:
        return "a tensor is used after a change in place that would tell the passes apart"
    if len(tensors_in(both.outputs)) != len(tensors_in(each[0].outputs)):
        return "its outputs are gathered by hooks in modules that run once for each pass"
    return None


def _batch_draws(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> str | None:
    """Why the draws of a repeated batch would not be those of so many passes."""
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
    scalars = single.own.scalars and analysis.no_sharing is not None
    return _SHARED_DRAW if scalars or both.own.draws != _PROBED * single.own.draws else None


def _tried(place: Any, model: nn.Module, inputs: Inputs, trial: Trial) -> Meter:
    fork = None if inputs.fork is None else Fork(model, inputs.fork)
    with place(model, inputs.call) as (forward, call):
        return measured(lambda meter: trial(forward, call, meter, fork))


def _autocasts(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return torch.is_autocast_enabled("cpu" if first is None else first.device.type)


def why(error: Exception) -> str:
    """An error in one line; those of torch that models meet under vmap, in the words of passes."""
    lines = str(error).strip().split("\n")
    line = lines[0][:300] if lines[0] else type(error).__name__
    return next((ours for theirs, ours in _IN_OTHER_WORDS.items() if theirs in line), line)

"""Which strategies are right for a model as it stands, and what they cost: analyzed once, then kept."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import InputsError
from regraft.find.walk import inner_model, lock_of
from regraft.record import grafts_of
from regraft.training.passes.caches import Call
from regraft.training.passes.compiled import is_compiled
from regraft.training.passes.fork import Fork, ForkError
from regraft.training.passes.independence import UNDECIDED, why_dependent
from regraft.training.passes.measure import (
    Forward,
    Meter,
    measured,
    on_fake_tensors,
    on_real_tensors,
)
from regraft.training.passes.nested import emptied, leaves
from regraft.training.passes.per_pass_modules import PerPass, held_next, keepsakes, modules_of
from regraft.training.passes.repeat import Batch, repeated_forward
from regraft.training.passes.scalar_draws import LAST, Decided
from regraft.training.passes.sharded import why_not_shared
from regraft.training.passes.vmap import SLOWER, shared_forward

log = logging.getLogger("regraft")
_PROBED = 2
_OVERHEAD = 1.12
"""Under vmap an operation costs about this much of what it costs in a batch as long."""
_SHARED_DRAW = "it draws once for the whole batch (a mask of weights or layers), so passes would share it"
_DECIDES = "it draws a number to decide what runs, which each pass has to decide for itself"
_ELSEWHERE = "it draws from Python's or numpy's generator, which says nothing of passes"
_COMPILING = "a region that is being compiled cannot be analyzed"
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

Trial = Callable[..., Any]


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
        no_batch: why "batch" would not be independent passes; empty until it is asked for.
        plain: one pass as it is, measured for inputs of so many `elements`; None where it could not be.
        place: on what tensors that was.
        template: the outputs of one pass, with slots for their tensors.
    """

    no_sharing: str | None = None
    prefix: float = 0.0
    draws: bool = True
    per_pass: PerPass = field(default_factory=dict)
    decides: bool = False
    no_batch: list[str | InputsError | None] = field(default_factory=list)
    plain: Meter | None = None
    elements: int = 0
    place: Any = on_fake_tensors
    template: Any = None

    def cost(self, n: int, chunk: int) -> float:
        """Of n shared passes in chunks, in single passes."""
        part = (1 - self.prefix) * _OVERHEAD
        return sum(1 + (min(chunk, n - start) - 1) * part for start in range(0, n, chunk))

    def why_no_batch(self, model: nn.Module, forward: Forward, inputs: Inputs) -> str | InputsError | None:
        """Why the repeated batch would not be independent passes, or None where it was shown that it is."""
        if not self.no_batch:
            try:
                batch = inputs.batch()
                reason: str | InputsError | None = _batch_draws(self, model, inputs) or why_dependent(
                    model, forward, batch
                )
            except InputsError as error:
                reason = copy.copy(error)  # without the frames that it came through
            if reason == UNDECIDED:
                return reason
            self.no_batch.append(reason)
            if reason is not None:
                text = reason.what if isinstance(reason, InputsError) else reason
                log.info("%s: the batch is not repeated: %s", type(model).__name__, text)
        return self.no_batch[0]


def analysis_of(model: nn.Module, inputs: Inputs) -> PassAnalysis:
    """What is known of `model`'s passes over inputs like these, in the state it is in.

    Raises:
        ForkError: passes cannot part at `inputs.fork`.
    """
    if torch.compiler.is_compiling():
        return PassAnalysis(no_sharing=_COMPILING, no_batch=[_COMPILING])
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
    return sum(leaf.numel() for _, leaf in leaves("", call) if isinstance(leaf, Tensor))


def _state(model: nn.Module, inputs: Inputs) -> Any:
    # What an analysis depends on. Where something else changes it stays right, and may be slower.
    modules = tuple(
        (
            *(type(module), module.training),
            *(_number(module.__dict__.get(name)) for name in _READ),
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


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None


def main_input(model: nn.Module) -> str | None:
    """The argument that says how long a Transformers model's batch is: of several, the first."""
    name = getattr(model, "main_input_name", None)
    if isinstance(name, (list, tuple)):
        name = next(iter(name), None)
    return name if isinstance(name, str) else None


def _analyzed(model: nn.Module, inputs: Inputs) -> PassAnalysis:
    inner = inner_model(model)[0]
    analysis = PassAnalysis(no_sharing=_opaque(model))
    try:
        analysis.plain = _tried(on_fake_tensors, inner, inputs, _plain)
    except ForkError:
        raise
    except Exception:
        analysis.place = on_real_tensors
        try:
            analysis.plain = _tried(on_real_tensors, inner, inputs, _plain)
        except ForkError:
            raise
        except Exception as error:
            # The forward that was asked for will say so better.
            return PassAnalysis(no_sharing=why(error), no_batch=[why(error)])
    plain = analysis.plain
    drawn, common = plain.draws + plain.scalars, plain.common.draws + plain.common.scalars
    if inputs.fork is not None and drawn and drawn == common and not plain.elsewhere:
        fork = Fork(inner, inputs.fork)
        raise fork.unfit("has no draw behind it: all passes would be equal", "name a module further in front")
    if plain.elsewhere:
        analysis.no_sharing = _ELSEWHERE
        analysis.no_batch.append(_ELSEWHERE)
    elif analysis.no_sharing is None:
        _try_sharing(analysis, inner, inputs)
        if is_compiled(model) and analysis.no_sharing is None:
            analysis.no_sharing = _not_compiled(analysis)
    return analysis


def _opaque(model: nn.Module) -> str | None:
    inner = inner_model(model)[0]
    if getattr(inner, "_compiled_call_impl", None) is not None:
        return f"{type(inner).__name__} is compiled in place, by compile() and not by torch.compile"
    if inner is not model and not is_compiled(model):
        return f"{type(model).__name__} is a wrapper"
    return why_not_shared(inner)


def _not_compiled(analysis: PassAnalysis) -> str | None:
    """Why passes that share a forward cannot be compiled with it."""
    if analysis.per_pass or analysis.draws:
        return "a compiler cannot follow how its draws, or modules run once for each pass, are taken over"
    return None


def _plain(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
    args, kwargs = call
    if fork is None:
        return forward(*args, **kwargs)
    with fork.watched(meter.forked):
        return forward(*args, **kwargs)


def _try_sharing(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> None:
    assert analysis.plain is not None
    # Without taking draws over it is faster, and fails on what there is to take over; a kernel that vmap
    # runs pass by pass, as fused attention, is better taken over too, and autocast and decisions need it.
    draws = _autocasts(model) or analysis.plain.scalars > 0
    per_pass: PerPass = {}
    while True:
        more = None
        try:
            both = _tried(analysis.place, model, inputs, _sharing(analysis, model, draws, per_pass))
            each = _each(analysis, model, inputs)
            reason = _flaw(both, each)
            if reason is None:
                analysis.no_sharing, analysis.draws, analysis.per_pass = None, draws, per_pass
                analysis.prefix, analysis.decides = _prefix(both, each), both.decides
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


def _sharing(analysis: PassAnalysis, model: nn.Module, draws: bool, per_pass: PerPass) -> Trial:
    def trial(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
        modules = modules_of(model, per_pass)
        kept = keepsakes(modules)
        with warnings.catch_warnings():
            if not draws:
                warnings.filterwarnings("error", message=SLOWER)
            outputs = shared_forward(
                forward,
                _PROBED,
                call,
                draws=draws,
                per_pass=modules,
                parting=None if fork is None else fork.watched,
                observer=meter,
                quiet=draws,
            )
        if (name := kept()) is not None:
            raise RuntimeError(f"{name} keeps a tensor, which would be that of one pass")
        analysis.template = emptied(outputs)[0]
        return outputs

    return trial


def _each(analysis: PassAnalysis, model: nn.Module, inputs: Inputs) -> list[Meter]:
    """The same passes one after the other, with decisions at the ends of what they can be."""
    assert analysis.plain is not None
    if not analysis.plain.scalars:
        return [analysis.plain] * _PROBED

    def trial_at(number: float) -> Trial:
        def trial(forward: Trial, call: Call, meter: Meter, fork: Fork | None) -> Any:
            with Decided(number, meter):
                return _plain(forward, call, meter, fork)

        return trial

    return [_tried(analysis.place, model, inputs, trial_at(number)) for number in (0.0, LAST)]


def _flaw(both: Meter, each: list[Meter]) -> str | None:
    if both.scalars > both.common.scalars:
        return _DECIDES
    if both.draws != both.common.draws + sum(one.draws - one.common.draws for one in each):
        return "an operation draws once for all passes, behind vmap's back"
    if both.reads_replaced:
        return "a tensor is used after a change in place that would tell the passes apart"
    if both.outputs != each[0].outputs:
        return "its outputs are gathered by hooks in modules that run once for each pass"
    return None


def _prefix(both: Meter, each: list[Meter]) -> float:
    cost = sum(one.cost for one in each) / _PROBED
    suffix = (both.cost - cost) / max(cost, 1)
    return min(max(1 - suffix / (_PROBED - 1), 0.0), 1.0)


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
    decided = analysis.plain.scalars and analysis.no_sharing is not None
    return _SHARED_DRAW if decided or both.draws != _PROBED * single.draws else None


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

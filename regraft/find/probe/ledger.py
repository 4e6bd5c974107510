"""The ledger: one observer of a forward, which writes down every draw with the module and line that made it.

Three views of one forward are taken together. Torch's global hooks tell which module runs. A function mode
sees calls of the public functions that drop, with the rates they are given. A dispatch mode sees every
operation that draws, whoever asked for it, and follows the mask to what it is multiplied with: that shows
the rate and the law of a dropout written by hand.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.find.frames import caller_line, calling_frames, in_a_variant, is_users, line_of
from regraft.find.graph_calls import running_node
from regraft.find.probe.copied import NotCopiedError, original
from regraft.find.probe.dataflow import Dataflow
from regraft.find.probe.masks import ROWS, Masks
from regraft.find.recognize import op_of
from regraft.find.site import Called
from regraft.find.tensor_io import Flow, flow
from regraft.ops import ATTENTION, DROP_PATH, FAMILIES, FUNCTIONS, RECURRENT, Parsed
from regraft.record import grafts_of

NOISE = ("Dropout", "DropPath")
_NO_METHODS = {"__call__", "_call_impl", "_wrapped_call_impl"}
GENERATORS = ("python", "numpy")
"""Global generators that are no torch's, seen by their states."""
_SPEC_AUGMENT = "apply_spec_augment"
"""The setting of a configuration by which a speech model masks spans with numpy's generator."""
_FIXED_KINDS = {F.gumbel_softmax: "Gumbel softmax", F.rrelu: "RReLU", torch.multinomial: "sampling"}
"""Functions that draw, and are no regularizers of a layer's output."""
_DEVICE = torch.ops.prim.device.default
_DETACH = torch.ops.aten.detach.default


class Recorder(Protocol):
    """Something that reads every operation of the training forward, in the ledger's dispatch mode."""

    def start(self, state: Mapping[str, Tensor]) -> None:
        """A forward begins, with these parameters and buffers; forget an earlier one."""

    def record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: nn.Module
    ) -> None:
        """One operation ran; `module` is the innermost of the model that was running."""


@dataclass
class Draw:
    """One operation that drew random numbers.

    Attributes:
        op: the operator, "bernoulli_"; or the generator, "numpy".
        module: the innermost module of the model that was running.
        source: the line that asked for it.
        shape: of the numbers.
        p: the rate, where it can be read at the draw.
        law: of a mask, how it was applied: "elements", "rows" or "shared"; else "".
        applied: the shape of what the mask was applied to.
        to_weight: whether that is a parameter.
        call: the call of a function that drops in which it was drawn.
        own: whether a variant of regraft drew it; known of models whose grafts are in place.
        kind: named randomness that is no regularizer of a layer's output: "LayerDrop", "jitter", ...
        methods: methods of the module that were running.
        read: whether it, or a comparison of it, was read as a number of Python's, as a decision is.
    """

    op: str
    module: nn.Module
    source: str
    shape: tuple[int, ...] = ()
    p: float | None = None
    law: str = ""
    applied: tuple[int, ...] | None = None
    to_weight: bool = False
    call: Called | None = None
    own: bool = False
    kind: str = ""
    methods: frozenset[str] = frozenset()
    read: bool = False

    @property
    def may_decide(self) -> bool:
        """Whether the forward may have gone another way with other numbers."""
        return not self.kind and (self.read or self.op in GENERATORS)


@dataclass
class Ledger:
    """What one forward did; modules by id.

    Attributes:
        counts: forwards of each module.
        lines: the line that first called each module.
        flows: the first tensor that went into and came out of each module.
        called: calls of functions that drop, by innermost owner and operation.
        draws: every draw.
        names_read: of the weights that an operation read.
    """

    counts: dict[int, int] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    flows: dict[int, tuple[Flow | None, Flow | None]] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    names_read: set[str] = field(default_factory=set)

    def take(self, other: Ledger) -> None:
        """Take over what another forward did in modules that did not run in this one."""
        known = {(id(called.owner), called.op, called.node) for called in self.called}
        fresh = {key for key, count in other.counts.items() if count and not self.counts.get(key)}
        self.called += [one for one in other.called if (id(one.owner), one.op, one.node) not in known]
        self.draws += [draw for draw in other.draws if id(draw.module) in fresh]
        self.counts |= {key: other.counts[key] for key in fresh}
        self.lines = other.lines | self.lines
        self.flows = other.flows | self.flows
        self.names_read |= other.names_read


def observe(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    known: Mapping[int, nn.Module],
    sites: Container[int] = (),
    state: Mapping[str, Tensor] | None = None,
    recorders: Sequence[Recorder] = (),
    modules_too: bool = False,
    number: float | None = None,
    operations: bool = True,
    fake_mode: ObservedFakeMode | None = None,
    locate: bool = False,
) -> Ledger:
    """Run `forward` without gradients and write its ledger.

    Args:
        forward: what to run.
        args: its arguments.
        kwargs: its keyword arguments.
        known: the modules of the model, by id, the root first.
        sites: modules whose calling line is wanted, by id.
        state: parameters by name, as the forward sees them.
        recorders: told every operation.
        modules_too: whether calls that are a dropout module's own count as calls of it.
        number: what each `torch.rand` of one number gives, which may decide whether a layer runs.
        operations: False sees named functions alone, which is quicker.
        fake_mode: the mode of the fake tensors that it runs on.
        locate: look at the generators of Python and numpy at each line of the model's, not at the end alone.

    The hooks are torch's global ones: hooks on the modules themselves would turn its fused paths off, and
    the user's model is not to be touched.
    """
    tensors = state or {}
    observer = Observer(known, sites, tensors, recorders, modules_too=modules_too, number=number)
    for recorder in recorders:
        recorder.start(tensors)
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(observer.enter).remove)
        stack.callback(register_module_forward_hook(observer.leave, always_call=True).remove)
        if fake_mode is not None:
            fake_mode.observer = observer if operations else None
            stack.callback(setattr, fake_mode, "observer", None)
        elif operations:
            stack.enter_context(_Operations(observer))
        stack.enter_context(_Functions(observer))
        stack.enter_context(torch.no_grad())
        if locate:
            stack.enter_context(_lines_traced(observer))
        if observer.dataflow is not None:
            observer.dataflow.begin(args, kwargs)
        returned = forward(*args, **kwargs)
        if observer.dataflow is not None:
            observer.dataflow.end(returned)
    return observer.finish()


class Observer:
    """What the three views share: which module runs, which call, and the ledger."""

    def __init__(
        self,
        known: Mapping[int, nn.Module],
        sites: Container[int],
        state: Mapping[str, Tensor],
        recorders: Sequence[Recorder],
        *,
        modules_too: bool,
        number: float | None,
    ) -> None:
        self.known = known
        self.sites = sites
        self.recorders = recorders
        self.dataflow = next((one for one in recorders if isinstance(one, Dataflow)), None)
        self.modules_too = modules_too
        self.number = number
        self.root = next(iter(known.values()))
        self.grafted = any(grafts_of(module) for module in known.values())
        self.owners: list[nn.Module] = []
        self.calls: list[_Running] = []
        self.ledger = Ledger()
        self.weights = {id(tensor): name for name, tensor in state.items() if name.endswith("weight")}
        self.masks = Masks({id(tensor) for tensor in state.values()})
        self._called: dict[tuple[int, str, str], Called] = {}
        self._generators = _generators()
        self._thread = threading.get_ident()
        self._copies = False

    @property
    def here(self) -> nn.Module:
        """The innermost module of the model that is running."""
        return next((owner for owner in reversed(self.owners) if id(owner) in self.known), self.root)

    def enter(self, module: nn.Module, given: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        entered, module = module, original(module)
        self._copies |= entered is not module
        if self._copies and entered is module and id(module) in self.known:
            raise NotCopiedError(type(module).__name__)
        self.owners.append(module)
        if self.dataflow is not None:
            self.dataflow.enter(module, given)
        counts, lines = self.ledger.counts, self.ledger.lines
        counts[id(module)] = counts.get(id(module), 0) + 1
        if id(module) in self.sites and id(module) not in lines:
            lines[id(module)] = caller_line()

    def leave(self, module: nn.Module, given: Any, returned: Any) -> None:
        module = original(module)
        if threading.get_ident() == self._thread and self.owners and self.owners[-1] is module:
            self.owners.pop()
            self.ledger.flows.setdefault(id(module), (flow(given), flow(returned)))
            if self.dataflow is not None:
                self.dataflow.leave(module, given, returned)

    def begin_call(self, parsed: Parsed) -> None:
        """A function that drops is called."""
        owners = [owner for owner in self.owners if id(owner) in self.known]
        running = _Running(parsed.p if parsed.training else 0.0)
        self.calls.append(running)
        if not owners:
            return
        own = FAMILIES.get(op_of(owners[-1]) or "") in NOISE
        if own and not self.modules_too and parsed.op != ATTENTION:
            return  # a module site: it is counted as the module
        frames = calling_frames()
        owner, node = running_node(owners, frames)
        if self.dataflow is not None:
            self.dataflow.call(owner, parsed.op, node, parsed.x)
        called = self._call(owner, parsed.op, node)
        called.rates.append(parsed.p if parsed.training or parsed.p == 0 else 0.0)  # as it came: marked
        called.sources.append(line_of(frames))
        called.methods |= _methods(owner, frames)
        called.score_bytes = max(called.score_bytes, parsed.score_bytes)
        running.called = called

    def drew(self, op: str, shape: tuple[int, ...]) -> Draw:
        """Write a draw down."""
        frames, here = calling_frames(), self.here
        draw = Draw(op, here, line_of(frames), shape, own=self.grafted and in_a_variant())
        self.ledger.draws.append(draw)
        if self.calls:
            running = self.calls[-1]
            draw.p, draw.call, draw.kind = running.p, running.called, running.kind
        else:
            draw.methods = frozenset(_methods(here, frames))
        return draw

    def decided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A `torch.rand` of one number, which gets the number of this forward."""
        shape = (1,) if args in ((1,), ([1],), ((1,),)) else ()
        device = kwargs.get("device") if shape else None  # a number without axes goes along with any device
        number = torch.tensor(self.number, device=device, dtype=kwargs.get("dtype")).reshape(shape)
        draw = self.drew("rand", shape)
        if not self.calls:
            self.masks.begin(draw, number, "rand", args)
        return number

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operation ran."""
        if _draws(func) and _rate(func, args, kwargs) != 0:
            first = result[0] if isinstance(result, (tuple, list)) else result
            name = func._overloadpacket.__name__
            draw = self.drew(name, tuple(first.shape) if isinstance(first, Tensor) else ())
            if not self.calls and isinstance(first, Tensor):
                self.masks.begin(draw, first, name, args)
        elif self.masks:
            self.masks.follow(func, func._overloadpacket.__name__, args, result)
        if func is not _DETACH:
            for argument in args:
                if id(argument) in self.weights:
                    self.ledger.names_read.add(self.weights[id(argument)])
        for recorder in self.recorders:
            recorder.record(func, args, kwargs, result, self.here)

    def finish(self) -> Ledger:
        """The ledger, with the drop-paths written by hand as calls of their own."""
        self.check_generators()
        for draw in self.ledger.draws:
            if draw.call is None and FAMILIES.get(op_of(draw.module) or "") in NOISE:
                draw.kind = ""  # a site's own
            if draw.call is None and draw.law == ROWS and not draw.kind and _may_own(draw.module):
                draw.call = self._call(draw.module, DROP_PATH, "")
                draw.call.rates.append(draw.p)
                draw.call.sources.append(draw.source)
                draw.call.methods |= draw.methods
        self.ledger.called = list(self._called.values())
        return self.ledger

    def _call(self, owner: nn.Module, op: str, node: str) -> Called:
        key = (id(owner), node, op)
        return self._called.setdefault(key, Called(owner, op, node=node))

    def check_generators(self, source: str = "") -> None:
        """Write down what Python's and numpy's generators drew since the last look, at the line `source`."""
        for name, state in _generators().items():
            if self._generators.setdefault(name, state) != state:
                draw = self.drew(name, ())
                draw.source = source
                if name == "numpy" and getattr(getattr(draw.module, "config", None), _SPEC_AUGMENT, False):
                    draw.kind = "SpecAugment"
                self._generators[name] = state


@dataclass
class _Running:
    """A call that is running: what is drawn in it is its own."""

    p: float | None = None
    called: Called | None = None
    kind: str = ""


class _Functions(TorchFunctionMode):
    """Sees calls of public functions by name, with what they are given."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, observer = kwargs or {}, self.observer
        if func is torch.rand and observer.number is not None and _is_scalar(args):
            return observer.decided(args, kwargs)
        if func in FUNCTIONS:
            observer.begin_call(FUNCTIONS[func](*args, **kwargs))
        elif func in RECURRENT:
            observer.calls.append(_Running())
        elif func in _FIXED_KINDS:
            observer.calls.append(_Running(kind=_FIXED_KINDS[func]))
        else:
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            observer.calls.pop()


class _Operations(TorchDispatchMode):
    """Sees every operation below the public functions."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer = observer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.observer.operation(func, args, kwargs, result)
        return result


class ObservedFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors whose operations an observer sees: a second mode would dispatch each of them twice."""

    observer: Observer | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, observer = kwargs or {}, self.observer
        if observer is None or func is _DEVICE:
            return self.dispatch(func, types, args, kwargs)
        self.observer = None  # what the operation is made of is not told as well
        try:
            result = self.dispatch(func, types, args, kwargs)
        finally:
            self.observer = observer
        observer.operation(func, tuple(args), dict(kwargs), result)
        return result


@functools.lru_cache(maxsize=4096)
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _rate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The rate of a kernel that is tagged as random at rate 0 too; None of any other."""
    name = func._overloadpacket.__name__
    if name == "native_dropout":
        return 0.0 if args[2] is False else float(args[1])
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name in ("dropout_p", "dropout"):
            return float(value)
    given = kwargs.get("dropout_p", 0.0 if "scaled_dot_product" in name else None)
    return None if given is None else float(given)


def _methods(owner: nn.Module, frames: list[FrameType]) -> set[str]:
    """Names of the owner's methods among the frames: each of them may be an entrance of its own."""
    found = set()
    for frame in frames:
        name = frame.f_code.co_name
        if original(frame.f_locals.get("self")) is owner and callable(getattr(type(owner), name, None)):
            found.add(name)
    return found - _NO_METHODS


def _may_own(module: nn.Module) -> bool:
    """Whether a call site can be made of what the module draws: it is no site itself, and no graph."""
    return FAMILIES.get(op_of(module) or "") is None and not isinstance(module, fx.GraphModule)


def _is_scalar(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and args[0] in ([], (), 1, [1], (1,))


def _generators() -> dict[str, Any]:
    """Where the global generators of Python and numpy stand."""
    numpy = sys.modules.get("numpy")
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)["state"]
        states["numpy"] = (state["key"].tobytes(), state["pos"])
    return states


@contextmanager
def _lines_traced(observer: Observer) -> Iterator[None]:
    """While it runs, the generators of Python and numpy are looked at behind each line of the model's."""

    def called(frame: FrameType, event: str, value: Any) -> Any:
        if not is_users(frame):
            return None
        last = line_of([frame])

        def ran(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal last
            if event in ("line", "return"):
                observer.check_generators(last)
                last = line_of([frame])
            return ran

        return ran

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)

"""Strategy "shared": what comes before the passes part is computed once, the rest under `vmap`.

The passes are the axis of a vmap over a value that the forward never sees. A tensor gets an axis of passes
when something random touches it, and everything before that is computed once. With a fork the vmap begins
there, in the middle of the forward, so what is in front of it, draws and checkpoints and all, is an
ordinary forward. A model in `torch.compile` is compiled with the vmap around it.
"""

from __future__ import annotations

import enum
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._functorch.vmap import vmap_increment_nesting
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from regraft.errors import InputsError
from regraft.ops import RECURRENT
from regraft.training.passes.fork import Fork
from regraft.training.passes.intercept import Interception, RecomputeError, Run
from regraft.training.passes.measure import Meter
from regraft.training.passes.nested import (
    CONSTANTS,
    Call,
    Calls,
    check_output,
    filled,
    holds_cache,
    is_cache,
    mapped,
    outputs_of,
    tensors_in,
)

_attend: Callable[..., Tensor] = F.scaled_dot_product_attention
LAST = 1 - 2**-24  # the greatest number that `torch.rand` gives; the smallest is 0
_UNINITIALIZED: tuple[Any, ...] = (torch.empty, torch.empty_like, Tensor.new_empty)
_IN_PLACE: tuple[Any, ...] = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
)
"""Functions of (input, p, training, inplace)."""
_AUGMENTED = {getattr(Tensor, f"{name}_"): getattr(torch, name) for name in ("add", "sub", "mul", "div")}
"""What `x += y` and its like call -> the same out of place."""
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_UNWRITTEN = (Tensor, nn.Module, *CONSTANTS, slice, range, enum.Enum, torch.Generator)
"""Objects in which one pass can leave nothing that another finds."""
_compiled: WeakKeyDictionary[nn.Module, Callable[..., tuple[Tensor, ...]]] = WeakKeyDictionary()


def shared_forward(
    forward: Callable[..., Any],
    n: int,
    call: Call,
    *,
    draws: bool = True,
    per_pass: Mapping[nn.Module, bool] | None = None,
    fork: Fork | None = None,
    observer: Meter | None = None,
) -> Any:
    """All passes in one forward, which part at the fork, or else at the first random operation.

    With `draws`, operations whose noise vmap cannot draw for each pass are taken over: without it they raise,
    and every operation is a few microseconds faster. The modules of `per_pass` need it.
    """
    level = 0
    mode = None

    def begin() -> None:
        nonlocal level
        level = stack.enter_context(vmap_increment_nesting(n, "different"))
        if mode is not None:
            mode.axis = torch._C._functorch._add_batch_dim(torch.zeros(n), 0, level)
        if observer is not None:
            observer.forked()

    with ExitStack() as stack, warnings.catch_warnings():
        # vmap warns of each operation that it runs pass by pass: slower there, and still right.
        refused = observer is not None and not draws
        warnings.filterwarnings("error" if refused else "ignore", message="There is a performance drop")
        # Entered before the forward: modes of its own may be entered before the fork and left behind it.
        if draws:
            mode = stack.enter_context(DrawsPerPass(per_pass or {}, observer, cached=holds_cache(call)))
        interception = Interception() if mode is None else mode.interception
        stack.enter_context(interception.active())
        if fork is None:
            begin()
        with nullcontext() if fork is None else fork.reached(begin):
            outputs = outputs_of(forward, call)

        def stacked(name: str, leaf: Any) -> Any:
            check_output(name, leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            return torch._C._functorch._remove_batch_dim(leaf, level, n, 0)

        passes = mapped(stacked, "", outputs)
    if not tensors_in(passes):
        raise InputsError("the forward gives no tensor, so there is nothing to stack")
    return passes


def is_compiled(model: nn.Module) -> bool:
    """Whether it is what `torch.compile(model)` returned."""
    return hasattr(model, "dynamo_ctx") and hasattr(model, "_orig_mod")


def compiled_forward(model: nn.Module, n: int, call: Call, template: Any) -> Any:
    """All passes in one compiled forward; `template` is the outputs of a forward, whatever its tensors."""
    compiled: Any = model
    inner = compiled._orig_mod

    def passes(axis: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        def one_pass(_: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors_in(inner(*args, **kwargs)))

        return torch.func.vmap(one_pass, randomness="different")(axis)

    if model not in _compiled:
        _compiled[model] = compiled.dynamo_ctx(passes)
    return filled(template, _compiled[model](torch.zeros(n), *call))


class DrawsPerPass(TorchFunctionMode):
    """While a vmapped forward runs, gives every draw an axis of passes.

    vmap refuses to draw in place on a tensor that has no such axis yet, which is how DropPath and the
    dropout inside fused attention draw; and RNNs draw between their layers behind its back.

    The modules of `per_pass` run outside vmap, once for each pass; True: even where nothing tells their
    arguments apart. For an `observer`, scalar draws get both ends of their range.
    """

    axis: Any = None  # zeros with nothing but the axis of passes, once these have parted

    def __init__(self, per_pass: Mapping[nn.Module, bool], observer: Meter | None, *, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.observer = observer
        modules = {module: self._module_run(always) for module, always in per_pass.items()}
        self.interception = Interception(self._run_function, modules)
        self._handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: lambda _, *args, **kwargs: _attention(self.axis, *args, **kwargs),
            F.multi_head_attention_forward: self._multi_head,
            F.linear: self._linear,
            # vmap refuses it. On a value within a forward it is made for the sake of checkpointing alone.
            Tensor.requires_grad_: lambda _, x, *__, **___: x,
            Tensor.__bool__: self._agreed,
            # `x.data`, which vmap refuses; what is written into it reaches `x`, as it should.
            _DATA: lambda _, x: x.detach(),
            Tensor.narrow: self._from_a_number,
            torch.narrow: self._from_a_number,
            torch.rand: self._decisive,
            **dict.fromkeys(_UNINITIALIZED, self._per_pass),
            **dict.fromkeys(RECURRENT, self._recurrent),
            **dict.fromkeys(_IN_PLACE, self._out_of_place),
            **dict.fromkeys(_AUGMENTED, self._augmented),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.axis is None:
            return func(*args, **kwargs)
        if self.interception.recomputed:
            return _common(func, args, kwargs)
        handle = self._handlers.get(func)
        return func(*args, **kwargs) if handle is None else handle(func, *args, **kwargs)

    def _run_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an autograd function outside vmap; it may recompute in the backward what its arguments do."""
        self._check_recomputed((args, kwargs))
        return self._outside(func, args, kwargs, [Calls(_common)] if any(map(callable, args)) else [])

    def _module_run(self, always: bool) -> Run:
        """How a module's forward is called; unless `always`, outside vmap only with forked arguments."""

        def run(func: Any, args: Any, kwargs: Any) -> Any:
            if self.axis is None or not (always or _holds_forked((args, kwargs))):
                return func(*args, **kwargs)
            self._check_recomputed((args, kwargs))
            args, kwargs = mapped(self._unwritten, "", (args, kwargs))
            return self._outside(func, args, kwargs)

        return run

    def _outside(self, func: Any, args: Any, kwargs: Any, watch: Sequence[TorchFunctionMode] = ()) -> Any:
        """Call outside vmap what vmap cannot run and no function mode sees; its own draws are as ever."""
        # On the way out of vmap torch takes all modes off, with those of the user and of grafts.
        modes = [mode for mode in _get_current_function_mode_stack() if mode is not self]  # type: ignore[no-untyped-call]
        numbers = itertools.chain((0.0,), itertools.repeat(LAST))

        def one_pass(*args: Any, **kwargs: Any) -> Any:
            ends = [decided(next(numbers), self.observer)] if self.observer is not None else []
            with ExitStack() as stack:
                for mode in (*modes, *ends, *watch):
                    _push_mode(mode)  # type: ignore[no-untyped-call]
                    stack.callback(_pop_mode)
                return func(*args, **kwargs)

        return pass_by_pass(self.axis, one_pass, args, kwargs, draws=True)

    def _unwritten(self, _: str, leaf: Any) -> Any:
        """An argument of a module that each pass calls by itself; raises where one may be written into."""
        if is_cache(leaf) and not self.cached:
            return None  # one that the forward made for itself has no meaning across passes
        if isinstance(leaf, _UNWRITTEN) or callable(leaf):
            return leaf
        raise RuntimeError(f"a module that runs once for each pass might write into a {type(leaf).__name__}")

    def _check_recomputed(self, call: Any) -> None:
        if self.interception.recomputed and _holds_forked(call):
            raise RecomputeError

    def _linear(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        # vmap takes it apart below autocast, which then adds a bias in single precision to a product in half.
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        tensors = given["input"], given["weight"], given.get("bias")
        if not torch.is_autocast_enabled(tensors[0].device.type):
            return func(*args, **kwargs)
        if _is_forked(tensors[1]) or _is_forked(tensors[2]):
            return pass_by_pass(self.axis, func, args, kwargs, draws=False)

        def call(_: int, tensors: list[Any], forked: list[bool]) -> Any:
            return F.linear(*tensors), 0 if forked[0] else None  # all axes in front are alike to it

        return _Outside.apply(call, self.axis, *tensors)

    def _from_a_number(self, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        # vmap knows no narrowing from where a tensor says, which may well be the same for all passes.
        plain = [int(one) if isinstance(one, Tensor) and not _is_forked(one) else one for one in args]
        return func(x, *plain, **kwargs)

    def _agreed(self, _: Any, value: Tensor) -> bool:
        # A check that all passes answer alike, as for values that are not finite, is one branch for them all.
        while _is_forked(value):
            value = torch._C._functorch.get_unwrapped(value)
        if value.numel() < 2 or bool((value == value.flatten()[0]).all()):
            return bool(value.flatten()[0]) if value.numel() else bool(value)
        raise RuntimeError("it branches on a value that differs between the passes")

    def _decisive(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        # A number drawn to decide whether a layer runs. The analysis gives both ends of its range: if
        # they then take the same branches, they always do.
        sizes = _sizes_of_decision(args, kwargs)
        if sizes is None or self.observer is None:
            return func(*args, **kwargs)

        def ends(n: int, *_: Any) -> Any:
            return torch.linspace(0, LAST, n).view(n, *sizes).to(self.axis.device), 0

        return _Outside.apply(ends, self.axis)

    def _recurrent(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        # (..., weights, has biases, layers, dropout, train, ...)
        at = next(i for i, one in enumerate(args) if isinstance(one, list))
        layers, rate, training = args[at + 2 : at + 5]
        return pass_by_pass(self.axis, func, args, kwargs, draws=bool(training and rate and layers > 1))

    def _per_pass(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Memory that is made to be filled, by a draw as like as not: with an axis of passes from the start.
        empty: Tensor = func(*args, **kwargs)
        if empty.is_floating_point() or empty.dtype == torch.bool:
            return empty.zero_() + self.axis.to(empty)  # type: ignore[no-any-return]
        return empty

    def _multi_head(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        if not (given["dropout_p"] and given.get("training", True)):
            return func(**given)
        # A query with an axis of passes is enough for the attention inside to draw for each of them. The
        # projection is packed where query, key and value are one object, so they stay one.
        query = given["query"]
        forked = query + self.axis.to(query)
        return func(**{name: forked if value is query else value for name, value in given.items()})

    def _out_of_place(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        if not given.pop("inplace", False):
            return func(*args, **kwargs)
        return self._replacing(given["input"], func(**given))

    def _augmented(self, func: Any, x: Tensor, *others: Any, **kwargs: Any) -> Any:
        if _is_forked(x) or not _holds_forked((others, kwargs)):
            return func(x, *others, **kwargs)
        # There is no room for the passes in `x`; the name on the left gets what this returns.
        return self._replacing(x, _AUGMENTED[func](x, *others, **kwargs))

    def _replacing(self, x: Tensor, result: Any) -> Any:
        """The result of an operation that was to change `x` in place."""
        if result is not x and self.observer is not None:
            self.observer.replaced(x)
        return result


def decided(number: float, observer: Meter) -> Calls:
    """Gives every scalar drawn for control flow (LayerDrop) this value, and tells the observer."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        sizes = _sizes_of_decision(args, kwargs) if func is torch.rand else None
        if sizes is None:
            return func(*args, **kwargs)
        observer.decides = True
        return torch.full(sizes, number, dtype=kwargs.get("dtype"), device=kwargs.get("device"))

    return Calls(run)


def _common(func: Any, args: Any, kwargs: Any) -> Any:
    """Raises where something is computed that tells the passes apart."""
    if _holds_forked((args, kwargs)) or _holds_forked(result := func(*args, **kwargs)):
        raise RecomputeError
    return result


def _holds_forked(values: Any) -> bool:
    return any(map(_is_forked, tensors_in(values)))


def _is_forked(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _sizes_of_decision(args: Any, kwargs: Any) -> tuple[int, ...] | None:
    """The sizes of a `torch.rand` of one number, or None."""
    sizes = tuple(args[0] if args and isinstance(args[0], (list, tuple)) else args)
    return sizes if sizes in ((), (1,)) and "size" not in kwargs else None


class _Outside(torch.autograd.Function):
    """`_Outside.apply(call, axis, *tensors)`: one call made outside vmap, `call(n, tensors, forked)`.

    A forked tensor begins with the passes. The result has the passes on its first axis, or on none. Autograd
    records what the call does as it would without vmap.
    """

    # Only ever called under vmap; torch asks for both.
    @staticmethod
    def forward(*_: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(*_: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, _: Tensor, *tensors: Any) -> Any:
        moved = [
            tensor if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return call(info.batch_size, moved, [dim is not None for dim in in_dims[2:]])


def _attention(
    axis: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """Fused attention with the passes as part of its batch, so that its kernel draws for each of them."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, **options}

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        if not any(forked) and not dropout_p:
            return _attend(*tensors, **options), None
        *first, mask = [
            one if there or one is None else one.expand(n, *one.shape)
            for one, there in zip(tensors, forked, strict=True)
        ]
        batch = first[0].shape[1]
        if all(one.dim() == 5 and one.shape[1] == batch for one in first):
            if mask is not None:
                shared = not forked[3] and (tensors[3].dim() < 4 or len(tensors[3]) == 1)
                mask = tensors[3] if shared else _folded(_ranked(mask, 5), n, batch)
            result = _attend(*(_folded(one, n, batch) for one in first), mask, **options)
            return result.reshape(n, batch, *result.shape[1:]), 0
        return _attend(*first, None if mask is None else _ranked(mask, first[0].dim()), **options), 0

    return _Outside.apply(call, axis, query, key, value, attn_mask)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """A mask that begins with the passes, with axes of 1 behind them up to `rank`."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


def _folded(tensor: Tensor, n: int, batch: int) -> Tensor:
    return tensor.expand(n, batch, *tensor.shape[2:]).reshape(n * batch, *tensor.shape[2:])


def pass_by_pass(axis: Tensor, func: Any, args: Any, kwargs: Any, *, draws: bool) -> Any:
    """A function that vmap cannot run, once for each pass; once for all if nothing tells them apart."""
    outputs: Any = None

    def call(n: int, tensors: list[Any], forked: list[bool]) -> Any:
        nonlocal outputs
        before = _versions(tensors)

        def run(i: int) -> Any:
            own = (one[i] if there else one for one, there in zip(tensors, forked, strict=True))
            given, named = filled((args, kwargs), own)
            return func(*given, **named)

        alike = not any(forked) and not draws
        outputs = run(0) if alike else mapped(_stacked, "", *map(run, range(n)))
        if _versions(tensors) != before:
            # A tensor without an axis of passes is one for them all; of one with it, the count of writes is.
            raise RuntimeError("behind the first random operation it changes its arguments in place")
        results = tensors_in(outputs)
        # Something has to come out, or torch has nothing to wrap.
        return (torch.zeros(()), *results), (None, *[None if alike else 0] * len(results))

    results = _Outside.apply(call, axis, *tensors_in((args, kwargs)))[1:]
    return filled(outputs, results)


def _versions(tensors: list[Any]) -> list[int]:
    """Which writes in place there were; inference tensors count none."""
    return [-1 if one.is_inference() else one._version for one in tensors]


def _stacked(name: str, first: Any, *others: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.stack((first, *others))
    if any(other is not first and not (isinstance(first, CONSTANTS) and other == first) for other in others):
        raise RuntimeError(f"{name or 'a value'} differs between the passes")
    return first

"""Draws under `vmap`: the operations that would share their noise between passes, or raise, taken over."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from regraft.ops import RECURRENT
from regraft.training.passes.intercept import Interception, RecomputeError, Run
from regraft.training.passes.measure import Meter
from regraft.training.passes.nested import CONSTANTS, is_cache, mapped, tensors_in
from regraft.training.passes.vmap_escape import Outside, attention, pass_by_pass

LAST = 1 - 2**-24
"""The greatest number that `torch.rand` gives; the smallest is 0."""
_UNINITIALIZED: tuple[Any, ...] = (torch.empty, torch.empty_like, Tensor.new_empty)
_IN_PLACE: tuple[Any, ...] = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
)
"""Functions of (input, p, training, inplace)."""
_AUGMENTED: dict[Any, Any] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}
"""What `x += y` and its like call -> the same out of place."""
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_UNWRITTEN = (Tensor, nn.Module, *CONSTANTS, slice, range, enum.Enum, torch.Generator)
"""Objects in which one pass can leave nothing that another finds."""


class DrawsPerPass(TorchFunctionMode):
    """While a vmapped forward runs, gives every draw an axis of passes.

    vmap refuses to draw in place on a tensor that has no such axis yet, which is how DropPath and the
    dropout inside fused attention draw; and RNNs draw between their layers behind its back.

    Args:
        per_pass: modules that run outside vmap, once for each pass, and whether they do so even where nothing
            tells their arguments apart.
        observer: the analysis; scalar draws then get both ends of their range.
        cached: whether the forward was given a cache of keys and values.

    Attributes:
        axis: zeros with nothing but the axis of passes; before the passes part, None.
    """

    axis: Any = None

    def __init__(self, per_pass: Mapping[nn.Module, bool], observer: Meter | None, *, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.observer = observer
        modules = {module: self._module_run(always) for module, always in per_pass.items()}
        self.interception = Interception(self._run_function, modules)
        self._in_a_pass = False
        self._handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: lambda _, *args, **kwargs: attention(self.axis, *args, **kwargs),
            F.multi_head_attention_forward: self._multi_head,
            F.linear: self._linear,
            # vmap refuses it. On a value within a forward it is made for the sake of checkpointing alone.
            Tensor.requires_grad_: lambda _, x, *__: x,
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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.axis is None:
            return func(*args, **kwargs)
        if self.interception.recomputed:
            return _common(func, args, kwargs)
        handle = self._handlers.get(func)
        return func(*args, **kwargs) if handle is None else handle(func, *args, **kwargs)

    def _run_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an autograd function outside vmap; it may recompute in the backward what its arguments do."""
        self._check_recomputed((args, kwargs))
        return self._outside(func, args, kwargs, [_Common()] if any(map(callable, args)) else [])

    def _module_run(self, always: bool) -> Run:
        """How a module's forward is called; unless `always`, outside vmap only with forked arguments."""

        def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            apart = self.axis is not None and (always or _holds_forked((args, kwargs)))
            if self._in_a_pass or not apart:
                return func(*args, **kwargs)
            self._check_recomputed((args, kwargs))
            args, kwargs = mapped(self._unwritten, "", (args, kwargs))
            return self._outside(func, args, kwargs)

        return run

    def _outside(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watch: Sequence[TorchFunctionMode] = (),
    ) -> Any:
        """Call outside vmap what vmap cannot run and no function mode sees; its own draws are as ever."""
        # On the way out of vmap torch takes all modes off, with those of the user and of grafts.
        modes = [mode for mode in _get_current_function_mode_stack() if mode is not self]  # type: ignore[no-untyped-call]
        numbers = itertools.chain((0.0,), itertools.repeat(LAST))

        def one_pass(*args: Any, **kwargs: Any) -> Any:
            decided = [Decided(next(numbers), self.observer)] if self.observer is not None else []
            with ExitStack() as stack:
                for mode in (*modes, *decided, *watch):
                    _push_mode(mode)  # type: ignore[no-untyped-call]
                    stack.callback(_pop_mode)
                self._in_a_pass = True
                stack.callback(setattr, self, "_in_a_pass", False)
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

        return Outside.apply(call, self.axis, *tensors)

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

        return Outside.apply(ends, self.axis)

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
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        rate = args[10] if len(args) > 10 else given["dropout_p"]
        training = args[13] if len(args) > 13 else given.get("training", True)
        if not (rate and training):
            return func(*args, **kwargs)
        # A query with an axis of passes is enough for the attention inside to draw for each of them. The
        # projection is packed where query, key and value are one object, so they stay one.
        query = given["query"]
        forked = query + self.axis.to(query)
        first = [given.pop(name) for name in ("query", "key", "value")]
        return func(*(forked if one is query else one for one in first), *args[3:], **given)

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


class Decided(TorchFunctionMode):
    """Gives every scalar drawn for control flow (LayerDrop) this value, and tells the observer."""

    def __init__(self, number: float, observer: Meter) -> None:
        super().__init__()
        self.number = number
        self.observer = observer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sizes = _sizes_of_decision(args, kwargs) if func is torch.rand else None
        if sizes is None:
            return func(*args, **kwargs)
        self.observer.decides = True
        return torch.full(sizes, self.number, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


class _Common(TorchFunctionMode):
    """Raises where something is computed that tells the passes apart."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _common(func, args, kwargs or {})


def _common(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _holds_forked((args, kwargs)) or _holds_forked(result := func(*args, **kwargs)):
        raise RecomputeError
    return result


def _holds_forked(values: Any) -> bool:
    return any(map(_is_forked, tensors_in(values)))


def _is_forked(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _sizes_of_decision(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The sizes of a `torch.rand` of one number, or None."""
    sizes = tuple(args[0] if args and isinstance(args[0], (list, tuple)) else args)
    return sizes if sizes in ((), (1,)) and "size" not in kwargs else None

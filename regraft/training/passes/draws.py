"""Draws under `vmap`: the operations that would share their noise between passes, or raise, taken over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from regraft.ops import RECURRENT
from regraft.training.passes.caches import stateless
from regraft.training.passes.intercept import Interception, RecomputeError, Run
from regraft.training.passes.measure import Meter
from regraft.training.passes.nested import leaves
from regraft.training.passes.scalar_draws import LAST, Decided, sizes_of_decision
from regraft.training.passes.vmap_escape import attention, ends, linear, pass_by_pass

_UNINITIALIZED: tuple[Any, ...] = (torch.empty, torch.empty_like, Tensor.new_empty)
_IN_PLACE: dict[Any, int] = {
    F.dropout: 3,
    F.dropout1d: 3,
    F.dropout2d: 3,
    F.dropout3d: 3,
    F.alpha_dropout: 3,
    F.feature_alpha_dropout: 3,
}
"""Function -> position of its `inplace`."""
_AUGMENTED: dict[Any, Any] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}
"""What `x += y` and its like call -> the same out of place."""


_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


class DrawsPerPass(TorchFunctionMode):
    """While a vmapped forward runs, gives every draw an axis of passes.

    vmap refuses to draw in place on a tensor that has no such axis yet, which is how DropPath and the
    dropout inside fused attention draw; and RNNs draw between their layers behind its back.

    Args:
        observer: the analysis; scalar draws then get both ends of their range.
        cached: whether the forward was given a cache of keys and values.

    Attributes:
        axis: zeros with nothing but the axis of passes; before the passes part, None.
    """

    axis: Any = None

    def __init__(self, observer: Meter | None = None, *, cached: bool = False) -> None:
        super().__init__()
        self.cached = cached
        self.observer = observer
        self.interception = Interception(self.run_function)
        self._in_a_pass = False
        self._handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head,
            F.linear: self._linear,
            Tensor.requires_grad_: self._as_it_is,
            Tensor.__bool__: self._agreed,
            _DATA: self._detached,
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
        return func(*args, **kwargs) if handle is None else handle(func, args, kwargs)

    def run_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an autograd function outside vmap; it may recompute in the backward what its arguments do."""
        self._check_recomputed((args, kwargs))
        watch = [_Common()] if any(map(callable, args)) else []
        return self.pass_by_pass(func, args, kwargs, watch)

    def pass_by_pass(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watch: Sequence[TorchFunctionMode] = (),
    ) -> Any:
        """Call outside vmap what vmap cannot run and no function mode sees; its own draws are as ever."""
        modes = [mode for mode in _get_current_function_mode_stack() if mode is not self]  # type: ignore[no-untyped-call]
        numbers = itertools.chain((0.0,), itertools.repeat(LAST))

        def one_pass(*args: Any, **kwargs: Any) -> Any:
            # On the way out of vmap torch takes all modes off, with those of the user and of grafts.
            decided = [Decided(next(numbers), self.observer)] if self.observer is not None else []
            with _only([*modes, *decided, *watch]):
                self._in_a_pass = True
                try:
                    return func(*args, **kwargs)
                finally:
                    self._in_a_pass = False

        return pass_by_pass(self.axis, one_pass, args, kwargs, draws=True)

    def run_of(self, *, always: bool) -> Run:
        """The same for a module; unless `always`, only where something tells its arguments apart."""

        def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.axis is None:
                return func(*args, **kwargs)
            per_pass = always or _holds_forked((args, kwargs))
            if per_pass and not self._in_a_pass:
                self._check_recomputed((args, kwargs))
            if self._in_a_pass or not per_pass:
                return func(*args, **kwargs)
            return self.pass_by_pass(func, *stateless((args, kwargs), given=self.cached))

        return run

    def _check_recomputed(self, call: Any) -> None:
        if self.interception.recomputed and _holds_forked(call):
            raise RecomputeError

    def _attention(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return attention(self.axis, *args, **kwargs)

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # vmap takes it apart below autocast, which then adds a bias in single precision to a product in half.
        first: Tensor = args[0] if args else kwargs["input"]
        if not torch.is_autocast_enabled(first.device.type):
            return func(*args, **kwargs)
        return linear(self.axis, *args, **kwargs)

    def _as_it_is(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # vmap refuses it. On a value within a forward it is made for the sake of checkpointing alone.
        del kwargs
        return args[0]

    def _detached(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # `x.data`, which vmap refuses; what is written into it reaches `x`, as it should.
        del kwargs
        x: Tensor = args[0]
        return x.detach()

    def _from_a_number(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # vmap knows no narrowing from where a tensor says, which may well be the same for all passes.
        plain = [int(one) if isinstance(one, Tensor) and not _is_forked(one) else one for one in args[1:]]
        return func(args[0], *plain, **kwargs)

    def _agreed(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # A check that all passes answer alike, as for values that are not finite, is one branch for them all.
        del kwargs
        value = args[0]
        while _is_forked(value):
            value = torch._C._functorch.get_unwrapped(value)
        if value.numel() < 2 or bool((value == value.flatten()[0]).all()):
            return bool(value.flatten()[0]) if value.numel() else bool(value)
        raise RuntimeError("it branches on a value that differs between the passes")

    def _decisive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A number drawn to decide whether a layer runs. The analysis gives both ends of its range: if
        # they then take the same branches, they always do.
        sizes = sizes_of_decision(args, kwargs)
        return func(*args, **kwargs) if sizes is None or self.observer is None else ends(self.axis, sizes)

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return pass_by_pass(self.axis, func, args, kwargs, draws=_draws(args))

    def _per_pass(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # Memory that is made to be filled, by a draw as like as not: with an axis of passes from the start.
        empty: Tensor = func(*args, **kwargs)
        if empty.is_floating_point() or empty.dtype == torch.bool:
            with_passes: Tensor = empty.zero_() + self.axis.to(empty)
            return with_passes
        return empty

    def _multi_head(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        rate = args[10] if len(args) > 10 else given["dropout_p"]
        training = args[13] if len(args) > 13 else given.get("training", True)
        if not (rate and training):
            return F.multi_head_attention_forward(*args, **kwargs)
        # A query with an axis of passes is enough for the attention inside to draw for each of them. The
        # projection is packed where query, key and value are one object, so they stay one.
        query = given["query"]
        forked = query + self.axis.to(query)
        first = [given.pop(name) for name in ("query", "key", "value")]
        first = [forked if one is query else one for one in first]
        return F.multi_head_attention_forward(*first, *args[3:], **given)

    def _out_of_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = _IN_PLACE[func]
        if not (kwargs.get("inplace") or (len(args) > at and args[at])):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        rest = {name: value for name, value in kwargs.items() if name != "inplace"}
        result = func(*args[:at], *args[at + 1 :], **rest)
        if result is not x and self.observer is not None:
            self.observer.replaced(x)
        return result

    def _augmented(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args
        if _is_forked(x) or not any(map(_is_forked, (*others, *kwargs.values()))):
            return func(*args, **kwargs)
        # There is no room for the passes in `x`; the name on the left gets what this returns.
        result = _AUGMENTED[func](*args, **kwargs)
        if self.observer is not None:
            self.observer.replaced(x)
        return result


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
    return any(_is_forked(leaf) for _, leaf in leaves("", values))


@contextmanager
def _only(modes: list[TorchFunctionMode]) -> Iterator[None]:
    """These function modes and no others."""
    before = []
    while torch._C._len_torch_function_stack():
        before.append(_pop_mode())  # type: ignore[no-untyped-call]
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()  # type: ignore[no-untyped-call]
        while before:
            _push_mode(before.pop())  # type: ignore[no-untyped-call]


def _is_forked(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _draws(args: tuple[Any, ...]) -> bool:
    """Whether an RNN called like this draws: (..., weights, has biases, layers, dropout, train, ...)."""
    at = next(i for i, one in enumerate(args) if isinstance(one, list))
    layers, rate, training = args[at + 2 : at + 5]
    return bool(training and rate and layers > 1)

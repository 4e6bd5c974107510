"""Several stochastic passes over one input, sharing what is the same in all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError, ModelError, RateError, nearest
from regraft.find.walk import inner_model
from regraft.training.passes.analyze import SHARED_DRAW, Call, Traits, why
from regraft.training.passes.caches import own_caches, without_caches
from regraft.training.passes.choice import log, no_batch, traits_of
from regraft.training.passes.intercept import RecomputeError
from regraft.training.passes.measure import Forward
from regraft.training.passes.nested import mapped
from regraft.training.passes.per_pass_modules import modules_of
from regraft.training.passes.reentrancy import passing
from regraft.training.passes.repeat import ScalarOutputError, repeated_forward
from regraft.training.passes.vmap import shared_forward

STRATEGIES = ("auto", "shared", "batch", "loop")


def stochastic_passes(
    model: nn.Module,
    n: int,
    *args: Any,
    strategy: str = "auto",
    chunk: int | None = None,
    unbatched: Collection[str] = (),
    **kwargs: Any,
) -> Any:
    """Several passes over one input, each with noise of its own.

    What comes before the first random operation is the same in every pass. "shared" computes it once, by
    `torch.func.vmap`; "batch" repeats the inputs n times along their first axis, in one forward; "loop"
    runs the passes one after the other. "auto" takes the cheapest of them that is right for this model,
    which it finds out at the first call, on fake tensors; `logging.getLogger("regraft")` says why.

    Args:
        model: as it is, in training or in eval; it is not switched.
        n: how many passes.
        args: for the model's forward.
        strategy: "auto", "shared", "batch" or "loop".
        chunk: at most this many passes at once, to bound the memory.
        unbatched: names of keyword arguments that "batch" must not repeat, although their first axis is
            as long as the batch.
        kwargs: for the model's forward.

    Returns:
        The model's own output type (tensor, tuple, dict, ModelOutput), every tensor with a new first
        axis of n.

    Running statistics of BatchNorm move once for each pass by "loop", once for each forward by "batch"
    and "shared"; "shared" refuses a BatchNorm in training behind the first random operation.

    Under "shared", a module that vmap cannot run (routed experts, LayerDrop) runs once for each pass, and
    what is around it is shared. Autocast works, and so do hooks, grafts and models whose attention is
    fused; gradient checkpointing behind the first random operation, compiled models and models sharded by
    FSDP do not, and "auto" repeats the batch for them. Inside `torch.compile` "auto" repeats the batch. A cache of keys and values that
    was not asked for by `use_cache=True` is None among the outputs.

    Raises:
        InputsError: an input that cannot be repeated, or an output without a value for each pass.
        ModelError: the strategy asked for cannot run this model, or its passes would share noise.
        RateError: n or chunk below 1.

    Example:
        >>> import regraft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
        >>> regraft.stochastic_passes(model, 2, torch.ones(5, 4)).shape
        torch.Size([2, 5, 3])
    """
    check_strategy(strategy)
    return run_passes(
        model,
        model,
        _check_count("n", n),
        (args, kwargs),
        strategy=strategy,
        chunk=n if chunk is None else _check_count("chunk", chunk),
        unbatched=unbatched,
    )


def run_passes(
    model: nn.Module,
    forward: Forward,
    n: int,
    call: Call,
    *,
    strategy: str,
    chunk: int,
    unbatched: Collection[str] = (),
) -> Any:
    """What `stochastic_passes` does, by a `forward` of `model` that need not be the model's own."""
    args, kwargs = call
    call = args, _without_cache(model, kwargs)
    options = {"main": getattr(model, "main_input_name", None), "unbatched": unbatched}
    passes = _Passes(model, forward, n, min(chunk, n), call, options)
    with passing(inner_model(model)[0]):
        return getattr(passes, strategy)()


@dataclass(frozen=True)
class _Passes:
    """The passes over one input; a method for each strategy."""

    model: nn.Module
    forward: Forward
    n: int
    chunk: int
    call: Call
    options: dict[str, Any]

    def auto(self) -> Any:
        if self.chunk == 1:  # nothing to share, and nothing to repeat
            return self.loop()
        traits = traits_of(self.model, self.call)
        if traits.no_sharing is None and traits.cost(self.n, self.chunk) < self.n:
            try:
                return self._by_sharing(traits)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                traits.no_sharing = why(error)
                name = type(self.model).__name__
                log.info("%s: passes share nothing from here on: %s", name, traits.no_sharing)
        if self._no_batch(traits) is None:
            try:
                return self._by_repeating()
            except ScalarOutputError as error:
                traits.no_batch[:] = [error.what]
        return self.loop()

    def shared(self) -> Any:
        traits = traits_of(self.model, self.call)
        if traits.no_sharing is not None:
            raise self._cannot("shared", traits.no_sharing)
        try:
            return self._by_sharing(traits)
        except RecomputeError as error:  # switched on since the analysis
            raise self._cannot("shared", str(error)) from error

    def batch(self) -> Any:
        reason = no_batch(traits_of(self.model, self.call), self.model, self.call, self.options)
        if reason == SHARED_DRAW:
            raise self._cannot("batch", reason)
        return self._by_repeating()

    def loop(self) -> Any:
        def once() -> Any:
            args, kwargs = own_caches(self.call)
            return without_caches(self.forward(*args, **kwargs), kwargs)

        return mapped(_stacked, "", *(once() for _ in range(self.n)))

    def _by_sharing(self, traits: Traits) -> Any:
        apart = modules_of(self.model, traits.apart)

        def run(size: int) -> Any:
            call = own_caches(self.call)
            return shared_forward(self.forward, size, *call, draws=traits.draws, apart=apart)

        return self._in_chunks(run)

    def _by_repeating(self) -> Any:
        return self._in_chunks(lambda size: repeated_forward(self.forward, size, *self.call, **self.options))

    def _in_chunks(self, run: Callable[[int], Any]) -> Any:
        parts = [run(min(self.chunk, self.n - start)) for start in range(0, self.n, self.chunk)]
        return parts[0] if len(parts) == 1 else mapped(_joined, "", *parts)

    def _no_batch(self, traits: Traits) -> str | None:
        return traits.elsewhere or no_batch(traits, self.model, self.call, self.options)

    def _cannot(self, strategy: str, reason: str) -> ModelError:
        return ModelError(
            f'strategy="{strategy}" cannot run {type(self.model).__name__}: {reason}',
            remedy='strategy="auto" takes one that can',
        )


def _joined(_: str, first: Any, *others: Any) -> Any:
    return torch.cat((first, *others)) if isinstance(first, Tensor) else first


def _stacked(name: str, first: Any, *others: Any) -> Any:
    every = (first, *others)
    if isinstance(first, Tensor):
        shapes = sorted({tuple(one.shape) for one in every})
        if len(shapes) > 1:
            raise ModelError(
                f"the passes differ in shape, {' and '.join(map(str, shapes))}, and cannot be stacked",
                where=f"output {name or 'of the model'}",
                remedy="its length is drawn at random: call the model once for each pass",
            )
        return torch.stack(every)
    return first if all(one is first or one == first for one in others) else every


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without a cache of keys and values among the outputs, which would have no meaning across passes."""
    if torch.compiler.is_compiling():
        return kwargs
    forward = inspect.unwrap(model.forward)
    code = getattr(forward, "__code__", None)
    wanted = code is not None and "use_cache" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {"use_cache": False, **kwargs} if wanted else kwargs


def check_strategy(strategy: str) -> None:
    """Raise for a strategy that there is not."""
    if strategy not in STRATEGIES:
        listed = ", ".join(map(repr, STRATEGIES))
        raise InputsError(
            f"strategy={strategy!r} is not one of {listed}", remedy=nearest(str(strategy), STRATEGIES)
        )


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RateError(f"{name}={value!r} is not a number of passes", remedy="give 1 or more")
    return value

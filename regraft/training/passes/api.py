"""Several stochastic passes over one input: the strategies, and which of them a call takes."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError, LossError, ModelError, RateError, nearest
from regraft.find.probe.example_inputs import given_inputs
from regraft.find.walk import inner_model
from regraft.training.passes.analyze import (
    Inputs,
    PassAnalysis,
    analysis_of,
    log,
    main_input,
    modules_of,
    why,
)
from regraft.training.passes.fork import Fork, ForkError, fork_path
from regraft.training.passes.intercept import RecomputeError
from regraft.training.passes.measure import Forward
from regraft.training.passes.nested import Call, joined, outputs_of, pass_of, tensors_changed, tensors_in
from regraft.training.passes.repeat import NoBatchAxisError, repeated_forward
from regraft.training.passes.rows import row_by_row, rows_at_once, shown_at_once
from regraft.training.passes.sharded import gathered_as_ever
from regraft.training.passes.vmap import compiled_forward, is_compiled, shared_forward

STRATEGIES = ("auto", "shared", "batch", "loop")
_here = threading.local()
"""Which models are making passes: a graft that makes them must not make passes of passes."""


def stochastic_passes(
    model: nn.Module,
    n: int,
    *args: Any,
    strategy: str = "auto",
    chunk: int | None = None,
    unbatched: Collection[str] = (),
    fork: str | float | None = None,
    one_mask: bool = False,
    **kwargs: Any,
) -> Any:
    """Several passes over one input, each with noise of its own.

    "shared" computes what comes before the first random operation once, by `torch.func.vmap`; "batch"
    repeats the inputs n times along the batch, in one forward; "loop" runs the passes one after the other.
    "auto" takes the cheapest that is right for this model. It finds out at the first call with inputs of a
    kind, and `logging.getLogger("regraft")` says why: "shared" was tried on fake tensors, and its passes draw
    as many numbers as single ones; "batch" was shown, on rows of the inputs, to be over an axis whose entries
    do not see one another. docs/passes.md has a table of what works under which.

    Args:
        model: as it is, in training or in eval; it is not switched.
        n: how many passes.
        args: for the model's forward, as are `kwargs`; or `inputs=` with all of them, as of `regraft.apply`.
        strategy: "auto", "shared", "batch" or "loop".
        chunk: at most this many passes at once, to bound the memory.
        unbatched: names of keyword arguments that "batch" must not repeat, although their first axis is
            as long as the batch.
        fork: where the passes part: the path of a module, or a fraction of the model's blocks. What the
            forward draws before it calls that module is the same in all passes; behind it each draws its own.
            That costs the part behind it alone, and the common part gets the gradients of all passes.
        one_mask: within a pass all rows of the batch have the same noise, which is what one of them would
            draw alone. It costs a loop, by a vmap over the rows, or a forward for each row where vmap cannot
            run the model.
        kwargs: for the model's forward.

    Returns:
        The model's own output type (tensor, tuple, dict, ModelOutput), every tensor with a new first
        axis of n; None for a cache of keys and values that `use_cache=True` did not ask for.

    Running statistics of BatchNorm move once for each pass by "loop", and once in all by "shared", which
    refuses a BatchNorm in training where the passes have parted.

    Warns:
        If the model is in eval and the passes are equal.

    Raises:
        InputsError: an input that cannot be repeated, or an output without a value for each pass.
        ModelError: the strategy asked for cannot run this model, or its passes would not be independent.
        NoMatchError: `fork` names no module.
        RateError: n or chunk below 1, or a fraction of the blocks that is not between 0 and 1.

    Example:
        >>> import regraft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
        >>> regraft.stochastic_passes(model, 2, torch.ones(5, 4)).shape
        torch.Size([2, 5, 3])
    """
    outputs = run_passes(
        model,
        model,
        check_count("n", n),
        call_of(model, args, kwargs),
        strategy=strategy,
        chunk=n if chunk is None else check_count("chunk", chunk),
        unbatched=unbatched,
        fork=fork,
        one_mask=one_mask,
    )
    in_eval = n > 1 and not torch.compiler.is_compiling() and not any(m.training for m in model.modules())
    if in_eval and all(bool((x[0] == x[1]).all()) for x in tensors_in(outputs)):
        warnings.warn(
            f"the passes of {type(inner_model(model)[0]).__name__} are equal, for it is in eval: "
            "model.train() for training, regraft.mc_predict for a prediction",
            stacklevel=2,
        )
    return outputs


def multisample_loss(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    samples: int,
    *args: Any,
    strategy: str = "auto",
    chunk: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mean of the losses of several dropout samples over one input.

    With dropout in the head only, which is where the paper puts it, everything before it is computed
    once, and the samples cost no more than the head.

    Args:
        model: as it is, in training.
        loss_fn: the loss of one sample, from what the model returns for it.
        samples: how many.
        args: for the model's forward.
        strategy: see `regraft.stochastic_passes`.
        chunk: likewise.
        kwargs: for the model's forward.

    Raises:
        LossError: the loss is no single number (also a ValueError).

    Source: Inoue 2019, "Multi-Sample Dropout for Accelerated Training and Better Generalization".

    Differs: the variant "multisample" averages the masks instead: before a linear layer that is the mean
        of the logits, whose loss is at most the mean of the losses.

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> y = torch.tensor([0, 2])
        >>> loss = regraft.multisample_loss(
        ...     net, lambda logits: nn.functional.cross_entropy(logits, y), 8, torch.ones(2, 4)
        ... )
        >>> loss.shape
        torch.Size([])
    """
    outputs = stochastic_passes(model, samples, *args, strategy=strategy, chunk=chunk, **kwargs)
    losses = [loss_fn(pass_of(outputs, i)) for i in range(samples)]
    if any(not isinstance(one, Tensor) or one.dim() for one in losses):
        raise LossError("loss_fn gives no single number", remedy="reduce it: reduction='mean'")
    return torch.stack(losses).mean()


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of a forward, also given as one `inputs=`, as `regraft.apply` takes them."""
    inner = inner_model(model)[0]
    if "inputs" not in kwargs or "inputs" in inspect.signature(inner.forward).parameters:
        return args, kwargs
    if args or len(kwargs) > 1:
        raise InputsError(
            "inputs= has all of a forward's arguments, and more are given", where=type(inner).__name__
        )
    made = given_inputs(inner, kwargs["inputs"])
    return made.args, dict(made.kwargs)


def run_passes(
    model: nn.Module,
    forward: Forward,
    n: int,
    call: Call,
    *,
    strategy: str,
    chunk: int | None = None,
    unbatched: Collection[str] = (),
    fork: str | float | Fork | None = None,
    one_mask: bool = False,
) -> Any:
    """What `stochastic_passes` does, by a `forward` of `model` that need not be the model's own.

    Calls that are given one `Fork` have what is drawn in front of it in common.
    """
    check_strategy(strategy)
    inner = inner_model(model)[0]
    if fork is not None:
        if is_compiled(model) or torch.compiler.is_compiling():
            raise ForkError(
                f"fork={fork!r} parts passes in the middle of a forward that is compiled whole",
                remedy="pass the model uncompiled; its blocks may be compiled, each by compile()",
            )
        fork = fork if isinstance(fork, Fork) else Fork(inner, fork_path(inner, fork))
    args, kwargs = call
    path = None if fork is None else fork.path
    inputs = Inputs((args, _without_cache(inner, kwargs)), main_input(inner), unbatched, path)
    with passing(inner):
        passes = _Passes(model, forward, n, min(chunk or n, n), inputs, fork)
        return passes.with_one_mask(strategy) if one_mask else getattr(passes, strategy)()


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """While it runs, `model`'s own forward is one pass."""
    models = _here.__dict__.setdefault("models", [])
    models.append(model)
    try:
        yield
    finally:
        models.pop()


def is_passing(model: nn.Module) -> bool:
    """Whether a pass of `model` is under way in this thread."""
    return any(one is model for one in getattr(_here, "models", ()))


@dataclass
class _Passes:
    """The passes over one input; a method for each strategy."""

    model: nn.Module
    forward: Forward
    n: int
    chunk: int
    inputs: Inputs
    fork: Fork | None
    _analysis: PassAnalysis | None = None

    @property
    def analysis(self) -> PassAnalysis:
        """Asked for once; no `cached_property`, whose lock a compiler does not enter before Python 3.12."""
        if self._analysis is None:
            self._analysis = analysis_of(self.model, self.inputs)
        return self._analysis

    def auto(self) -> Any:
        if self.chunk == 1:  # nothing to share, and nothing to repeat
            return self.loop()
        analysis = self.analysis
        if analysis.no_sharing is None and (self.fork or analysis.cost(self.n, self.chunk) < self.n):
            try:
                return self._by_sharing()
            except (torch.OutOfMemoryError, ForkError):
                raise
            except Exception as error:
                analysis.no_sharing = why(error)
                name = type(self.model).__name__
                log.info("%s: passes share nothing from here on: %s", name, analysis.no_sharing)
        if not self.fork and analysis.why_no_batch(self.model, self.forward, self.inputs) is None:
            try:
                return self._by_repeating()
            except NoBatchAxisError as error:
                analysis.no_batch = error.what
        return self.loop()

    def shared(self) -> Any:
        if self.analysis.no_sharing is not None:
            raise self._cannot("shared", self.analysis.no_sharing)
        try:
            return self._by_sharing()
        except RecomputeError as error:  # switched on since the analysis
            raise self._cannot("shared", str(error)) from error

    def batch(self) -> Any:
        if self.fork is not None:
            raise self._cannot("batch", "its passes part at the inputs, and not at the fork")
        reason = self.analysis.why_no_batch(self.model, self.forward, self.inputs)
        if isinstance(reason, InputsError):
            raise copy.copy(reason)
        if reason is not None:
            raise self._cannot("batch", reason)
        return self._by_repeating()

    def loop(self) -> Any:
        if self.fork is not None:
            _ = self.analysis  # raises where passes cannot part there
        return self._in_chunks(1, self._single)

    def with_one_mask(self, strategy: str) -> Any:
        """A loop of passes whose rows have the same noise."""
        if strategy not in ("auto", "loop"):
            raise self._cannot(strategy, "with one_mask=True passes are made one after the other")
        analysis, batch = self.analysis, self.inputs.batch()
        reason: str | None = None
        if self.fork is not None:
            reason = "each draws anew from the start, and not from a fork"
        elif batch.size > 1:
            reason = analysis.why_dependent(self.model, self.forward, batch)
        if reason is not None:
            raise ModelError(
                f"one_mask=True runs each row of the batch as if it were alone: {reason}",
                remedy="leave it out: each row then has noise of its own",
            )
        if analysis.at_once is None:
            analysis.at_once = shown_at_once(self.model, self.forward, batch)
        run = rows_at_once if analysis.at_once else row_by_row
        return replace(self, forward=lambda *_, **__: run(self.forward, batch)).loop()

    def _single(self, _: int) -> Any:
        """One pass, with a new first axis of 1."""
        with nullcontext() if self.fork is None else self.fork.reached(lambda: None):
            outputs = outputs_of(self.forward, self.inputs.call)
        return tensors_changed(lambda tensor: tensor[None], outputs)

    def _by_sharing(self) -> Any:
        call, analysis = self.inputs.call, self.analysis
        per_pass = modules_of(self.model, analysis.per_pass)

        def shared(size: int) -> Any:
            if is_compiled(self.model):
                return compiled_forward(self.model, size, call, analysis.template)
            with gathered_as_ever(self.model):
                return shared_forward(
                    self.forward, size, call, draws=analysis.draws, per_pass=per_pass, fork=self.fork
                )

        return self._in_chunks(self.chunk, shared)

    def _by_repeating(self) -> Any:
        batch = self.inputs.batch()
        return self._in_chunks(self.chunk, lambda size: repeated_forward(self.forward, size, batch))

    def _in_chunks(self, chunk: int, run: Callable[[int], Any]) -> Any:
        """The passes in forwards of at most `chunk`, along their first axis."""
        return joined([run(min(chunk, self.n - start)) for start in range(0, self.n, chunk)])

    def _cannot(self, strategy: str, reason: str) -> ModelError:
        return ModelError(
            f'strategy="{strategy}" cannot run {type(self.model).__name__}: {reason}',
            remedy='strategy="auto" takes one that can; "loop" can run any model',
        )


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


def check_count(name: str, value: int, least: int = 1) -> int:
    """The count; raises for less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        few = "is not a number of passes" if least == 1 else "passes have no variance"
        raise RateError(f"{name}={value!r} {few}", remedy=f"give {least} or more")
    return value

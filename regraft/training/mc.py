"""Monte Carlo prediction: dropout that stays on in eval, and what its passes disagree about."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import LossError, NoMatchError, nearest
from regraft.find.walk import inner_model
from regraft.graft.apply import grafted
from regraft.graft.insertions import inserted_on
from regraft.planning.plan import Plan, plan
from regraft.training.passes.api import stochastic_passes
from regraft.training.passes.choice import work_of
from regraft.training.rdrop.fields import logits_in
from regraft.training.rdrop.options import TASKS
from regraft.training.rdrop.rdrop_loss import wide

_CHUNK_FLOPS = 4e9
"""With more than this in a batch, a CPU core's caches are full and longer batches cost more, not less. As an
element that an operator writes counts as 16, this bounds the memory too, by a gigabyte."""

_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class MCPrediction:
    """What n stochastic passes say.

    Attributes:
        mean: over the passes: probabilities, or the values of a regression.
        variance: over the passes, of the same.
        entropy: of the mean probabilities, in nats; None for a regression.
        mutual_information: the part of the entropy that comes from the passes disagreeing; likewise.
        n: how many passes.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    n: int


def mc_predict(
    model: nn.Module,
    n: int,
    *args: Any,
    task: str = "classification",
    rules: Any = None,
    strategy: str = "auto",
    chunk: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> MCPrediction:
    """A prediction with its uncertainty, from n passes with dropout on; the model is in eval otherwise.

    The variant "mc" is grafted for the call alone, what `after:` and `before:` rules have inserted drops as
    in training, and every module has its own training flag back afterwards, also after an exception. What
    comes before the first dropout is computed once.

    Args:
        model: any that has dropout with rates above 0.
        n: how many passes.
        args: for the model's forward.
        task: "classification" (softmax over the last axis), "multilabel" (sigmoid) or "regression".
        rules: what to graft instead of `{"Dropout": "mc"}`; `{}` for a model that is grafted already.
        strategy: see `regraft.stochastic_passes`.
        chunk: at most this many passes at once: the memory's bound. The results are added up. By default all
            where nearly everything is shared, else what is fast on the model's device.
        progress: show a bar; by default on a terminal, for more than one chunk.
        kwargs: for the model's forward; `labels` are left out.

    Shape: as one pass's logits; entropy and mutual information without the last axis in classification.

    Raises:
        NoMatchError: the model has no dropout.
        LossError: it has no output called logits, or several.

    Source: Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
        >>> found = regraft.mc_predict(net, 20, torch.ones(2, 4))
        >>> found.mean.shape, found.entropy.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    if task not in TASKS:
        listed = ", ".join(map(repr, TASKS))
        raise LossError(f"task={task!r} is not one of {listed}", remedy=nearest(str(task), TASKS))
    kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    sums = _Sums(task)
    with _in_eval(model), _grafted(model, rules, args, kwargs), torch.no_grad():
        at_once = chunk or _at_once(n, *work_of(model, (args, kwargs)), _on_cpu(model))
        for passes in _bar(_sizes(n, at_once), progress):
            outputs = stochastic_passes(model, passes, *args, strategy=strategy, **kwargs)
            sums.add(logits_in(outputs, None, labelled=False, where=type(model).__name__))
    return sums.prediction()


class _Sums:
    """Mean, variance and entropy of passes that come in chunks, none of which is kept."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.n = 0
        self.mean = self.squares = self.entropies = torch.zeros(())

    def add(self, logits: Tensor) -> None:
        values = self._values(wide(logits))
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.n == 0:
            self.mean, self.squares, self.entropies = mean, squares, self._entropy(values).sum(0)
        else:
            # Two groups' deviations from their means, and of the means from each other: nothing cancels.
            apart = mean - self.mean
            self.squares = self.squares + squares + apart.square() * (self.n * count / (self.n + count))
            self.mean = self.mean + apart * (count / (self.n + count))
            self.entropies = self.entropies + self._entropy(values).sum(0)
        self.n += count

    def prediction(self) -> MCPrediction:
        variance = self.squares / self.n
        if self.task == "regression":
            return MCPrediction(self.mean, variance, None, None, self.n)
        entropy = self._entropy(self.mean)
        # Jensen's inequality makes it 0 or more; rounding need not.
        information = (entropy - self.entropies / self.n).clamp(min=0)
        return MCPrediction(self.mean, variance, entropy, information, self.n)

    def _values(self, logits: Tensor) -> Tensor:
        if self.task == "classification":
            return logits.softmax(-1)
        return logits.sigmoid() if self.task == "multilabel" else logits

    def _entropy(self, values: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(values)
        if self.task == "classification":
            return entropy.sum(-1)
        other: Tensor = torch.special.entr(1 - values)
        return entropy + other


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _grafted(model: nn.Module, rules: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    if rules is not None and not rules:
        yield
        return
    with ExitStack() as stack:
        inserted = rules is None and stack.enter_context(inserted_on(model))
        made = rules if rules is not None else _mc_plan(model, args, kwargs, inserted)
        inputs = None if rules is None else _inputs(model, args, kwargs)
        report = None if made is None else stack.enter_context(grafted(model, made, inputs))
        if report is not None and not (report.grafted or inserted):
            warnings.warn(
                f"no dropout of {report.model} is at a rate above 0, so all passes are equal; "
                "rules={'Dropout': 'mc(p=0.1)'} gives them one",
                stacklevel=4,
            )
        yield


def _mc_plan(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inserted: bool) -> Plan | None:
    """None: the model has no dropout but what is inserted."""
    # Planning runs a probe, and prediction comes batch after batch.
    plans = _plans.setdefault(inner_model(model)[0], {})
    state = (inserted, *((type(module), module.__dict__.get("p")) for module in model.modules()))
    if state not in plans:
        try:
            plans[state] = plan(model, {"Dropout": "mc"}, _inputs(model, args, kwargs))
        except NoMatchError:
            if not inserted:
                raise
            plans[state] = None
    return plans[state]


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    names = list(inspect.signature(inner_model(model)[0].forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _at_once(n: int, prefix: float, flops: float, on_cpu: bool) -> int:
    # With little behind the first draw all passes are cheap together; with more, a chunk costs its prefix
    # again, but stays small enough for the caches.
    if prefix > 0.9:
        return n
    if not on_cpu:
        return 16 if prefix > 0.5 else 8
    # Passes of a small model are mostly calls of operators, which a longer batch shares.
    busy = max(1, int(_CHUNK_FLOPS / max(flops, 1.0)))
    return min(n, max(8, busy) if prefix > 0.2 else busy)


def _on_cpu(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return first is None or first.device.type == "cpu"


def _sizes(n: int, at_once: int) -> list[int]:
    return [min(at_once, n - start) for start in range(0, n, at_once)]


def _bar(sizes: list[int], progress: bool | None) -> Iterable[int]:
    if progress is None:
        progress = len(sizes) > 1 and sys.stderr.isatty()
    if not progress:
        return sizes
    from rich.console import Console
    from rich.progress import track

    return track(sizes, description="Monte Carlo", console=Console(stderr=True), transient=True)

"""Monte Carlo prediction: dropout that stays on in eval, and what its passes disagree about.

Every kind of dropout is sampled by its own law: the modules that drop, or whose forward calls what drops,
are put into training for the call, and no other module is.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import LossError, NoMatchError, nearest
from regraft.find.inspect import inspect as inspect_sites
from regraft.find.walk import inner_model, one_at_a_time
from regraft.graft.apply import grafted
from regraft.graft.classes import Namespace
from regraft.graft.insertions import inserted_on
from regraft.graft.slots import set_graft
from regraft.interrupts import HeldInterrupts
from regraft.libraries import is_of
from regraft.ops import DROP_BLOCK
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.training.passes.analyze import work_of
from regraft.training.passes.api import call_of, check_count, is_passing, passing, run_passes
from regraft.training.passes.fork import Fork, fork_path
from regraft.training.passes.measure import Forward
from regraft.training.passes.nested import Call, leaves, mapped, pass_of, tensors_changed
from regraft.training.rdrop.fields import logits_in, loss_in, parts_of, with_loss
from regraft.training.rdrop.options import TASKS, Key
from regraft.training.rdrop.rdrop_loss import wide

_CHUNK_FLOPS = 4e9
"""With more than this in a batch, a CPU core's caches are full and longer batches cost more, not less. As an
element that an operator writes counts as 16, this bounds the memory too, by a gigabyte."""
_EQUAL = 1e-6  # passes that differ by less than this part of their mean differ by rounding alone
_OUTPUTS = "transformers.modeling_outputs"
_CAUSAL = ("CausalLMOutput", "CausalLMOutputWithPast", "CausalLMOutputWithCrossAttentions")
_LAST = ("TokenClassifierOutput", "MaskedLMOutput", "Seq2SeqLMOutput", *_CAUSAL)
_AXES = {"SemanticSegmenterOutput": 1, **dict.fromkeys(_LAST, -1)}
"""Outputs of Transformers whose logits have more than two axes -> where their classes are."""
_DENSE = "out"
"""What torchvision's segmentation models call their logits, of axes (batch, classes, height, width)."""

_SLOT = Slot("passes", "mc")
_KEY = str(_SLOT)
_sampled: WeakKeyDictionary[nn.Module, dict[Any, list[nn.Module]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class MCPrediction:
    """What n stochastic passes say.

    Attributes:
        mean: over the passes: probabilities, or the values of a regression.
        variance: over the passes, of the same; unbiased (divided by n - 1).
        entropy: of the mean probabilities, in nats; None for a regression.
        mutual_information: the part of the entropy that comes from the passes disagreeing; likewise.
        n: how many passes.
        samples: each pass, on a first axis of n; None unless asked for.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    n: int
    samples: Tensor | None = field(default=None, repr=False)


@one_at_a_time
def mc_predict(
    model: nn.Module,
    n: int,
    *args: Any,
    batches: Iterable[Any] | None = None,
    task: str = "classification",
    class_axis: int | None = None,
    output: Key | None = None,
    samples: bool = False,
    droppath: bool = False,
    rules: Any = None,
    strategy: str = "auto",
    chunk: int | None = None,
    fork: str | float | None = None,
    one_mask: bool = False,
    progress: bool | None = None,
    **kwargs: Any,
) -> MCPrediction:
    """A prediction with its uncertainty, from n passes with dropout on; the model is in eval otherwise.

    Every dropout of the model is sampled by its own law (elements, channels, SELU's, of attention, between
    the layers of an RNN), and so is what regraft has grafted or inserted, of weights too. Training flags are
    as before afterwards, also after an exception. What comes before the first dropout is computed once.

    Args:
        model: any that has dropout with rates above 0.
        n: how many passes, 2 or more.
        args: for the model's forward, as are `kwargs`; or `inputs=` with all of them, as of `regraft.apply`.
        batches: instead of `args`, many inputs: a `DataLoader` or any iterable of dicts (without their
            labels), tensors, or tuples, whose first is the input. They are moved to the model's device, and
            the results to the CPU, along the first axis.
        task: "classification" (softmax), "multilabel" or "binary" (sigmoid), or "regression".
        class_axis: of one pass; 1 for (batch, classes, height, width). By default the last of two axes, and
            known for segmentation and language models of Transformers and torchvision; else asked for.
        output: which output, by name or position; by default the one called logits, or the only one.
        samples: keep each pass in `.samples`.
        droppath: sample drop-path (stochastic depth) and DropBlock as well.
        rules: graft this for the call, and sample it alone; `{}` samples what regraft has grafted alone.
        strategy: see `regraft.stochastic_passes`.
        chunk: at most this many passes at once: the memory's bound. The results are added up. By default all
            where nearly everything is shared, else what is fast on the model's device.
        fork: where the passes part, see `regraft.stochastic_passes`: what is drawn before is the same in
            all, and its variance is left out.
        one_mask: within a pass all rows of the batch have the same noise, see `regraft.stochastic_passes`.
        progress: show a bar; by default on a terminal, for more than one chunk or batch.
        kwargs: for the model's forward; `labels` are left out.

    Shape: as one pass's logits; entropy and mutual information without the class axis in classification.

    Raises:
        NoMatchError: the model has no dropout.
        LossError: it has no such output, or it is not clear on which axis its classes are.
        RateError: n below 2.

    Warns:
        If all passes are equal.

    Source: Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
        >>> prediction = regraft.mc_predict(net, 20, torch.ones(2, 4))
        >>> prediction.mean.shape, prediction.entropy.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    check_count("n", n, 2)
    reading = Reading(task, class_axis, output)

    def predict(call: Call, shown: bool | None) -> MCPrediction:
        call = call[0], {name: value for name, value in call[1].items() if name != "labels"}
        root = inner_model(model)[0]
        # One fork for all chunks, so that they have what is drawn in front of it in common too.
        parted = None if fork is None else Fork(root, fork_path(root, fork))
        sums = _Sums(reading, samples)
        with torch.no_grad(), sampling(model, call, rules, droppath):
            work = work_of(model, call, None if parted is None else parted.path)
            at_once = chunk or _at_once(n, *work, next(model.parameters(), torch.empty(0)).is_cpu)
            sizes = [min(at_once, n - start) for start in range(0, n, at_once)]
            for size in _bar(sizes, len(sizes), shown):
                outputs = run_passes(
                    model, model, size, call, strategy=strategy, fork=parted, one_mask=one_mask
                )
                sums.add(*reading.logits(outputs, type(model).__name__))
        return sums.prediction()

    if batches is None:
        result = predict(call_of(model, args, kwargs), progress)
    else:
        count = len(batches) if isinstance(batches, Sized) else None
        every = _bar(_calls(batches, model, kwargs), count, progress)
        done = [tensors_changed(Tensor.cpu, predict(call, False)) for call in every]
        if not done:
            raise LossError("there are no batches to predict", where="batches")
        result = mapped(_joined, "", *done)
    if result.variance.max() <= (_EQUAL * result.mean.abs().max()) ** 2:
        warnings.warn(
            f"all passes of {type(inner_model(model)[0]).__name__} are equal: none of its dropouts at a rate "
            "above 0 has run; rules={'Dropout': 'mc(p=0.1)'} gives them a rate, droppath=True samples "
            "drop-paths too",
            stacklevel=3,
        )
    return result


@dataclass(frozen=True)
class Reading:
    """How an output is read: which it is, what it means, and where its classes are."""

    task: str = "classification"
    class_axis: int | None = None
    output: Key | None = None

    def __post_init__(self) -> None:
        known = (*TASKS, "binary")
        if self.task not in known:
            raise LossError(
                f"task={self.task!r} is not one of {', '.join(map(repr, known))}",
                remedy=nearest(str(self.task), known),
            )

    def logits(self, outputs: Any, where: str) -> tuple[Tensor, int]:
        """The output of all passes, and its class axis, counted from the last (0 if it has none)."""
        key = self.output
        if key is None and not isinstance(outputs, Tensor):
            parts = parts_of(outputs)
            tensors = [k for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point()]
            key = next((k for k in ("logits", _DENSE) if k in tensors), None)
            key = tensors[0] if key is None and len(tensors) == 1 else key
        try:
            logits = logits_in(outputs, key, labelled=False)
        except LossError as error:
            names = ", ".join(repr(name) for name in parts_of(outputs)) or type(outputs).__name__
            raise LossError(
                f"{where} has no output called logits: it gives {names}",
                remedy=f"name it: output={next(iter(parts_of(outputs)), 0)!r}",
            ) from error
        return logits, self._axis(outputs, logits, key) if self.task == "classification" else 0

    def _axis(self, outputs: Any, logits: Tensor, key: Key | None) -> int:
        axes = logits.dim() - 1
        axis = self.class_axis
        if axis is None and key == _DENSE and axes == 4:
            axis = 1
        elif axis is None:
            known = (at for cls, at in _AXES.items() if is_of(outputs, _OUTPUTS, cls))
            axis = -1 if axes == 2 else next(known, None)
        if axis is not None and axis >= 0:
            axis -= axes
        if axes < 2 or (axis is not None and logits.shape[axis] == 1):
            raise LossError(
                f"outputs of shape {tuple(logits.shape[1:])} are no classes: there is one value for each",
                remedy='task="binary" for yes or no, task="regression" for values',
            )
        if axis is None:
            raise LossError(
                f"outputs of shape {tuple(logits.shape[1:])}: on which axis are the classes?",
                remedy="class_axis=1 for (batch, classes, height, width), class_axis=-1 for the last",
            )
        return axis


class _Sums:
    """Mean, variance and entropy of passes that come in chunks, none of which is kept unless asked for."""

    def __init__(self, reading: Reading, samples: bool) -> None:
        self.task = reading.task
        self.n = self.axis = 0
        self.kept: list[Tensor] | None = [] if samples else None
        self.mean = self.squares = self.entropies = torch.zeros(())

    def add(self, logits: Tensor, axis: int) -> None:
        self.axis = axis
        values = wide(logits)
        if self.task != "regression":
            values = values.softmax(axis) if self.task == "classification" else values.sigmoid()
        if self.kept is not None:
            self.kept.append(values)
        count, mean = len(values), values.mean(0)
        # Two groups' deviations from their means, and of the means from each other: nothing cancels.
        apart = mean - self.mean
        squares = (values - mean).square().sum(0) + apart.square() * (self.n * count / (self.n + count))
        self.squares = self.squares + squares
        self.mean = self.mean + apart * (count / (self.n + count))
        self.entropies = self.entropies + self._entropy(values).sum(0)
        self.n += count

    def prediction(self) -> MCPrediction:
        variance = self.squares / (self.n - 1)
        kept = None if self.kept is None else torch.cat(self.kept)
        if self.task == "regression":
            return MCPrediction(self.mean, variance, None, None, self.n, kept)
        entropy = self._entropy(self.mean)
        # Jensen's inequality makes it 0 or more; rounding need not.
        information = (entropy - self.entropies / self.n).clamp(min=0)
        return MCPrediction(self.mean, variance, entropy, information, self.n, kept)

    def _entropy(self, values: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(values)
        if self.task == "classification":
            return entropy.sum(self.axis)
        return entropy + torch.special.entr(1 - values)  # type: ignore[no-any-return]


@contextmanager
def sampling(model: nn.Module, call: Call, rules: Any = None, droppath: bool = False) -> Iterator[None]:
    """The model in eval, and what drops in it, and nothing else, in training."""
    root, _ = inner_model(model)
    with HeldInterrupts() as held:
        flags = [(module, module.training) for module in model.modules()]
        try:
            with held.released(), ExitStack() as stack:
                model.eval()
                if rules:
                    report = stack.enter_context(grafted(model, rules, _inputs(root, call)))
                    chosen = {root.get_submodule(edit.path) for edit in report.grafted}
                else:
                    inserted = stack.enter_context(inserted_on(model))
                    chosen = {module for module in root.modules() if _is_made_stochastic(module)}
                    if rules is None:
                        chosen |= set(_found(root, call, droppath, others=bool(chosen) or inserted))
                for module in root.modules():
                    # In eval one around them would run a fused kernel instead of them.
                    fused = isinstance(module, nn.TransformerEncoderLayer)
                    if module in chosen or (fused and not chosen.isdisjoint(module.modules())):
                        module.training = True
                yield
        finally:
            for module, training in flags:
                module.training = training


def _is_made_stochastic(module: nn.Module) -> bool:
    """Whether a graft does so; insertions and drop-paths are sampled otherwise."""
    return any(
        graft.variant and graft.slot.kind != "insert" and graft.edit.get("family") != "DropPath"
        for graft in grafts_of(module).values()
    )


def _found(root: nn.Module, call: Call, droppath: bool, *, others: bool) -> list[nn.Module]:
    """Modules that drop, or whose forward does: a probe, once for a model as it stands."""
    known = _sampled.setdefault(root, {})
    key = droppath, _state(root, call)
    if key not in known:
        sites = inspect_sites(root, _inputs(root, call)).sites
        noise = [site for site in sites if site.family in ("Dropout", "DropPath")]
        if not noise and not others:
            raise NoMatchError(
                f"{type(root).__name__} has no dropout",
                remedy="rules={'before:Linear@head': 'dropout(p=0.1)'} inserts one for the call",
            )
        known[key] = [
            site.module
            for site in noise
            if site.kind in ("module", "call")
            and site.p != 0
            and site.calls != 0
            and (droppath or not (site.family == "DropPath" or site.op == DROP_BLOCK))
        ]
    return known[key]


def _state(root: nn.Module, call: Call) -> Any:
    """What the sites and their rates depend on: all numbers that modules and their configurations hold."""

    def numbers(owner: Any) -> tuple[Any, ...]:
        held = owner.__dict__.items()
        return tuple((name, value) for name, value in held if isinstance(value, (int, float, str)))

    configs = {
        id(c): numbers(c) for m in root.modules() if hasattr(c := m.__dict__.get("config"), "__dict__")
    }
    modules = tuple((type(module), numbers(module), len(grafts_of(module))) for module in root.modules())
    inputs = tuple(
        (name, tuple(leaf.shape[1:]) if isinstance(leaf, Tensor) else repr(leaf))
        for name, leaf in leaves("", call)
    )
    return modules, tuple(configs.values()), inputs


def _inputs(root: nn.Module, call: Call) -> Any:
    args, kwargs = call
    if not kwargs:
        return args
    return {**dict(zip(inspect.signature(root.forward).parameters, args, strict=False)), **kwargs}


def _calls(batches: Iterable[Any], model: nn.Module, kwargs: dict[str, Any]) -> Iterator[Call]:
    """The calls of the batches, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        if isinstance(batch, Mapping):
            call: Call = (), {**kwargs, **batch}
        else:
            call = (batch[0] if isinstance(batch, (tuple, list)) else batch,), kwargs
        yield tensors_changed(lambda tensor: tensor.to(device), call)


def _joined(name: str, *parts: Any) -> Any:
    return torch.cat(parts, int(name == "samples")) if isinstance(parts[0], Tensor) else parts[0]


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


def _bar(items: Iterable[Any], total: int | None, progress: bool | None) -> Iterable[Any]:
    if progress is None:
        progress = sys.stderr.isatty() and total != 1
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description="Monte Carlo", total=total, console=Console(stderr=True), transient=True)


def mc_eval(
    model: nn.Module,
    n: int,
    *,
    task: str = "classification",
    class_axis: int | None = None,
    droppath: bool = False,
    strategy: str = "auto",
    chunk: int | None = None,
) -> nn.Module:
    """Graft a model so that in eval, without gradients, it predicts by n stochastic passes.

    Its logits are then those of the mean prediction: the logarithm of the mean probabilities
    (classification), the logit of the mean rate ("multilabel", "binary"), or the mean ("regression"). Its
    loss is the mean of the passes' losses. Training is as before; `regraft.revert(model)` undoes it.

    `model` returns logits, and is returned; the options are those of `regraft.mc_predict`.
    """
    check_count("n", n, 2)
    root, _ = inner_model(model)
    passes = _MonteCarlo(n, Reading(task, class_axis), droppath, strategy, chunk)
    set_graft(root, _SLOT, Graft(_SLOT, Layer(mc_layer), options={"passes": passes}))
    return model


def without_mc(model: nn.Module) -> nn.Module:
    """The model that evaluates by one pass; its other grafts stay."""
    root, _ = inner_model(model)
    if _KEY in grafts_of(root):
        set_graft(root, _SLOT, None)
    return model


def mc_layer(base: type[nn.Module]) -> Namespace:
    """The layer of Monte Carlo prediction."""
    own = base.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graft: Graft | None = (self.__dict__.get(RECORD) or {}).get(_KEY)
        if graft is None or self.training or torch.is_grad_enabled() or is_passing(self):
            return own(self, *args, **kwargs)
        passes: _MonteCarlo = graft.options["passes"]
        return passes.forward(self, functools.partial(own, self), (args, kwargs))

    return {"forward": forward}


@dataclass
class _MonteCarlo:
    n: int
    reading: Reading
    droppath: bool
    strategy: str
    chunk: int | None
    warned: bool = False

    def forward(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        if call[1].get("past_key_values") is not None or call[1].get("use_cache"):
            raise LossError(
                "a cache of keys and values is of one pass: Monte Carlo prediction cannot generate",
                remedy="regraft.revert(model) before model.generate",
            )
        with passing(model), sampling(model, call, None, self.droppath):
            outputs = run_passes(model, forward, self.n, call, strategy=self.strategy, chunk=self.chunk)
        logits, axis = self.reading.logits(outputs, type(model).__name__)
        if not self.warned and torch.equal(logits[0], logits[1]):
            self.warned = True
            warnings.warn(
                f"the passes of {type(model).__name__} are equal: no dropout at a rate above 0 runs",
                stacklevel=2,
            )
        mean = _mean_logits(wide(logits), self.reading.task, axis)
        if isinstance(outputs, Tensor):
            return mean
        loss = loss_in(outputs, "loss", dims=1)
        key = next(key for key, value in parts_of(outputs).items() if value is logits)
        result = with_loss(pass_of(outputs, 0), mean, key, labelled=True)
        return result if loss is None else with_loss(result, loss.mean(), "loss", labelled=True)


def _mean_logits(logits: Tensor, task: str, axis: int) -> Tensor:
    if task == "classification":
        return logits.log_softmax(axis).logsumexp(0) - math.log(len(logits))
    if task == "regression":
        return logits.mean(0)
    mean: Tensor = torch.special.logit(logits.sigmoid().mean(0), eps=torch.finfo(logits.dtype).eps)
    return mean

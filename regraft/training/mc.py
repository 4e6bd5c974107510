"""Monte Carlo prediction: dropout that stays on in eval, and what its passes disagree about.

Every kind of dropout is sampled by its own law: the modules that drop, or whose forward calls what drops,
are put into training for the call, and no other module is.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regraft.errors import LossError, NoMatchError, RateError, nearest
from regraft.find.inspect import inspect as inspect_sites
from regraft.find.walk import inner_model, one_at_a_time
from regraft.graft.apply import grafted
from regraft.graft.insertions import inserted_on
from regraft.interrupts import HeldInterrupts
from regraft.libraries import is_of
from regraft.ops import DROP_BLOCK
from regraft.record import grafts_of
from regraft.training.passes.analyze import work_of
from regraft.training.passes.api import call_of, check_strategy, run_passes
from regraft.training.passes.fork import Fork, fork_path
from regraft.training.passes.nested import leaves, mapped
from regraft.training.rdrop.fields import logits_in, parts_of
from regraft.training.rdrop.options import TASKS, Key
from regraft.training.rdrop.rdrop_loss import wide

_CHUNK_FLOPS = 4e9
"""With more than this in a batch, a CPU core's caches are full and longer batches cost more, not less. As an
element that an operator writes counts as 16, this bounds the memory too, by a gigabyte."""
_EQUAL = 1e-6
"""Passes that differ by less than this part of their mean differ by rounding alone."""
_OUTPUTS = "transformers.modeling_outputs"
_AXES = {
    "SemanticSegmenterOutput": 1,
    "TokenClassifierOutput": -1,
    "MaskedLMOutput": -1,
    "CausalLMOutput": -1,
    "CausalLMOutputWithPast": -1,
    "CausalLMOutputWithCrossAttentions": -1,
    "Seq2SeqLMOutput": -1,
}
"""Outputs of Transformers whose logits have more than two axes -> where their classes are."""
_DENSE = "out"
"""What torchvision's segmentation models call their logits, of axes (batch, classes, height, width)."""

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
    progress: bool | None = None,
    **kwargs: Any,
) -> MCPrediction:
    """A prediction with its uncertainty, from n passes with dropout on; the model is in eval otherwise.

    Every dropout of the model is sampled by its own law (elements, channels, SELU's, of attention, between
    the layers of an RNN), and so is what regraft has grafted or inserted, of weights too. Each module has
    its own training flag back afterwards, also after an exception. What comes before the first dropout is
    computed once.

    Args:
        model: any that has dropout with rates above 0.
        n: how many passes, 2 or more.
        args: for the model's forward, as are `kwargs`; or `inputs=` with all of them, as of `regraft.apply`.
        batches: instead of `args`, many inputs: a `DataLoader` or any iterable of dicts (their labels are
            left out), tensors, or tuples, whose first is the input. They are moved to the model's device;
            the results are joined along the first axis, on the CPU.
        task: "classification" (softmax), "multilabel" or "binary" (sigmoid), or "regression".
        class_axis: of one pass; 1 for (batch, classes, height, width). By default the last of two axes, and
            known for the segmentation and language models of Transformers and torchvision; else asked for.
        output: which output, by name or position; by default the one called logits, or the only one.
        samples: keep each pass in `.samples`.
        droppath: sample drop-path (stochastic depth) and DropBlock as well.
        rules: graft this for the call, and sample it alone; `{}` samples what regraft has grafted alone.
        strategy: see `regraft.stochastic_passes`.
        chunk: at most this many passes at once: the memory's bound. The results are added up. By default all
            where nearly everything is shared, else what is fast on the model's device.
        fork: where the passes part, see `regraft.stochastic_passes`: what is drawn before is the same in
            all, and its variance is left out.
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
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise RateError(f"n={n!r} passes have no variance", remedy="give 2 or more")
    check_strategy(strategy)
    reading = Reading(task, class_axis, output)
    calls = [call_of(model, args, kwargs)] if batches is None else _calls(batches, model, kwargs)
    done: list[MCPrediction] = []
    sampler = Sampler(model, rules, droppath)
    with torch.no_grad():
        for given in _bar(calls, False if batches is None else progress):
            call = given[0], {name: value for name, value in given[1].items() if name != "labels"}
            with sampler.on(call):
                shown = progress if batches is None else False
                passes = {"strategy": strategy, "fork": fork}
                prediction = _predict(model, n, call, reading, samples, passes, chunk, shown)
            done.append(prediction if batches is None else mapped(_to_cpu, "", prediction))
    if not done:
        raise LossError("there are no batches to predict", where="batches")
    result = done[0] if len(done) == 1 else _joined(done)
    _warn_if_equal(model, result)
    return result


def _predict(
    model: nn.Module,
    n: int,
    call: Any,
    reading: Reading,
    samples: bool,
    options: dict[str, Any],
    chunk: int | None,
    progress: bool | None,
) -> MCPrediction:
    root = inner_model(model)[0]
    # One fork for all chunks, so that they have what is drawn in front of it in common too.
    path = None if options["fork"] is None else fork_path(root, options["fork"])
    options = {**options, "fork": None if path is None else Fork(root, path)}
    sums = _Sums(reading, samples)
    at_once = chunk or _at_once(n, *work_of(model, call, path), _on_cpu(model))
    for passes in _bar(_sizes(n, at_once), progress):
        outputs = run_passes(model, model, passes, call, chunk=passes, **options)
        sums.add(*reading.logits(outputs, type(model).__name__))
    return sums.prediction()


@dataclass(frozen=True)
class Reading:
    """How an output is read: which it is, what it means, and where its classes are."""

    task: str = "classification"
    class_axis: int | None = None
    output: Key | None = None

    def __post_init__(self) -> None:
        if self.task not in (*TASKS, "binary"):
            known = (*TASKS, "binary")
            raise LossError(
                f"task={self.task!r} is not one of {', '.join(map(repr, known))}",
                remedy=nearest(str(self.task), known),
            )

    def logits(self, outputs: Any, where: str) -> tuple[Tensor, int]:
        """The output of all passes, and its class axis (0 if it has none)."""
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
        if axis is None:
            known = (at for cls, at in _AXES.items() if is_of(outputs, _OUTPUTS, cls))
            axis = -1 if axes == 2 else next(known, None)
        if axis is None and key == _DENSE and axes == 4:
            axis = 1
        if axes < 2 or (axis is not None and logits.shape[axis + 1 if axis >= 0 else axis] == 1):
            raise LossError(
                f"outputs of shape {tuple(logits.shape[1:])} are no classes: there is one value for each",
                remedy='task="binary" for yes or no, task="regression" for values',
            )
        if axis is None:
            raise LossError(
                f"outputs of shape {tuple(logits.shape[1:])}: on which axis are the classes?",
                remedy="class_axis=1 for (batch, classes, height, width), class_axis=-1 for the last",
            )
        return axis + 1 if axis >= 0 else axis


class _Sums:
    """Mean, variance and entropy of passes that come in chunks, none of which is kept unless asked for."""

    def __init__(self, reading: Reading, samples: bool) -> None:
        self.task = reading.task
        self.n = self.axis = 0
        self.kept: list[Tensor] | None = [] if samples else None
        self.mean = self.squares = self.entropies = torch.zeros(())

    def add(self, logits: Tensor, axis: int) -> None:
        self.axis = axis
        values = self._values(wide(logits))
        if self.kept is not None:
            self.kept.append(values)
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.n == 0:
            self.mean, self.squares, self.entropies = mean, squares, self._entropy(values, 0).sum(0)
        else:
            # Two groups' deviations from their means, and of the means from each other: nothing cancels.
            apart = mean - self.mean
            self.squares = self.squares + squares + apart.square() * (self.n * count / (self.n + count))
            self.mean = self.mean + apart * (count / (self.n + count))
            self.entropies = self.entropies + self._entropy(values, 0).sum(0)
        self.n += count

    def prediction(self) -> MCPrediction:
        variance = self.squares / (self.n - 1)
        kept = None if self.kept is None else torch.cat(self.kept)
        if self.task == "regression":
            return MCPrediction(self.mean, variance, None, None, self.n, kept)
        entropy = self._entropy(self.mean, 1)
        # Jensen's inequality makes it 0 or more; rounding need not.
        information = (entropy - self.entropies / self.n).clamp(min=0)
        return MCPrediction(self.mean, variance, entropy, information, self.n, kept)

    def _values(self, logits: Tensor) -> Tensor:
        if self.task == "classification":
            return logits.softmax(self.axis)
        return logits if self.task == "regression" else logits.sigmoid()

    def _entropy(self, values: Tensor, fewer: int) -> Tensor:
        """Of values that have so many axes fewer than the passes' logits."""
        entropy: Tensor = torch.special.entr(values)
        if self.task == "classification":
            return entropy.sum(self.axis - fewer if self.axis > 0 else self.axis)
        other: Tensor = torch.special.entr(1 - values)
        return entropy + other


class Sampler:
    """Puts what drops in a model into training, and nothing else, for the length of a block."""

    def __init__(self, model: nn.Module, rules: Any = None, droppath: bool = False) -> None:
        self.model, self.rules, self.droppath = model, rules, droppath

    @contextmanager
    def on(self, call: Any) -> Iterator[None]:
        """The model in eval, with its dropouts on."""
        root, _ = inner_model(self.model)
        with HeldInterrupts() as held:
            flags = [(module, module.training) for module in self.model.modules()]
            try:
                with held.released(), ExitStack() as stack:
                    self.model.eval()
                    for module in _with_fast_paths(root, self._sampled(stack, root, call)):
                        module.training = True
                    yield
            finally:
                for module, training in flags:
                    module.training = training

    def _sampled(self, stack: ExitStack, root: nn.Module, call: Any) -> list[nn.Module]:
        """The modules to put into training; what is grafted for the block leaves with the stack."""
        if self.rules:
            report = stack.enter_context(grafted(self.model, self.rules, _inputs(root, call)))
            return [root.get_submodule(edit.path) for edit in report.grafted]
        inserted = stack.enter_context(inserted_on(self.model))
        modules = _grafted_modules(root)
        if self.rules is None:
            modules = [*modules, *self._found(root, call, bool(modules) or inserted)]
        return modules

    def _found(self, root: nn.Module, call: Any, others: bool) -> list[nn.Module]:
        """Modules that drop, or whose forward does."""
        # Finding them runs a probe, and prediction comes batch after batch.
        known = _sampled.setdefault(root, {})
        key = self.droppath, _state(root, call)
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
                and (self.droppath or not (site.family == "DropPath" or site.op == DROP_BLOCK))
            ]
        return known[key]


def _grafted_modules(root: nn.Module) -> list[nn.Module]:
    """Modules that a graft makes stochastic, but for insertions and drop-paths."""
    return [
        module
        for module in root.modules()
        for graft in grafts_of(module).values()
        if graft.variant and graft.slot.kind != "insert" and graft.edit.get("family") != "DropPath"
    ]


def _with_fast_paths(root: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """The modules, and those around them that in eval would run a fused kernel instead of them."""
    chosen = set(modules)
    around = [
        module
        for module in root.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and not chosen.isdisjoint(module.modules())
    ]
    return [*modules, *around]


def _state(root: nn.Module, call: Any) -> Any:
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


def _inputs(root: nn.Module, call: Any) -> Any:
    args, kwargs = call
    if not kwargs:
        return args
    names = list(inspect.signature(root.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _calls(batches: Iterable[Any], model: nn.Module, kwargs: dict[str, Any]) -> Iterable[Any]:
    """The calls of the batches, as many as they say."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(_: str, leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    class Calls:
        def __iter__(self) -> Iterator[Any]:
            for batch in batches:
                if isinstance(batch, Mapping):
                    yield (), {**kwargs, **mapped(moved, "", dict(batch))}
                else:
                    first = batch[0] if isinstance(batch, (tuple, list)) else batch
                    yield (moved("", first),), kwargs

        def __len__(self) -> int:
            return len(batches)  # type: ignore[arg-type]

    return Calls()


def _to_cpu(_: str, leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _joined(done: list[MCPrediction]) -> MCPrediction:
    def join(name: str) -> Any:
        parts = [getattr(each, name) for each in done]
        return None if parts[0] is None else torch.cat(parts, dim=1 if name == "samples" else 0)

    names = ("mean", "variance", "entropy", "mutual_information", "samples")
    return MCPrediction(n=done[0].n, **{name: join(name) for name in names})


def _warn_if_equal(model: nn.Module, result: MCPrediction) -> None:
    if result.variance.max() > (_EQUAL * result.mean.abs().max()) ** 2:
        return
    name = type(inner_model(model)[0]).__name__
    warnings.warn(
        f"all passes of {name} are equal: none of its dropouts at a rate above 0 has run; "
        "rules={'Dropout': 'mc(p=0.1)'} gives them a rate, droppath=True samples drop-paths too",
        stacklevel=4,
    )


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


def _bar(items: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    if progress is None:
        several = not isinstance(items, list) or len(items) > 1
        progress = sys.stderr.isatty() and several
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sized) else None
    return track(items, description="Monte Carlo", total=total, console=Console(stderr=True), transient=True)

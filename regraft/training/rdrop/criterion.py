"""`regraft.rdrop_criterion`: R-Drop for a loss outside the model; `loss = criterion(model(x), y)` stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError, ModelError
from regraft.find.walk import inner_model
from regraft.training.passes.nested import leaves, mapped
from regraft.training.passes.outputs import pass_of
from regraft.training.rdrop.criteria import Reading, read_criterion
from regraft.training.rdrop.fields import logits_in
from regraft.training.rdrop.layer import Call, Forward, arm, armed
from regraft.training.rdrop.options import Key, RDropOptions
from regraft.training.rdrop.rdrop import (
    criterion_divergence,
    mean_loss,
    passes_of,
    warn_of_no_noise,
)
from regraft.training.rdrop.rdrop_loss import RDropTerms


def rdrop_criterion(
    model: nn.Module,
    criterion: Callable[..., Any],
    alpha: float = 1.0,
    passes: int = 2,
    *,
    logits: Key | None = None,
    task: str | None = None,
    ce: str = "mean",
    reduction: str = "batchmean",
    shift: bool = False,
    ignore_index: int = -100,
    class_axis: int | None = None,
    consistency: str = "labelled",
    strategy: str = "auto",
    chunk: int | None = None,
    fork: str | float | None = None,
    inputs: Any = None,
) -> RDropCriterion:
    """A criterion with which a loop trains by R-Drop: `loss = criterion(model(x), y)` stays as it is.

    In training the model makes several passes and returns the first, in its ordinary type and shape. The
    criterion fetches the others, averages the losses of all and adds alpha * the KL. In eval, and without
    gradients, both are what they were. `regraft.revert(model)` undoes it.

    What the criterion is given must be what the model returned, or a part of it, at most reshaped or cast;
    anything else belongs into the criterion: `lambda outputs, y: loss(outputs.float().log_softmax(-1), y)`.

    Args:
        model: as it is trained; DDP and compiled wrappers are looked into.
        criterion: the loss of one pass, from the model's outputs and whatever else it takes.
        alpha: weight of the KL between the passes.
        passes: how many.
        logits: where the model returns several tensors, the one to compare, by name or position.
        task: what the logits mean, for a criterion that is not one of torch's or timm's: "classification",
            "multilabel" or "regression".
        ce: "mean" or "sum", see `regraft.rdrop_loss`.
        reduction: of the KL, see `regraft.rdrop_loss`.
        shift: position t predicts label t + 1.
        ignore_index: positions with this label do not count in the KL; read from a known criterion.
        class_axis: of one pass; read from a known criterion.
        consistency: "all" lets positions without a label count in the KL.
        strategy: of the passes, see `regraft.stochastic_passes`.
        chunk: of the passes, likewise.
        fork: of the passes, likewise.
        inputs: for the look at which dropouts run, see `regraft.inspect`.

    Returns:
        A module that holds `criterion`; `.terms` are the two terms of the last step. The model is not one
        of its submodules.

    Raises:
        LossError: a criterion that is not known, without `task=`; in training, passes that were not
            fetched before the next forward, or outputs that are not the model's.
        ModelError: `nn.DataParallel`.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3))
        >>> criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), alpha=1.0)
        >>> loss = criterion(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.shape
        torch.Size([])
    """
    if not callable(criterion):
        raise LossError(
            f"criterion is a {type(criterion).__name__}, not a function of outputs and labels",
            remedy="criterion = rdrop_criterion(model, nn.CrossEntropyLoss()), once, before training",
        )
    if isinstance(model, nn.DataParallel):
        raise _data_parallel()
    options = RDropOptions(
        alpha=alpha,
        passes=passes,
        criterion=criterion,
        logits=logits,
        task=task,
        ce=ce,
        reduction=reduction,
        shift=shift,
        ignore_index=ignore_index,
        class_axis=class_axis,
        consistency=consistency,
        strategy=strategy,
        chunk=chunk,
        fork=fork,
    )
    if reduction == "none":
        raise LossError('a model trains on one number: reduction is "batchmean" or "sum"')
    reading = read_criterion(criterion, options) if alpha else None
    warn_of_no_noise(model, alpha, inputs)
    root, _ = inner_model(model)
    state = KeptPasses(options)
    arm(root, state, options.fork)
    return RDropCriterion(root, criterion, state, reading)


def _data_parallel() -> ModelError:
    return ModelError(
        "nn.DataParallel runs copies of the model in threads, whose passes no criterion could fetch",
        where="nn.DataParallel",
        remedy="use DistributedDataParallel",
    )


class KeptPasses:
    """The passes of one training forward, kept until the criterion fetches them."""

    def __init__(self, options: RDropOptions) -> None:
        self.options = options
        self.reached = False
        self.first: Any = None
        self.stacked: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "first": None, "stacked": None}  # graphs can be neither copied nor pickled

    def before_tracing(self, *_: Any) -> None:
        """Nothing is to be learnt."""

    def forward(self, model: nn.Module, forward: Forward, call: Call) -> Any:
        """The first pass; in eval and without gradients the model's own forward."""
        self.reached = True
        args, kwargs = call
        if not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if getattr(model, "_is_replica", False):
            raise _data_parallel()
        if self.stacked is not None:
            self.fetch()
            raise LossError(
                "the passes of the training forward before were never fetched: it would have trained plain",
                where=f"{type(model).__name__} grafted by regraft.rdrop_criterion",
                remedy="compute the loss with the criterion that rdrop_criterion returned, once after each "
                "forward; forwards that train nothing go under torch.no_grad()",
            )
        self.stacked = passes_of(model, forward, call, self.options)
        self.first = pass_of(self.stacked, 0)
        return self.first

    def fetch(self) -> tuple[Any, Any]:
        """The first pass and all of them; they are kept no longer."""
        kept = self.first, self.stacked
        self.first = self.stacked = None
        return kept


class RDropCriterion(nn.Module):
    """What `rdrop_criterion` returns.

    Attributes:
        terms: the task's loss and the KL of the last step.
    """

    def __init__(
        self, model: nn.Module, criterion: Callable[..., Any], passes: KeptPasses, reading: Reading | None
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.reading, self.terms = reading, None
        self.__dict__["_model"] = model  # no submodule: its parameters are not the criterion's
        self.__dict__["_passes"] = passes

    terms: RDropTerms | None

    def forward(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The R-Drop loss in training; the criterion of the outputs otherwise."""
        model, passes = self.__dict__["_model"], armed(self.__dict__["_model"])
        trains = model.training and torch.is_grad_enabled() and _has_gradient(outputs)
        if not trains:
            return self.criterion(outputs, *args, **kwargs)  # type: ignore[no-any-return]
        if not isinstance(passes, KeptPasses):
            raise LossError(
                "the model is no longer grafted with R-Drop, and its criterion still is",
                where=f"{type(model).__name__}",
                remedy="train plain with the criterion itself: criterion.criterion",
            )
        if passes.stacked is None:
            raise LossError(
                "there are no passes to fetch: these outputs do not come from the last training forward",
                where=f"{type(model).__name__} grafted by regraft.rdrop_criterion",
                remedy="call the criterion once after each forward; a second loss goes into one criterion: "
                "lambda outputs, y: first(outputs, y) + second(outputs, y)",
            )
        options = passes.options
        first, stacked = passes.fetch()
        every = _of_all_passes(outputs, first, stacked)
        others = [pass_of(every, i) for i in range(1, options.passes)]
        task = mean_loss([self.criterion(each, *args, **kwargs) for each in (outputs, *others)], options)
        kl = torch.zeros_like(task)
        if self.reading is not None:
            key = options.logits if not isinstance(outputs, Tensor) else None
            assert not isinstance(key, tuple)
            logits = logits_in(every, key, labelled=False)
            labels = args[0] if args else kwargs.get("labels")
            kl = criterion_divergence(logits, labels, self.reading, options, kwargs.get("num_items_in_batch"))
        self.terms = RDropTerms(task.detach(), kl.detach())
        return options.loss_of(task, kl)


def _has_gradient(outputs: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf in leaves("", outputs))


def _of_all_passes(given: Any, first: Any, stacked: Any) -> Any:
    """What the criterion was given, of all passes: each tensor is found among the outputs of the first."""
    pairs = [
        (leaf, whole)
        for (_, leaf), (_, whole) in zip(leaves("", first), leaves("", stacked), strict=True)
        if isinstance(leaf, Tensor)
    ]

    def find(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for output, whole in pairs:
            if _is_same(leaf, output):
                return whole.reshape(len(whole), *leaf.shape).to(leaf.dtype)
        raise LossError(
            "the criterion was given something else than the model returned: what are its other passes?",
            where=name or f"a tensor of shape {tuple(leaf.shape)}",
            remedy="give it the model's outputs, at most reshaped or cast, and do the rest inside: "
            "rdrop_criterion(model, lambda outputs, y: criterion(change(outputs), y))",
        )

    return mapped(find, "", given)


_KEEPS_VALUES = frozenset(
    {
        *(
            "ViewBackward0",
            "UnsafeViewBackward0",
            "ReshapeAliasBackward0",
            "AliasBackward0",
            "CloneBackward0",
        ),
        *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "ToCopyBackward0"),
        *("_DDPSinkBackward",),
    }
)
"""Steps of the graph behind which the same values stand, in the same order."""


def _is_same(given: Tensor, output: Tensor) -> bool:
    """Whether `given` is `output`, at most reshaped or cast, as its graph shows."""
    if given is output:
        return True
    if given.numel() != output.numel():
        return False
    node, number = given.grad_fn, given.output_nr
    while node is not None:
        if (node, number) == (output.grad_fn, output.output_nr):
            return True
        if node.name() not in _KEEPS_VALUES:
            return False
        node, number = node.next_functions[number]
    return False

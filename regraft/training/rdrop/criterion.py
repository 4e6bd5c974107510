"""The criterion that `regraft.rdrop_criterion` returns: it fetches the other passes of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import LossError
from regraft.training.passes.nested import leaves, mapped
from regraft.training.rdrop.layer import armed
from regraft.training.rdrop.rdrop_loss import RDropTerms


class RDropCriterion(nn.Module):
    """What `rdrop_criterion` returns.

    Args:
        model: the model whose passes it fetches.
        criterion: the loss of one pass.
        strict: raise in training where the model is no longer grafted; else it is the criterion then.

    Attributes:
        terms: the task's loss and the KL of the last step.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., Any], *, strict: bool = True) -> None:
        super().__init__()
        self.criterion, self.strict = criterion, strict
        self.terms: RDropTerms | None = None
        self.__dict__["_model"] = model  # no submodule: its parameters are not the criterion's

    @property
    def model(self) -> nn.Module:
        """The model whose passes it fetches."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def forward(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The R-Drop loss in training; the criterion of the outputs otherwise."""
        model = self.model
        state = armed(model)
        grafted = state is not None and state.outside
        trains = model.training and torch.is_grad_enabled() and _has_gradient(outputs)
        if not trains or not (grafted or self.strict):
            return self.criterion(outputs, *args, **kwargs)  # type: ignore[no-any-return]
        if not grafted:
            raise LossError(
                "the model is no longer grafted with R-Drop, and its criterion still is",
                where=type(model).__name__,
                remedy="train plain with the criterion itself: criterion.criterion",
            )
        if state.kept is None:
            raise LossError(
                "there are no passes to fetch: these outputs do not come from the last training forward",
                where=f"{type(model).__name__} grafted by regraft.rdrop_criterion",
                remedy="call the criterion once after each forward; a second loss goes into one criterion: "
                "lambda outputs, y: first(outputs, y) + second(outputs, y)",
            )
        kept, state.kept = state.kept, None
        loss = state.loss_of(self.criterion, outputs, _of_all_passes(outputs, *kept), args, kwargs)
        self.terms = state.terms
        return loss  # type: ignore[no-any-return]


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


_KEEPS_VALUES = {
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
    *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "ToCopyBackward0", "_DDPSinkBackward"),
}
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

"""The model's own cross-entropy of large logits, in chunks that are computed again in the backward.

A model keeps the log-probabilities of each pass for its backward, and the KL needs the logits. Here the
logits alone are kept, and the backward of a pass gives the gradient of both in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.graft.calls import checkpoint_marks
from regraft.training.rdrop import rdrop_loss
from regraft.training.rdrop.criterion import is_same
from regraft.training.rdrop.fields import logits_in
from regraft.training.rdrop.layer import Forward
from regraft.training.rdrop.options import Key
from regraft.training.rdrop.rdrop_loss import Apart, chunks


class OwnCrossEntropies(TorchFunctionMode):
    """Around each pass: takes over the cross-entropy that the model computes of its logits.

    Attributes:
        logits: of each pass, (positions, classes), as they were given to its cross-entropy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._cast: Tensor | None = None
        self._marks = checkpoint_marks()
        self.apart: Apart | None = None
        self.slope: Tensor | None = None

    def around(self, forward: Forward, key: Key | None) -> Forward:
        """The forward of a pass whose logits are the output `key`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                outputs = forward(*args, **kwargs)
            self._cast = None
            self._outputs.append(logits_in(outputs, key, labelled=True))
            return outputs

        return watched

    def hold_the_outputs(self) -> bool:
        """Whether each pass computed one loss, and of the very logits that it gave."""
        outputs, self._outputs = self._outputs, []
        same = bool(self.logits) and len(self.logits) == len(outputs)
        for ours, output in zip(self.logits, outputs, strict=False):
            same = same and ours.data_ptr() == output.data_ptr() and ours.numel() == output.numel()
        self._tokens = self._tokens if same else []
        return same

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.to) and is_large(args[0]):
            self._cast = args[0]
        if func is F.cross_entropy:
            loss = self._cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        return func(*args, **kwargs)

    def divergence(self, apart: Apart) -> Tensor:
        """The divergence at each position; its gradient is part of the backward of the passes."""
        self.apart = apart
        rows = chunks(self.logits[0], len(self.logits))
        values = [apart(torch.stack([logits[some] for logits in self.logits]), some) for some in rows]
        result = torch.cat(values) + 0 * torch.stack(self._tokens).sum()
        # By the tokens the backwards of the passes come behind this one, which leaves them its slope.
        result.register_hook(self._keep_slope)  # type: ignore[no-untyped-call]
        self._tokens = []  # which hold the graph, which holds this
        return result

    def _keep_slope(self, slope: Tensor) -> None:
        self.slope = slope

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor | None:
        """The loss where it is of this kind and large; None elsewhere, and inside a checkpoint."""
        reduction, ignored = options.pop("reduction", "mean"), options.pop("ignore_index", -100)
        if args or any(options.values()) or reduction == "none" or checkpoint_marks() != self._marks:
            return None
        if not is_large(logits) or logits.dim() != 2 or target.dim() != 1 or not logits.requires_grad:
            return None
        dtype, cast = logits.dtype, self._cast
        source = cast if cast is not None and is_same(logits, cast) else logits

        def loss_of(x: Tensor, rows: slice) -> Tensor:
            return F.cross_entropy(x.to(dtype), target[rows], weight, reduction="none", ignore_index=ignored)

        losses, token = _CrossEntropy.apply(source.reshape(logits.shape), loss_of, self, len(self.logits))
        self.logits.append(source.detach().reshape(logits.shape))
        self._tokens.append(token)
        total: Tensor = losses.sum()
        if reduction == "sum":
            return total
        kept = target != ignored
        count = kept.sum() if weight is None else weight[target.where(kept, 0)].where(kept, 0).sum()
        return total / count


class _CrossEntropy(torch.autograd.Function):
    """The loss at each position, and a token by which the divergence depends on the same logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss_of: Apart, passes: OwnCrossEntropies, number: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits)
        ctx.loss_of, ctx.passes, ctx.number = loss_of, passes, number
        losses = torch.cat([loss_of(logits[rows], rows) for rows in chunks(logits, 1)])
        return losses, losses.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        passes: OwnCrossEntropies = ctx.passes
        gradient = torch.empty_like(logits)
        for rows in chunks(logits, len(passes.logits)):
            x = logits[rows].detach().requires_grad_()
            with torch.enable_grad():
                total = (ctx.loss_of(x, rows) * slope[rows]).sum()
                if passes.apart is not None and passes.slope is not None:
                    every = [x if i == ctx.number else one[rows] for i, one in enumerate(passes.logits)]
                    total = total + (passes.apart(torch.stack(every), rows) * passes.slope[rows]).sum()
            (gradient[rows],) = torch.autograd.grad(total, x)
        return gradient, None, None, None


def is_large(x: Any) -> bool:
    plain = isinstance(x, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.numel() > rdrop_loss.CHUNK_ELEMENTS

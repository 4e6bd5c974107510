"""Concrete dropout: the rate is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.variants.checks import check_number
from regraft.variants.draws import channel_axis_of, uniform_like
from regraft.variants.module import DropoutVariant, acts
from regraft.variants.spec import DEFAULT_RATE, Spec


def concrete_dropout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    temperature: float = 0.1,
    entropy: float = 1e-5,
    weight: float = 1e-6,
    concrete_logit: Tensor | None = None,
    concrete_features: Tensor | None = None,
) -> Tensor:
    """Dropout through a smooth mask, whose slope lets the rate be learned.

    The mask is 1 - sigmoid((logit(p) + logit(u)) / temperature), u uniform: nearly 0 or 1 at low
    temperature. The rate grows or falls with the loss, balanced by `regraft.penalty(model)`, which
    is to be added to it: without that term the rate tends to 0.

    Options:
        temperature: how smooth the mask is; the paper's 0.1.
        entropy: weight of the entropy in the penalty, for each feature: about 2 / N for N training
            examples and squared error, 1 / N for cross entropy.
        weight: weight of the squared norms in the penalty, ||W||^2 / (1 - p), of the layers that read
            the output, where they are known: about l^2 / N for a prior of length scale l.

    Shape:
        (B, C), (B, T, C), (B, C, H, W), ...; the output's is the input's. concrete_logit: (1,), the
        learned logit(p), which starts at p; concrete_features: (), is given the number of features.

    Source:
        Gal, Hron, Kendall (2017), "Concrete dropout".

    Differs:
        eval is the identity; the paper samples there too. The mask is smooth, so its mean is only
        nearly 1 - p.

    Example:
        >>> import torch
        >>> concrete_dropout(torch.ones(2, 3), p=0.1).shape
        torch.Size([2, 3])
    """
    if not acts(p, training):
        return x
    if concrete_features is not None:
        concrete_features.fill_(x.shape[channel_axis_of(x)])
    draw = uniform_like(x)
    if concrete_logit is None:
        logit = torch.full((1,), p / (1 - p), dtype=draw.dtype, device=x.device).log()
    else:
        logit = concrete_logit.to(draw.dtype)
    # logit(1 - u) is distributed as -logit(u); a draw of 0 gives a mask of 0, and a slope of 0.
    mask: Tensor = _Mask.apply(draw.logit_(), logit.reshape([1] * min(x.dim(), 1)), temperature)
    del draw  # before the product: two tensors of x's size at a time are enough
    return x * mask.to(x.dtype)


class _Mask(torch.autograd.Function):
    """sigmoid((draw - logit) / temperature) / (1 - p): written out, it keeps one mask and not three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(draw: Tensor, logit: Tensor, temperature: float) -> Tensor:
        return (draw - logit).div_(temperature).sigmoid_().mul_(1 + logit.exp())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, logit, ctx.temperature = inputs
        ctx.save_for_backward(output, logit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        mask, logit = ctx.saved_tensors
        # With m = s(z) (1 + e^logit): dm/dlogit = m (p - (1 - s(z)) / temperature).
        smooth = mask * torch.sigmoid(-logit)
        slope = torch.sigmoid(logit) - (1 - smooth) / ctx.temperature
        return None, (grad * mask * slope).sum().reshape(logit.shape), None


def _state(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Tensor]:
    p = options.get("p") or getattr(module, "p", None)
    p = p if isinstance(p, float) and 0 < p < 1 else DEFAULT_RATE
    # One element and not none: FSDP cannot shard a parameter without axes.
    logit = nn.Parameter(torch.tensor([math.log(p / (1 - p))]))
    return {"concrete_logit": logit, "concrete_features": torch.zeros(())}


def _penalty(module: nn.Module, options: Mapping[str, Any], readers: Sequence[Tensor]) -> Tensor:
    logit: Tensor = module.concrete_logit  # type: ignore[assignment]
    features: Tensor = module.concrete_features  # type: ignore[assignment]
    # p log p + (1 - p) log(1 - p), from log-sigmoids: finite at every logit.
    negative_entropy = torch.sigmoid(logit) * nn.functional.logsigmoid(logit)
    negative_entropy = negative_entropy + torch.sigmoid(-logit) * nn.functional.logsigmoid(-logit)
    total: Tensor = (options["entropy"] * features * negative_entropy).sum()
    if options["weight"]:
        for matrix in readers:
            squares = matrix.to(logit).square().sum()
            # 1 / (1 - p), bounded as 1 - p is by what a float can hold.
            total = total + (options["weight"] * squares / torch.sigmoid(-logit).clamp(min=1e-30)).sum()
    return total


@Spec(
    "concrete",
    concrete_dropout,
    checks={
        "temperature": partial(check_number, above=0),
        "entropy": partial(check_number, least=0),
        "weight": partial(check_number, least=0),
    },
    state=_state,
    transient=("concrete_features",),
    penalty=_penalty,
)
class ConcreteDropout(DropoutVariant):
    """`concrete_dropout` as a module, with the parameter `concrete_logit`, the rate's logit.

    `ConcreteDropout(p=0.2, *, temperature=0.1, entropy=1e-05, weight=1e-06)`.
    """

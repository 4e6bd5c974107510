"""Standout: dropout whose rate depends on the unit's own activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regraft.errors import OptionError
from regraft.variants.checks import check_choice, check_count, check_number, check_switch
from regraft.variants.draws import HALVES
from regraft.variants.module import DropoutVariant, LinearVariant, check_rate, linear_weight
from regraft.variants.spec import DEFAULT_RATE, Spec


def standout(
    x: Tensor,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    rescale: bool = True,
    min_keep: float = 0.05,
    gate: str = "tied",
    features: int | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_input: Tensor | None = None,
) -> Tensor:
    """Each element is kept with probability pi = sigmoid(alpha * a + beta), a its own activation.

    The larger an activation, the likelier it stays. At a dropout site a is x itself, which equals
    the paper's pre-activation wherever the unit is active under ReLU. What is kept is divided by pi.

    Options:
        p: sets beta where it is not given: at a = 0 the probability to drop is p.
        alpha: how strongly the probability follows the activation.
        beta: the shift; None is logit(1 - p).
        rescale: divide by pi, so that eval is the identity. False is the paper's: eval multiplies by
            pi, which changes what a pretrained model computes.
        min_keep: pi below it is raised to it, which bounds the division.
        gate: "tied" (a = x), or "learned" (a = a linear gate's output; new parameters, which start
            at 0, as plain dropout at p).
        features: size of the last axis, which a learned gate at a dropout site needs.

    Shape:
        any, the last axis the features if the gate is learned; the output's is the input's.
        gate_weight: (features, features), gate_bias: (features,); gate_input is what the gate reads, or x.

    Source:
        Ba and Frey (2013), "Adaptive dropout for training deep neural networks".

    Differs:
        alpha and beta act on the logit, in the paper on the weights; dividing by pi is not in the
        paper. A tied pi is a constant to the gradient, as in the paper, which with `rescale` makes
        the gradient right on average; a learned gate gets the straight-through gradient.

    Example:
        >>> import torch
        >>> standout(torch.ones(2, 3), p=0.5).shape
        torch.Size([2, 3])
    """
    p = check_rate(p)
    if (p == 0 and beta is None) or (rescale and not training):
        return x
    shift = _shift(x, p) if beta is None else beta
    if gate_weight is not None or not training:
        source = x if gate_input is None else gate_input
        gated = x if gate_weight is None else linear(source, gate_weight, gate_bias)
        wide = gated.float() if gated.dtype in HALVES else gated
        keep = (wide * alpha + shift).sigmoid().clamp(min=min_keep)
        return _with_slopes(x, keep, rescale) if training else x * keep.to(x.dtype)
    # In place throughout, on tensors made here: each pass over memory counts beside the draw.
    logits = x.detach().float() if x.dtype in HALVES else x.detach()
    keep = (logits * alpha).add_(shift).sigmoid_().clamp(min=min_keep)
    # A uniform draw less the probability lies in [-1, 0) where it is kept, so its floor is -1 or 0.
    mask = torch.rand_like(keep).sub_(keep).floor_().neg_()
    if rescale:
        mask.div_(keep)
    del keep  # before the product: two tensors of x's size at a time are enough
    return x * mask.to(x.dtype)


def _shift(x: Tensor, p: float) -> float | Tensor:
    """logit(1 - p)."""
    if torch.compiler.is_compiling():
        # A scheduled rate is then an input of the graph; math.log would make each a constant.
        return torch.full((), (1 - p) / p, dtype=torch.float32, device=x.device).log()
    return math.log((1 - p) / p)


def _with_slopes(x: Tensor, keep: Tensor, rescale: bool) -> Tensor:
    fixed = keep.detach()
    # Straight through: the drawn mask forwards, the slope of its probability backwards.
    mask = (torch.rand_like(fixed) < fixed) + (keep - fixed)
    return x * (mask / fixed if rescale else mask).to(x.dtype)


def standout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = DEFAULT_RATE,
    training: bool = True,
    **options: Any,
) -> Tensor:
    """`standout` of a linear layer's outputs, their own pre-activation deciding: a = W x + b.

    A learned gate reads the layer's input: a = V x + c, of the shape of W and b. Masking a and
    masking f(a) are the same for every activation function with f(0) = 0. Options are those of
    `standout`; without `rescale`, eval is the linear layer times pi.

    Shape:
        x: (..., in), weight and gate_weight: (out, in), output: (..., out).
    """
    return standout(linear(x, weight, bias), p, training, gate_input=x, **options)


def _state(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Tensor]:
    if options["gate"] == "tied":
        return {}
    size = options["features"]
    if isinstance(getattr(module, "weight", None), Tensor):
        weight = torch.zeros_like(linear_weight(module))
    elif size is not None:
        weight = torch.zeros(size, size)
    else:
        raise OptionError(
            "a learned gate at a dropout site needs the number of features",
            remedy="give standout(gate='learned', features=...), the size of the last axis",
        )
    return {"gate_weight": nn.Parameter(weight), "gate_bias": nn.Parameter(torch.zeros_like(weight[:, 0]))}


@Spec(
    "standout",
    standout,
    ("Dropout", "Linear"),
    {
        "alpha": check_number,
        "beta": check_number,
        "rescale": check_switch,
        "min_keep": partial(check_number, above=0, most=1),
        "gate": partial(check_choice, choices=("tied", "learned")),
        "features": check_count,
    },
    changes_eval=lambda options: not options["rescale"],
    needs_rate=lambda options: options["beta"] is None,
    state=_state,
    state_when=lambda options: options["gate"] == "learned",
    linear_function=standout_linear,
)
class StandoutDropout(DropoutVariant):
    """`standout` as a module, with its options: `StandoutDropout(p=0.2, *, alpha=1.0, beta=None, ...)`."""


@StandoutDropout.spec
class StandoutLinear(LinearVariant):
    """`standout_linear` as a module: an `nn.Linear` followed by standout of its outputs."""

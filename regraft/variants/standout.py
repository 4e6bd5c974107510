"""Standout: dropout whose rate depends on the unit's own activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regraft.errors import OptionError
from regraft.variants.checks import check_choice, check_count, check_number, check_switch
from regraft.variants.gating import gate_shift, stand_out
from regraft.variants.module import DropoutVariant, LinearVariant, linear_weight
from regraft.variants.spec import DEFAULT_RATE, Spec

_DEFAULTS: dict[str, Any] = {
    "alpha": 1.0,
    "beta": None,
    "rescale": True,
    "min_keep": 0.05,
    "gate": "tied",
    "features": None,
}


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
) -> Tensor:
    """Each element is kept with probability pi = sigmoid(alpha * a + beta), a its own activation.

    The larger an activation, the likelier it stays. At a dropout site a is x itself, which equals
    the paper's pre-activation wherever the unit is active under ReLU. What is kept is divided by pi.

    Args:
        x: activations.
        p: sets beta where it is not given: at a = 0 the probability to drop is p.
        training: False is the identity, or multiplies by pi without `rescale`.
        alpha: how strongly the probability follows the activation.
        beta: the shift; None is logit(1 - p).
        rescale: divide by pi, so that eval is the identity. False is the paper's: eval multiplies by
            pi, which changes what a pretrained model computes.
        min_keep: pi below it is raised to it, which bounds the division.
        gate: "tied" (a = x), or "learned" (a = a linear gate's output; new parameters, which start
            at 0, as plain dropout at p).
        features: size of the last axis, which a learned gate at a dropout site needs.
        gate_weight: (features, features), of a learned gate.
        gate_bias: (features,).

    Shape:
        any, the last axis the features if the gate is learned; the output's is the input's.

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
    shift = gate_shift(x, p, beta)
    if shift is None or (rescale and not training):
        return x
    gated = None if gate_weight is None else linear(x, gate_weight, gate_bias)
    return stand_out(x, gated, training, alpha=alpha, shift=shift, rescale=rescale, min_keep=min_keep)


def standout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
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
) -> Tensor:
    """`standout` of a linear layer's outputs, their own pre-activation deciding: a = W x + b.

    A learned gate reads the layer's input: a = V x + c, of the shape of W and b. Masking a and
    masking f(a) are the same for every activation function with f(0) = 0.

    Args:
        x: the layer's input.
        weight: (out, in), as `nn.Linear` has it.
        bias: (out,) or None.
        p: as in `standout`, as are the options.
        training: False is the plain linear layer, times pi without `rescale`.
        alpha: as in `standout`.
        beta: as in `standout`.
        rescale: as in `standout`.
        min_keep: as in `standout`.
        gate: as in `standout`.
        features: unused here.
        gate_weight: (out, in), of a learned gate.
        gate_bias: (out,).

    Shape:
        x: (..., in), output: (..., out).

    Source:
        Ba and Frey (2013), "Adaptive dropout for training deep neural networks".

    Differs:
        as `standout`.

    Example:
        >>> import torch
        >>> standout_linear(torch.ones(4, 3), torch.ones(2, 3), p=0.5).shape
        torch.Size([4, 2])
    """
    activation = linear(x, weight, bias)
    shift = gate_shift(x, p, beta)
    if shift is None or (rescale and not training):
        return activation
    gated = None if gate_weight is None else linear(x, gate_weight, gate_bias)
    return stand_out(
        activation, gated, training, alpha=alpha, shift=shift, rescale=rescale, min_keep=min_keep
    )


def _check(options: Mapping[str, Any]) -> None:
    check_number("alpha", options["alpha"])
    if options["beta"] is not None:
        check_number("beta", options["beta"])
    check_switch("rescale", options["rescale"])
    check_number("min_keep", options["min_keep"], above=0, most=1)
    check_choice("gate", options["gate"], ("tied", "learned"))
    if options["features"] is not None:
        check_count("features", options["features"])


def _state(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Tensor]:
    if options["gate"] == "tied":
        return {}
    if isinstance(getattr(module, "weight", None), Tensor):
        weight = linear_weight(module)
        return {
            "gate_weight": nn.Parameter(torch.zeros_like(weight)),
            "gate_bias": nn.Parameter(torch.zeros_like(weight[:, 0])),
        }
    if options["features"] is None:
        raise OptionError(
            "a learned gate at a dropout site needs the number of features",
            remedy="give standout(gate='learned', features=...), the size of the last axis",
        )
    size = options["features"]
    return {
        "gate_weight": nn.Parameter(torch.zeros(size, size)),
        "gate_bias": nn.Parameter(torch.zeros(size)),
    }


class StandoutDropout(DropoutVariant):
    """`standout` as a module.

    Example:
        >>> StandoutDropout(0.5)
        StandoutDropout(p=0.5, alpha=1.0, rescale=True, min_keep=0.05, gate='tied')
    """

    function = staticmethod(standout)
    check = staticmethod(_check)
    state = ("gate_weight", "gate_bias")

    def __init__(self, p: float = DEFAULT_RATE, **options: Any) -> None:
        super().__init__(p, **{**_DEFAULTS, **options})
        _add_state(self, _state(self, self.options))


class StandoutLinear(LinearVariant):
    """`standout_linear` as a module: an `nn.Linear` followed by standout of its outputs.

    Example:
        >>> StandoutLinear(4, 2, p=0.5, gate="learned").gate_weight.shape
        torch.Size([2, 4])
    """

    function = staticmethod(standout_linear)
    check = staticmethod(_check)
    state = ("gate_weight", "gate_bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = DEFAULT_RATE,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        complete = {**_DEFAULTS, **options}
        super().__init__(in_features, out_features, bias, p, device=device, dtype=dtype, **complete)
        _add_state(self, _state(self, self.options))


def _add_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name in ("gate_weight", "gate_bias"):
        value = state.get(name)
        module.register_parameter(name, value if isinstance(value, nn.Parameter) else None)


SPECS = (
    Spec(
        "standout",
        standout,
        ("Dropout", "Linear"),
        StandoutDropout,
        _DEFAULTS,
        check=_check,
        changes_eval=lambda options: not options["rescale"],
        needs_rate=lambda options: options["beta"] is None,
        state=_state,
        state_when=lambda options: options["gate"] == "learned",
        linear_function=standout_linear,
        linear_module=StandoutLinear,
    ),
)

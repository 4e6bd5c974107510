"""The variant that takes a regularizer out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from regraft.variants.module import DropoutVariant
from regraft.variants.spec import Spec


def off(x: Tensor, p: float = 0.0, training: bool = True) -> Tensor:
    """The identity: takes a regularizer out.

    As a rule's value it is an edit, which the report lists; `None` leaves the site alone instead.

    Shape:
        any; the output is the input itself.

    Source:
        none.

    Differs:
        nothing.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> off(x) is x
        True
    """
    return x


def off_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.0, training: bool = True
) -> Tensor:
    """The plain linear layer: takes a regularizer of its weights or outputs out.

    Shape:
        x: (..., in), weight: (out, in), output: (..., out).
    """
    return linear(x, weight, bias)


@Spec(
    "off",
    off,
    ("Dropout", "DropPath", "Linear", "Embedding"),
    needs_rate=lambda _: False,
    linear_function=off_linear,
    rated=False,
    weight_function=lambda weight: weight,
)
class Off(DropoutVariant):
    """`off` as a module, `Off()`, which stays where a dropout was; its `p` is 0."""

    def __init__(self, p: float = 0.0) -> None:  # noqa: ARG002
        super().__init__()

"""Mixout: weights fall back to their values before fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from regraft.variants.checks import check_switch
from regraft.variants.dropconnect import dropconnect_weight
from regraft.variants.module import LinearVariant, acts, linear_weight
from regraft.variants.redraw import Noise, noisy_linear
from regraft.variants.spec import DEFAULT_RATE, Spec


def mixout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    exact: bool = False,
    mixout_weight: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weights w each fall back to u with probability p: u + (w - u) M / (1 - p).

    u are the weights the fine-tuning began with, so the regularizer pulls towards the pretrained
    model where weight decay and dropout pull towards 0. On average the weights are w. A bias stays.

    Options:
        exact: as in `dropconnect`.
        mixout_weight: u; None is 0, which is DropConnect.

    Shape:
        x: (..., in), w and u: (out, in), output: (..., out).

    Source:
        Lee, Cho, Kang (2020), "Mixout: effective regularization to finetune large-scale pretrained
        language models".

    Differs:
        nothing: (M w + (1 - M) u - p u) / (1 - p) is the formula above.

    Example:
        >>> import torch
        >>> w = torch.ones(2, 3)
        >>> mixout(torch.ones(1, 3), w, p=0.5, mixout_weight=w)
        tensor([[3., 3.]])
    """
    if not acts(p, training):
        return linear(x, weight, bias)
    return noisy_linear(x, weight, bias, Noise(p, exact=exact), mixout_weight)


def _remembered(weight: Tensor) -> dict[str, Tensor]:
    return {"mixout_weight": weight.detach().clone()}


@Spec(
    "mixout",
    mixout,
    ("Linear",),
    {"exact": check_switch},
    state=lambda module, _: _remembered(linear_weight(module)),
    weight_function=dropconnect_weight,
    weight_state=_remembered,
)
class MixoutLinear(LinearVariant):
    """`mixout` as a module: an `nn.Linear` that remembers the weight fine-tuning begins with.

    Load the pretrained weight, then call `remember()`: `MixoutLinear(4, 2, p=0.9, *, exact=False)`.

    Example:
        >>> import torch
        >>> layer = MixoutLinear(3, 2, p=0.9)
        >>> _ = layer.load_state_dict(torch.nn.Linear(3, 2).state_dict(), strict=False)
        >>> layer.remember()
        >>> torch.equal(layer.mixout_weight, layer.weight)
        True
    """

    mixout_weight: Tensor

    @torch.no_grad()
    def remember(self) -> None:
        """Make the weight as it is now the one to fall back to."""
        self.mixout_weight.copy_(self.weight)

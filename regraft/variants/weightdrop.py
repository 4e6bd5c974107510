"""Weight drop: DropConnect of a recurrent network's hidden-to-hidden matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.variants.checks import check_switch
from regraft.variants.dropconnect import dropconnect, dropconnect_weight
from regraft.variants.module import LinearVariant
from regraft.variants.spec import DEFAULT_RATE, Spec


def weightdrop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = DEFAULT_RATE,
    training: bool = True,
    *,
    exact: bool = False,
) -> Tensor:
    """DropConnect, which in a recurrent network drops hidden-to-hidden weights alone, once a sequence.

    In `nn.LSTM`, `nn.GRU` and `nn.RNN` of any number of layers and directions it acts on `weight_hh_*`:
    the same mask for all time steps and examples of one forward. In a linear layer it is `dropconnect`,
    whose arguments it has.

    Shape:
        x: (..., in), output: (..., out).

    Source:
        Merity, Keskar, Socher (2018), "Regularizing and optimizing LSTM language models".

    Differs:
        nothing: the AWD-LSTM drops the same matrices, by `F.dropout`, once a forward.

    Example:
        >>> import regraft, torch
        >>> lstm = torch.nn.LSTM(4, 8, num_layers=2)
        >>> report = regraft.apply(lstm, {"recurrent": "weightdrop(p=0.5)"}, torch.randn(5, 3, 4))
        >>> [edit.path for edit in report.grafted]
        ['weight_hh_l0', 'weight_hh_l1']
    """
    return dropconnect(x, weight, bias, p, training, exact=exact)


def _unfit(options: Mapping[str, Any], site: Any) -> tuple[str, str] | None:
    if site.op == "recurrent" and not site.attribute.startswith("weight_hh"):
        return "it is no hidden-to-hidden matrix", "'dropconnect' takes it"
    return None


@Spec(
    "weightdrop",
    weightdrop,
    ("Linear",),
    {"exact": check_switch},
    weight_function=dropconnect_weight,
    weight_unfit=_unfit,
)
class WeightDropLinear(LinearVariant):
    """`weightdrop` as a module: `WeightDropLinear(4, 2, p=0.5, *, exact=False)`."""

"""Weight drop: DropConnect of a recurrent network's hidden-to-hidden matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    the same mask for all time steps and examples of one forward. In a linear layer it is `dropconnect`.

    Args:
        x: the layer's input.
        weight: (out, in), as `nn.Linear` has it.
        bias: (out,) or None; never dropped.
        p: probability to drop a weight.
        training: False is the plain linear layer.
        exact: as in `dropconnect`.

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


class WeightDropLinear(LinearVariant):
    """`weightdrop` as a module: an `nn.Linear` with a rate.

    Example:
        >>> WeightDropLinear(4, 2, p=0.5)
        WeightDropLinear(in_features=4, out_features=2, bias=True, p=0.5)
    """

    function = staticmethod(weightdrop)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = DEFAULT_RATE,
        *,
        exact: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, p, device=device, dtype=dtype, exact=exact)


SPECS = (
    Spec(
        "weightdrop",
        weightdrop,
        ("Linear",),
        WeightDropLinear,
        {"exact": False},
        check=lambda options: check_switch("exact", options["exact"]),
        weight_function=dropconnect_weight,
        weight_unfit=_unfit,
    ),
)

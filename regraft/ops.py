"""The table of operations: one row for each regularizer and layer that regraft knows, however it is written.

A row says what sites and reports call the operation, which variants can take its place, the class of torch
whose forward it is, the functions that perform it, and how a call of one is read. A new operation is a
new row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten: Any = torch.ops.aten
Function = Callable[..., Any]

ATTENTION = "scaled_dot_product_attention"
MULTI_HEAD = "multi_head_attention_forward"
DROP_PATH = "DropPath"
DROP_BLOCK = "DropBlock"
LINEAR = "linear"
CONVOLUTION = "Convolution"
"""The family of a convolution's weight: what acts on a weight fits it."""


@dataclass(frozen=True)
class Parsed:
    """The arguments of one call.

    Attributes:
        op: the operation's name.
        x: what is dropped.
        p: the rate.
        training: whether the call drops.
        score_bytes: of attention, the size of its score matrix.
        inplace: whether the call changes `x` itself.
    """

    op: str
    x: Tensor
    p: float
    training: bool
    score_bytes: int = 0
    inplace: bool = False


@dataclass(frozen=True)
class Op:
    """One row.

    Attributes:
        name: what a site of it is called.
        family: the variants that can take its place: "Dropout", "DropPath", "Linear", "Embedding".
        module: the class of torch that performs it; a subclass that keeps its forward counts.
        functions: the functions that perform it.
        read: reads the arguments of such a call.
        kind: the selector that means it besides its own name: "Dropout" for plain dropout inside anything.
        hidden: whether `module` drops inside, at the rate in its attribute `dropout`.
        kernels: of a recurrent network, the kernels that drop between its layers.
        fused: whether its rate is an argument of a fused kernel, a constant in compiled code.
    """

    name: str
    family: str
    module: type[nn.Module] | None = None
    functions: tuple[Function, ...] = ()
    read: Callable[..., Parsed] | None = None
    kind: str = ""
    hidden: bool = False
    kernels: tuple[Function, ...] = ()
    fused: bool = False


def _reader(name: str, *, by_default: bool = True) -> Callable[..., Parsed]:
    def read(
        input: Tensor,
        p: float = 0.5,
        training: bool | None = by_default,
        inplace: bool = False,
        **kwargs: Any,
    ) -> Parsed:
        training = kwargs.get("train", training)  # None, of native_dropout, is True
        return Parsed(name, input, p, training is None or bool(training), inplace=inplace)

    return read


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> Parsed:
    # It has no `training`: a rate above 0 is all there is to say that it drops.
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.element_size()
    return Parsed(ATTENTION, query, dropout_p, dropout_p > 0, scores)


def _multi_head(*args: Any, **kwargs: Any) -> Parsed:
    query = kwargs.get("query", args[0] if args else None)
    p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
    training = kwargs.get("training", args[13] if len(args) > 13 else True)
    return Parsed(MULTI_HEAD, cast("Tensor", query), p, bool(training))


def _called(name: str, *functions: Function, kind: str, by_default: bool = True) -> Op:
    return Op(name, "Dropout", functions=functions, read=_reader(name, by_default=by_default), kind=kind)


def _fused(name: str, module: type[nn.Module] | None = None, **facts: Any) -> Op:
    return Op(name, "Dropout", module, kind="Dropout", hidden=module is not None, fused=True, **facts)


TABLE: tuple[Op, ...] = (
    Op("Dropout", "Dropout", nn.Dropout, kind="Dropout"),
    Op("Dropout1d", "Dropout", nn.Dropout1d),
    Op("Dropout2d", "Dropout", nn.Dropout2d),
    Op("Dropout3d", "Dropout", nn.Dropout3d),
    Op("AlphaDropout", "Dropout", nn.AlphaDropout),
    Op("FeatureAlphaDropout", "Dropout", nn.FeatureAlphaDropout),
    Op(DROP_BLOCK, "Dropout"),
    Op(DROP_PATH, "DropPath"),
    _called(
        "dropout",
        *(F.dropout, torch.dropout, torch.dropout_, aten.dropout, aten.dropout.default, aten.dropout_),
        *(torch.native_dropout, aten.native_dropout, aten.native_dropout.default),
        kind="Dropout",
    ),
    _called("dropout1d", F.dropout1d, kind="Dropout1d"),
    _called("dropout2d", F.dropout2d, torch.feature_dropout, torch.feature_dropout_, kind="Dropout2d"),
    _called("dropout3d", F.dropout3d, kind="Dropout3d"),
    _called(
        "alpha_dropout",
        *(F.alpha_dropout, torch.alpha_dropout, torch.alpha_dropout_),
        kind="AlphaDropout",
        by_default=False,
    ),
    _called(
        "feature_alpha_dropout",
        *(F.feature_alpha_dropout, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
        kind="FeatureAlphaDropout",
        by_default=False,
    ),
    _fused(ATTENTION, functions=(F.scaled_dot_product_attention,), read=_attention),
    _fused(MULTI_HEAD, functions=(F.multi_head_attention_forward,), read=_multi_head),
    _fused("MultiheadAttention", nn.MultiheadAttention),
    _fused("LSTM", nn.LSTM, kernels=(torch.lstm,)),
    _fused("GRU", nn.GRU, kernels=(torch.gru,)),
    _fused("RNN", nn.RNN, kernels=(torch.rnn_tanh, torch.rnn_relu)),
    Op("Linear", "Linear", nn.Linear),
    Op("Conv1D", "Linear"),
    Op(LINEAR, "Linear", functions=(F.linear,), kind="Linear"),
    Op("Embedding", "Embedding", nn.Embedding),
)

FAMILIES = {op.name: op.family for op in TABLE}
"""Operation -> family of the variants that can take its place."""
MODULES = {op.module: op.name for op in TABLE if op.module is not None and not op.hidden}
"""Class of torch -> operation."""
HIDDEN = {op.module: op.name for op in TABLE if op.module is not None and op.hidden}
"""Classes of torch that hide a dropout inside -> operation."""
KINDS = {op.name: op.kind for op in TABLE if op.kind}
"""Operation -> the selector that means it besides its own name."""
PLAIN = frozenset(name for name, kind in KINDS.items() if kind == "Dropout" and name != "Dropout")
"""Plain dropout inside something else: what the selector "Dropout" means besides `nn.Dropout`."""
FUSED = frozenset(op.name for op in TABLE if op.fused)
"""Operations whose rate is an argument of one of torch's kernels."""
ATTENTIONS = frozenset({ATTENTION, MULTI_HEAD, "MultiheadAttention"})
RECURRENT = {kernel: op.name for op in TABLE for kernel in op.kernels}
"""Kernel of a recurrent network -> operation."""
RECURRENT_OPS = frozenset(RECURRENT.values())
OPS = {function: op.name for op in TABLE if op.read is not None for function in op.functions}
"""Function that drops -> operation."""
FUNCTIONS = {function: op.read for op in TABLE if op.read is not None for function in op.functions}
"""Function that drops -> what reads its arguments."""
WITH_MASK: frozenset[Function] = frozenset(
    {torch.native_dropout, aten.native_dropout, aten.native_dropout.default}
)
"""Functions that return the mask too."""
IN_PLACE: frozenset[Function] = frozenset(
    (
        torch.dropout_,
        aten.dropout_,
        torch.feature_dropout_,
        torch.alpha_dropout_,
        torch.feature_alpha_dropout_,
    )
)
"""Functions that change what they are given."""
OWN_LAW: dict[str, Function] = {
    "dropout1d": F.dropout1d,
    "dropout2d": F.dropout2d,
    "dropout3d": F.dropout3d,
    "alpha_dropout": F.alpha_dropout,
    "feature_alpha_dropout": F.feature_alpha_dropout,
}
"""Functions that drop by a law of their own, which a change of the rate keeps."""
KEEPS_LAW = frozenset(
    {*OWN_LAW, "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", DROP_BLOCK}
)
"""Operations, called or as modules, at which "dropout(p=...)" sets the rate of their own law."""

ROW_DRAWS: tuple[Function, ...] = (torch.rand, torch.bernoulli, Tensor.bernoulli_, Tensor.uniform_)
"""Draws of which a DropPath that is no module is made."""


def draws_rows(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is the draw of one number for each example, of which a DropPath makes its mask."""
    if func is torch.rand:
        given = args or (kwargs.get("size", ()),)
        shape = given[0] if isinstance(given[0], (tuple, list)) else given
    else:
        shape = args[0].shape if args else ()
    return is_row_mask(shape)


def is_row_mask(shape: Any) -> bool:
    """Whether a tensor of `shape` holds one number for each row: (B, 1, ..., 1)."""
    return len(shape) > 1 and shape[0] > 1 and all(size == 1 for size in shape[1:])

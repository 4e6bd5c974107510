"""The public functions that drop, by name: what a call of one is, and at which rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

DROPOUTS: dict[Callable[..., Any], str] = {
    F.dropout: "dropout",
    torch.dropout: "dropout",
    torch.dropout_: "dropout",
    torch.native_dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    torch.feature_dropout: "dropout2d",
    torch.feature_dropout_: "dropout2d",
    F.alpha_dropout: "alpha_dropout",
    torch.alpha_dropout: "alpha_dropout",
    torch.alpha_dropout_: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    torch.feature_alpha_dropout: "feature_alpha_dropout",
    torch.feature_alpha_dropout_: "feature_alpha_dropout",
}
"""Functions `f(input, p=0.5, training=True)`."""
_OFF = frozenset({F.alpha_dropout, F.feature_alpha_dropout})
"""Those whose `training` is False by default."""
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The size that a call of `torch.rand` asks for."""
    size = args if args else kwargs.get("size", (1,))
    return tuple(size[0]) if size and isinstance(size[0], (tuple, list)) else tuple(size)


def named_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, float] | None:
    """What a call is and at which rate it drops; rate 0 if it does not; None if it is no regularizer."""
    kind = DROPOUTS.get(func) if callable(func) else None
    if kind is not None:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else func not in _OFF))
        return kind, float(p) if training else 0.0
    if func is F.scaled_dot_product_attention:
        return func.__name__, float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if func is F.multi_head_attention_forward:
        p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
        training = kwargs.get("training", args[13] if len(args) > 13 else True)
        return func.__name__, float(p) if training else 0.0
    if func in _RECURRENT:
        return "rnn", _recurrent_rate(args)
    return None


def _recurrent_rate(args: tuple[Any, ...]) -> float:
    # (..., has_biases, num_layers, dropout, train, bidirectional[, batch_first])
    numbers = [arg for arg in args if isinstance(arg, (bool, int, float))]
    _, layers, p, training = numbers[:4]
    return float(p) if training and layers > 1 else 0.0

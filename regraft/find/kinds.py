"""Which regularizers and layers there are: the names selectors use, and which variants can replace them."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from regraft.record import original_attribute, original_class

# A subclass keeps the name of its base while it keeps the base's forward: it computes the same.
_NAMED: dict[type[nn.Module], str] = {
    nn.Dropout: "Dropout",
    nn.Dropout1d: "Dropout1d",
    nn.Dropout2d: "Dropout2d",
    nn.Dropout3d: "Dropout3d",
    nn.AlphaDropout: "AlphaDropout",
    nn.FeatureAlphaDropout: "FeatureAlphaDropout",
    nn.Linear: "Linear",
    nn.Embedding: "Embedding",
}
_NOISE = {name: "Dropout" for cls, name in _NAMED.items() if issubclass(cls, _DropoutNd)}
FAMILIES: dict[str, str] = {
    **_NOISE,
    "DropPath": "DropPath",
    "Linear": "Linear",
    "Conv1D": "Linear",
    "linear": "Linear",
    "Embedding": "Embedding",
    "dropout": "Dropout",
    "dropout1d": "Dropout",
    "dropout2d": "Dropout",
    "dropout3d": "Dropout",
    "alpha_dropout": "Dropout",
    "feature_alpha_dropout": "Dropout",
    "scaled_dot_product_attention": "Dropout",
    "multi_head_attention_forward": "Dropout",
    "MultiheadAttention": "Dropout",
    "LSTM": "Dropout",
    "GRU": "Dropout",
    "RNN": "Dropout",
}
"""Operation -> family of the variants that can take its place."""
OPAQUE: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "MultiheadAttention",
    nn.LSTM: "LSTM",
    nn.GRU: "GRU",
    nn.RNN: "RNN",
}
"""Modules of torch that hide a dropout inside; their rate is the attribute `dropout`."""
PLAIN = frozenset(
    {
        "dropout",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "MultiheadAttention",
        "LSTM",
        "GRU",
        "RNN",
    }
)
"""Operations that the selector "Dropout" means too: the plain dropout, written inside something else."""

_DROP_PATH = re.compile(r"(DropPath|StochasticDepth)$")
_PRIVATE_DROPOUT = re.compile(r"Dropout(\dd)?$")
_OTHER_NOISE = re.compile(r"Patch|Token|Word|Feature|Channel|Spatial|Block|Variational|Locked|\dd$")
"""In the name of a private dropout: it does not drop single elements, and keeps a name of its own."""
_RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_rate", "prob")


def op_of(module: nn.Module) -> str | None:
    """The operation that makes `module` a site, or None if it is none."""
    cls = original_class(module)
    scripted = getattr(module, "original_name", None)
    if scripted in FAMILIES and cls.__module__.startswith("torch.jit"):
        return str(scripted)
    for base, name in _NAMED.items():
        if issubclass(cls, base) and cls.forward is base.forward:
            return name
    for base, name in OPAQUE.items():
        if issubclass(cls, base):
            return name
    if _DROP_PATH.search(cls.__name__):
        return "DropPath"
    if cls.__name__ == "Conv1D" and len(getattr(module, "weight", ()).shape) == 2:  # type: ignore[union-attr]
        return "Conv1D"
    if _PRIVATE_DROPOUT.search(cls.__name__) and _is_leaf(module):
        return cls.__name__ if _OTHER_NOISE.search(cls.__name__) else "Dropout"
    return cls.__name__ if issubclass(cls, _DropoutNd) else None


def family_of(module: nn.Module, op: str) -> str | None:
    """The family of variants that can take the place of `op` at `module`."""
    if op in FAMILIES:
        return FAMILIES[op]
    return "Dropout" if rate_name(module) else None


def rate_name(module: nn.Module) -> str | None:
    """The attribute that holds a module's rate."""
    for name in _RATES:
        value = original_attribute(module, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name
    return None


def never_runs(module: nn.Module) -> bool:
    """Is the forward of `module` known never to run, whatever the model? Its parent reads the weight."""
    return issubclass(original_class(module), NonDynamicallyQuantizableLinear)


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and not module._parameters and rate_name(module) is not None

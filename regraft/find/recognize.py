"""What operation a module is: a class of torch by its forward, anybody else's by what it draws.

And whether a graft on it would be lost, as far as the module itself tells, whatever the variant.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from regraft.find.law import BLOCKS, ELEMENTS, ROWS, law_of
from regraft.libraries import is_conv1d, is_sharded
from regraft.ops import DROP_BLOCK, DROP_PATH, FAMILIES, HIDDEN, MODULES
from regraft.record import original_attribute, original_class

_NOMINATED = re.compile(r"Drop(out|Path|Block)?(\dd)?$|StochasticDepth$|Noise$")
"""Names of classes that may drop, which what they draw then confirms or not."""
_OTHER_NOISE = re.compile(r"Patch|Token|Word|Feature|Channel|Spatial|Block|Variational|Locked|\dd$")
_LAWS = {ELEMENTS: "Dropout", ROWS: DROP_PATH, BLOCKS: DROP_BLOCK}
_RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_rate", "prob")
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, FakeTensor)
_REWRITE = "write it with torch's layers to graft it"
_QUANTIZED = (
    *("torch.ao.nn.quantized.", "torch.ao.nn.qat.", "torch.ao.nn.intrinsic.quantized."),
    *("torch.ao.nn.intrinsic.qat.", "bitsandbytes.", "auto_gptq.", "gptqmodel.", "awq.", "hqq."),
)


def op_of(module: nn.Module) -> str | None:
    """The operation that makes `module` a site, or None if it is none.

    A class of somebody's own that drops by another law than those known keeps its name.
    """
    cls = original_class(module)
    if issubclass(cls, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", None)
        return str(scripted) if scripted in FAMILIES else None
    # A subclass keeps the name of its base while it keeps the base's forward: it computes the same.
    for base, name in MODULES.items():
        if issubclass(cls, base) and cls.forward is base.forward:
            return name
    for base, name in HIDDEN.items():
        if issubclass(cls, base):
            return name
    if is_conv1d(cls):
        return "Conv1D"
    return _by_law(module, cls)


def _by_law(module: nn.Module, cls: type[nn.Module]) -> str | None:
    if module._modules or module._parameters or cls.__module__.startswith("torch.nn."):
        return None
    rate = rate_name(module)
    nominated = _NOMINATED.search(cls.__name__) is not None or issubclass(cls, _DropoutNd)
    if rate is None and not nominated:
        return None
    if cls.forward is nn.Module.forward:
        return _by_name(cls, rate)
    law = law_of(module, rate)
    if law is None:
        return own_name(cls) if nominated and rate else None
    return _LAWS.get(law) or own_name(cls) if rate else own_name(cls)


def _by_name(cls: type[nn.Module], rate: str | None) -> str | None:
    """Of a class without a forward, as read from a file: its name is all that there is."""
    if re.search(r"(DropPath|StochasticDepth)$", cls.__name__):
        return DROP_PATH
    if rate is None or not re.search(r"Dropout(\dd)?$", cls.__name__):
        return None
    return own_name(cls) if _OTHER_NOISE.search(cls.__name__) else "Dropout"


def own_name(cls: type[nn.Module]) -> str:
    """The class's name; a class that has the name of another operation is no such operation."""
    return f"own_{cls.__name__}" if cls.__name__ in FAMILIES else cls.__name__


def family_of(module: nn.Module, op: str) -> str | None:
    """The family of variants that can take the place of `op` at `module`."""
    return FAMILIES.get(op, "Dropout" if not module._parameters else None)


def rate_name(module: nn.Module) -> str | None:
    """The attribute that holds a module's rate."""
    for name in _RATES:
        value = original_attribute(module, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
            return name
    return None


def never_runs(module: nn.Module) -> bool:
    """Whether the forward of `module` never runs, whatever the model: its parent reads the weight."""
    return issubclass(original_class(module), NonDynamicallyQuantizableLinear)


def obstacle(module: nn.Module, op: str) -> tuple[str, str] | None:
    """Why a graft on `module` would be lost, and the remedy; None if nothing stands in the way."""
    if never_runs(module):
        return (
            f"its forward never runs: the {op.lower()}'s parent reads its weight",
            "write the parent's attention out with plain linears",
        )
    return owner_obstacle(module) or quantized(module)


def quantized(module: nn.Module, weight: str = "weight") -> tuple[str, str] | None:
    """What says that a module or its weight is quantized; and the remedy."""
    cls = original_class(module)
    if any(base.__module__.startswith(_QUANTIZED) for base in cls.__mro__):
        return f"{cls.__name__} is quantized: quantized layers cannot be grafted", "graft before quantizing"
    tensor = own_parameter(module, weight)
    if tensor is not None and type(tensor) not in _PLAIN_TENSORS and not is_sharded(tensor):
        return f"its weight is a {type(tensor).__name__}, not plain numbers", "graft before quantizing"
    return None


def owner_obstacle(module: nn.Module) -> tuple[str, str] | None:
    """Why a change of what the forward of `module` does would be lost, and the remedy."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled TorchScript, which ignores a change of class", "graft before scripting"
    if _is_kerass(module):
        return "it is a Keras layer, which copies and saves itself in its own way", _REWRITE
    if isinstance(module, LazyModuleMixin):
        return "it is lazy and changes its class at its first forward", "run one forward first"
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "something put a forward on the instance, which hides the class's", "graft before that"
    return None


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight, also where a parametrization or weight norm computes it."""
    weight = own_parameter(module, "weight")
    computed = getattr(module, "weight", None)
    return weight if weight is not None or not isinstance(computed, Tensor) else computed


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter that the module itself holds; what TorchScript keeps its parameters in has no `get`."""
    return module._parameters[name] if name in module._parameters else None  # noqa: SIM401


def foreign(module: nn.Module) -> tuple[str, str] | None:
    """What a module is that is not grafted, since its inside is not torch's own layers; and the remedy."""
    if (found := quantized(module)) is not None:
        return found
    if _is_kerass(module):
        return f"{original_class(module).__name__} is a Keras layer, whose own classes draw", _REWRITE
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled TorchScript: what it draws is not grafted", "graft before scripting"
    return None


def _is_kerass(module: nn.Module) -> bool:
    return any(base.__module__.startswith(("keras.", "tf_keras.")) for base in original_class(module).__mro__)

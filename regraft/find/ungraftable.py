"""Modules where a graft would be lost: known from the module itself, whatever the variant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import LazyModuleMixin

from regraft.find.recognize import never_runs
from regraft.libraries import is_sharded
from regraft.record import original_class

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, FakeTensor)


def obstacle(module: nn.Module, op: str) -> tuple[str, str] | None:
    """Why a graft on `module` would be lost, and the remedy; None if nothing stands in the way."""
    if never_runs(module):
        return (
            f"its forward never runs: the {op.lower()}'s parent reads its weight",
            "write the parent's attention out with plain linears",
        )
    found = owner_obstacle(module)
    if found is not None:
        return found
    return quantized(module)


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


_REWRITE = "write it with torch's layers to graft it"
_QUANTIZED = (
    *(
        "torch.ao.nn.quantized.",
        "torch.ao.nn.qat.",
        "torch.ao.nn.intrinsic.quantized.",
        "torch.ao.nn.intrinsic.qat.",
    ),
    *("bitsandbytes.", "auto_gptq.", "gptqmodel.", "awq.", "hqq."),
)

"""A model that was read as one that rules can be planned against: real torch modules, empty, never run.

Classes come from a table of torch's own; one that is not in it becomes a new, empty class of that name.
Nothing is looked up by what a file says.
"""

from __future__ import annotations

import torch
from torch import nn

from regraft.cli.reading.model import ReadModel
from regraft.cli.reading.tensors import ReadTensor
from regraft.cli.reading.tree import ReadModule

_OWN = {
    cls.__name__: cls
    for cls in (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN),
        *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ReLU, nn.GELU, nn.LayerNorm),
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    )
}
_PLAIN = (str, int, float, bool, type(None))


def skeleton(model: ReadModel) -> nn.Module:
    """The tree of a file as modules on the meta device: for finding sites and planning, not for a forward."""
    made: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}
    classes: dict[tuple[str, str], type[nn.Module]] = {}
    for module in model.modules:
        made[id(module)] = _bare(module, classes)
    for module in model.modules:
        own = made[id(module)]
        for name, tensor in module.tensors.items():
            if id(tensor) not in tensors:
                tensors[id(tensor)] = _empty(tensor)
            made_tensor = tensors[id(tensor)]
            if isinstance(made_tensor, nn.Parameter):
                own._parameters[name] = made_tensor
            else:
                own._buffers[name] = made_tensor
        for name, child in module.children.items():
            own._modules[name] = made[id(child)]
    return made[id(model.root)]


def _bare(module: ReadModule, classes: dict[tuple[str, str], type[nn.Module]]) -> nn.Module:
    key = (module.home, module.type)
    if key not in classes:
        own = _OWN.get(module.type) if module.home.startswith("torch.nn.") else None
        # Of a name that Python would not have, the letters that it would.
        name = "".join(mark for mark in module.type if mark.isalnum() or mark == "_") or "Module"
        classes[key] = own or type(name, (nn.Module,), {"__module__": module.home or __name__})
    made = classes[key].__new__(classes[key])
    nn.Module.__init__(made)
    for name, value in module.attributes.items():
        if isinstance(name, str) and type(value) in _PLAIN and not name.startswith("_") and name != "forward":
            made.__dict__[name] = value
    made.training = module.training
    return made


def _empty(tensor: ReadTensor) -> torch.Tensor:
    dtype = getattr(torch, tensor.dtype or "float32", torch.float32)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    if tensor.trainable and (dtype.is_floating_point or dtype.is_complex):
        return nn.Parameter(empty)
    return empty

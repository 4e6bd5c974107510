"""What a forward keeps for the backward: nothing more where a linear layer multiplies, else one copy."""

from __future__ import annotations

import torch
from readers import Attends, ParentReads
from torch import nn

import regraft


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the tensors that autograd keeps, without the parameters and the input."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), x]}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(sizes.values())


def test_linear_layers_keep_nothing_more():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(4, 64)
    plain = kept(model, x)
    for variant in ("dropconnect(p=0.3)", "dropconnect(p=0.3, noise='gaussian')", "mixout(p=0.3)"):
        regraft.apply(model, {"Linear": variant}, x)
        extra = kept(model, x) - plain
        buffers = sum(one.nbytes for one in model.buffers())  # mixout's own weights
        assert extra <= buffers, variant
        regraft.revert(model)


def test_a_lent_weight_keeps_one_copy():
    for model in (Attends(), ParentReads()):
        x = torch.randn(2, 5, 6)
        plain = kept(model, x)
        regraft.apply(model, {"Linear": "dropconnect(p=0.3)"}, x)
        weights = sum(one.nbytes for name, one in model.named_parameters() if "weight" in name)
        assert kept(model, x) - plain <= weights

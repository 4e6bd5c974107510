"""A model's state and inputs as fake tensors: shapes without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regraft.libraries import is_sharded


def fake_state(model: nn.Module, mode: FakeTensorMode) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tied tensor once."""
    fakes: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = fake(tensor, mode)
        state[name] = fakes[id(tensor)]
    return state


def fake(leaf: Any, mode: FakeTensorMode, device: torch.device | None = None) -> Any:
    """A tensor as a fake one, on `device` or where it is (a meta one: on the CPU); others as they are."""
    if not isinstance(leaf, Tensor):
        return leaf
    if is_sharded(leaf):  # a part of a parameter that FSDP2 shards: the fake one is whole
        with mode:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=device or leaf.device).requires_grad_(
                leaf.requires_grad
            )
    if device is None and not leaf.is_meta:
        return mode.from_tensor(leaf, static_shapes=True)
    with mode:
        if leaf.is_meta:
            return torch.empty_like(leaf, device=device or torch.device("cpu"))
        return mode.from_tensor(leaf, static_shapes=True).to(device)

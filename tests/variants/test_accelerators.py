"""What a variant does on an accelerator, read from its operators on fake `cuda` tensors: no device is needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regraft.variants.registry import names, spec

WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item", "masked_select", "_unique2")
SHAPE = (2, 4, 8, 16)
CASES = [(name, family) for name in names() for family in spec(name).families]
LIMITS = {
    "alpha": 5,
    "concrete": 7,
    "dropblock": 10,
    "dropconnect": 7,
    "drophead": 1,
    "droppath": 1,
    "gaussian": 4,
    "mixout": 9,
    "multisample": 6,
    "neftune": 5,
    "off": 0,
    "spatial": 1,
    "standout": 11,
    "uniform": 4,
    "weightdrop": 7,
}
"""Passes over memory of a forward in training, at most, an embedding's look-up among them; 3 of a variant
that is not named here."""


class Operators(TorchDispatchMode):
    """The operators of a forward that make or write at least so many elements."""

    def __init__(self, elements: int, device: str) -> None:
        super().__init__()
        self.elements, self.device, self.passes = elements, device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        assert name not in WAITS or self.device == "cpu", f"{func} waits for the device"
        assert all(tensor.device.type == self.device for tensor in tensors), f"{func} leaves the device"
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        view = func.is_view or name in ("empty_like", "new_empty", "empty", "detach")
        if not view and any(tensor.numel() >= self.elements for tensor in made):
            self.passes.append(name)
        return out


def module_of(name: str, family: str) -> torch.nn.Module:
    module = spec(name).module_for(family)
    rate = {"p": 0.3} if spec(name).rated else {}
    if issubclass(module, torch.nn.Linear):
        return module(SHAPE[-1], SHAPE[-1], **rate)
    return module(10, SHAPE[-1]) if issubclass(module, torch.nn.Embedding) else module(**rate)


def forward(name: str, family: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = module_of(name, family)
            embeds = isinstance(module, torch.nn.Embedding)
            x = torch.zeros(SHAPE[:-1], dtype=torch.int64) if embeds else torch.randn(SHAPE)
            x = x.requires_grad_(not embeds)
            module(x)  # the first call of a rate may build a table
            with Operators(SHAPE[-1] ** 2, device) as seen:
                module(x)
            return seen.passes
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "family"), CASES, ids=["-".join(case) for case in CASES])
def test_nothing_leaves_the_device_nor_waits_for_it(name, family, dtype):
    with FakeTensorMode():
        forward(name, family, "cuda", dtype)


@pytest.mark.parametrize(("name", "family"), CASES, ids=["-".join(case) for case in CASES])
def test_the_passes_over_memory_that_a_variant_adds(name, family):
    passes = forward(name, family, "cpu")
    assert len(passes) <= LIMITS.get(name, 3), passes


def test_multisample_makes_few_passes_on_every_way_it_draws():
    from regraft import nn

    for options in ({}, {"exact": True}, {"num_samples": 255}):
        with FakeTensorMode(), torch.device("cuda"):
            module, x = nn.MultiSampleDropout(0.3, **options), torch.randn(1 << 22, requires_grad=True)
            with Operators(x.numel(), "cuda") as seen:
                module(x)
        assert len(seen.passes) <= 8, seen.passes


def test_a_search_among_the_tails_counts_what_comparisons_count():
    """The way of an accelerator, run here: the same draw gives the same count."""
    from regraft.variants.multisample import _edges, _passed, _tails

    torch.manual_seed(0)
    draw = torch.rand(1 << 16, dtype=torch.float64)
    for p, samples in ((0.1, 8), (0.5, 255), (1e-6, 8), (0.999, 3)):
        tails = _tails(samples, p)
        found = torch.bucketize(1 - draw, _edges(tails, draw), right=True)
        assert torch.equal(found, _passed(draw, tails).long())

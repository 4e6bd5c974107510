"""What the variants cost in memory, and that nothing waits for a copy between host and device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regraft import nn

SHAPE = (32, 128, 256)
SIZE = 32 * 128 * 256 * 4
"""Bytes of the input."""

MODULES = {
    "dropout": nn.Dropout(0.1),
    "gaussian": nn.GaussianDropout(0.1),
    "multisample": nn.MultiSampleDropout(0.1),
    "uniform": nn.UniformDropout(0.1),
    "spatial": nn.SpatialDropout(0.1),
    "token": nn.TokenDropout(0.1),
    "droppath": nn.DropPath(0.1),
    "standout": nn.StandoutDropout(0.1),
    "concrete": nn.ConcreteDropout(0.1),
    "alpha": nn.AlphaDropout(0.1),
    "mc": nn.MCDropout(0.1).eval(),
    "consistent": nn.ConsistentDropout(0.1).eval(),
    "dropblock": nn.DropBlock(0.1),
}


def peak_bytes(run) -> int:
    """The most that was allocated at once, on the operators' own way included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        kept = run()
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del kept
    return peak


def saved_bytes(module, x) -> int:
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = {x.untyped_storage()._cdata, *(p.untyped_storage()._cdata for p in module.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(size for key, size in saved.items() if key not in own)


@pytest.mark.parametrize("name", MODULES)
def test_no_more_than_one_mask_is_kept_for_the_backward_pass(name):
    x = torch.randn(SHAPE, requires_grad=True)
    limit = {"multisample": SIZE / 4, "spatial": SIZE / 100, "token": SIZE / 100, "droppath": SIZE / 1000}
    assert saved_bytes(MODULES[name], x) <= limit.get(name, SIZE)


@pytest.mark.parametrize("name", MODULES)
def test_no_more_than_one_mask_is_needed_beside_the_output(name):
    x = torch.randn(SHAPE, requires_grad=True)
    MODULES[name](x)  # the first call makes the table
    assert SIZE <= peak_bytes(lambda: MODULES[name](x)) <= 2 * SIZE + 8192


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_multisample_needs_on_the_way_is_small_too(exact, dtype):
    module, x = nn.MultiSampleDropout(0.1, exact=exact), torch.randn(8 << 20).to(dtype)
    module(x)
    size = x.numel() * x.element_size()
    most = 1.3 if dtype is torch.float32 else 2.6
    assert size <= peak_bytes(lambda: module(x)) <= most * size


def test_backward_needs_no_more_than_one_mask_beside_the_gradient():
    x = torch.randn(SHAPE, requires_grad=True)
    for module in (nn.MultiSampleDropout(0.1), nn.GaussianDropout(0.1), nn.AlphaDropout(0.1)):
        y, upstream = module(x), torch.randn(SHAPE)
        assert SIZE <= peak_bytes(lambda y=y, g=upstream: torch.autograd.grad(y, x, g)) <= 2 * SIZE + 8192


class SameDevice(TorchDispatchMode):
    """Refuses what would wait for a device: a number read from it, a tensor copied to or from it."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert func.overloadpacket._qualified_op_name.split("::")[1] not in self.READS, func
        assert all(tensor.is_meta for tensor in tensors), f"{func} leaves the device"
        return out


DEVICE = {
    **{name: type(module) for name, module in MODULES.items()},
    "alpha": nn.AlphaDropout,
    "concrete": nn.ConcreteDropout,
    "consistent": nn.ConsistentDropout,
    "dropblock": nn.DropBlock,
    "mc": nn.MCDropout,
    "standout": nn.StandoutDropout,
    "exact": lambda p: nn.MultiSampleDropout(p, exact=True),
    "dropconnect": lambda p: nn.DropConnectLinear(256, 256, p=p),
    "by example": lambda p: nn.DropConnectLinear(256, 256, p=p, mask="example"),
    "mixout": lambda p: nn.MixoutLinear(256, 256, p=p),
    "standout linear": lambda p: nn.StandoutLinear(256, 256, p=p),
    "learned gate": lambda p: nn.StandoutDropout(p, gate="learned", features=256),
    "learned gate of a linear": lambda p: nn.StandoutLinear(256, 256, p=p, gate="learned"),
}


@pytest.mark.parametrize("name", DEVICE)
def test_nothing_leaves_the_device_nor_waits_for_it(name):
    """On the meta device, where there is nothing to wait for: the operators are the same."""
    with torch.device("meta"):
        module = DEVICE[name](0.1)
    x = torch.randn(2, 8, 256, device="meta", requires_grad=True)
    for p in (0.1, 0.2, 0.1, 1e-6):  # a schedule changes it
        module.p = p
        with SameDevice():
            module(x).sum().backward()


def test_neftune_stays_on_the_device():
    with torch.device("meta"):
        module = nn.NEFTuneEmbedding(10, 64)
    tokens = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    with SameDevice():
        module(tokens).sum().backward()


def test_what_leaves_the_device_is_seen():
    x = torch.ones(3, device="meta")
    with SameDevice(), pytest.raises(AssertionError, match="leaves the device"):
        x * torch.tensor([0.5]).to("meta")


def test_a_table_is_made_once_for_each_rate():
    module, made = nn.MultiSampleDropout(0.37), []

    class Ranges(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.extend([func] if "arange" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with Ranges():
        for _ in range(3):
            module(torch.ones(8))
    assert len(made) == 1


def test_a_table_made_inside_a_transform_does_not_outlive_it():
    from regraft.variants.multisample import _tables

    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    module = nn.MultiSampleDropout(0.4321)
    torch.func.grad(lambda x: module(x).sum())(torch.ones(4))
    assert not any(map(wrapped, _tables.values()))
    assert module(torch.ones(4)).isfinite().all()
    torch.func.vmap(torch.func.grad(lambda x: module(x).sum()), randomness="different")(torch.ones(3, 4))
    assert module(torch.ones(4)).isfinite().all()


def test_tables_do_not_pile_up():
    from regraft.variants.multisample import _tables

    module = nn.MultiSampleDropout()
    for step in range(1, 150):
        module.p = step / 200
        module(torch.ones(8))
    assert len(_tables) <= 64


def test_dropconnect_by_example_never_makes_a_mask_of_rows_by_in_by_out():
    module = nn.DropConnectLinear(64, 48, p=0.3, mask="example")
    x = torch.randn(128, 64, requires_grad=True)
    assert peak_bytes(lambda: module(x).sum().backward()) < 128 * 64 * 48 * 4 / 4

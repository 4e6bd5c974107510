"""Promise 7: DDP and FSDP2, grafted before and after wrapping, on one process."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import regraft
from regraft.errors import ModelError

X = torch.randn(4, 6)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(net, mesh):
    for module in (net[0], net[3], net):
        fully_shard(module, mesh=mesh)
    return net


RULES = {"Dropout": "gaussian(p=0.5)", "Linear": "dropconnect(p=0.5)"}


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    output = model(X)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(_full(a), _full(b)) for a, b in zip(before, model.parameters(), strict=True))
    return output


def _full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("order", ["graft first", "shard first"])
def test_fsdp2_trains_and_reverts(group, order):
    net = tiny.mlp()
    if order == "graft first":
        regraft.apply(net, RULES)
        sharded(net, group)
    else:
        sharded(net, group)
        report = regraft.apply(net, RULES)
        assert [edit.op for edit in report.grafted] == ["Linear", "Dropout", "Linear"]
    assert all(type(p).__name__ == "DTensor" or not isinstance(p, nn.Parameter) for p in net.parameters())
    names = [type(module).__name__ for module in net]
    assert names[2] == "GaussianDropout"
    assert names[0] == "FSDPDropConnectLinear"
    assert not torch.equal(step(net), step(net))
    net.eval()
    expected = net(X)
    regraft.revert(net)
    assert [type(module).__name__ for module in net] == ["FSDPLinear", "ReLU", "Dropout", "FSDPLinear"]
    assert hasattr(net, "reshard")
    assert torch.equal(net(X), expected)
    assert list(net.state_dict()) == list(tiny.mlp().state_dict())
    step(net.train())
    regraft.apply(net, RULES)
    step(net)


def test_fsdp2_calls(group):
    net = tiny.Calls(tiny.Calls(nn.Linear(6, 6)), p=0.5)
    for module in (net.child, net):
        fully_shard(module, mesh=group)
    before = [type(module) for module in net.modules()]
    report = regraft.apply(net, {"Dropout": "off"}, X)
    assert len(report.grafted) == 2, report
    assert torch.equal(net(X), net(X))
    regraft.revert(net)
    assert [type(module) for module in net.modules()] == before
    assert not torch.equal(net(X), net(X))


@pytest.mark.parametrize("order", ["graft first", "wrap first"])
def test_ddp_trains_and_reverts(group, order):
    net = tiny.mlp()
    classes = [type(module) for module in net]
    if order == "graft first":
        regraft.apply(net, RULES)
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        wrapped = nn.parallel.DistributedDataParallel(net)
        report = regraft.apply(wrapped, RULES)
        assert [edit.path for edit in report.grafted] == ["0", "2", "3"]
        assert report.model == "Sequential"
        assert report.notes[0].startswith("looked inside DistributedDataParallel")
    assert not torch.equal(step(wrapped), step(wrapped))
    assert type(regraft.revert(wrapped)) is nn.parallel.DistributedDataParallel
    assert [type(module) for module in net] == classes
    assert list(net.state_dict()) == list(tiny.mlp().state_dict())
    step(wrapped)


def test_fsdp1_is_refused_with_the_remedy(group):
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = FullyShardedDataParallel(tiny.mlp(), device_id=torch.device("cpu"))
        except (RuntimeError, ValueError, AttributeError):  # torch builds that refuse it on a CPU
            wrapped = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(ModelError, match="flattens the parameters[\\s\\S]*help: graft before wrapping"):
        regraft.apply(wrapped, RULES)

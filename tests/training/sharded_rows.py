"""Two processes, started by `test_max_norm.py`: the norms of rows that are spread over both."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from transformers.pytorch_utils import Conv1D

import regraft


def build():
    torch.manual_seed(0)
    # The rows of GPT-2's Conv1D are its columns, which FSDP shards across.
    net = nn.Sequential(nn.Linear(7, 6), Conv1D(5, 6), nn.Linear(5, 3))
    for p in net.parameters():
        p.data.mul_(2)
    return net


def steps(net, limits):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.3)
    held = regraft.max_norm(net, limits, optimizer)
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return held, [
        p.full_tensor() if hasattr(p, "full_tensor") else p for p in (q.detach() for q in net.parameters())
    ]


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for limits in ({"Linear": 0.9, "Conv1D": 1.2}, {"*@**": "1.1x"}):
        held, expected = steps(build(), limits)
        assert held.first["over"] > 0
        for wrap in ("fsdp", "tensor parallel"):
            net = build()
            if wrap == "fsdp":
                for module in (net[0], net[1], net[2], net):
                    fully_shard(module, mesh=mesh)
            else:
                parallelize_module(net, mesh, {"2": RowwiseParallel(input_layouts=Replicate())})
            _, found = steps(net, limits)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    print(f"rank {rank}: as one process")
    # Leave without taking the interpreter apart: gloo's threads may still hold tensors, and torch then aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

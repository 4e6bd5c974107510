"""Lent weights under FSDP2, in two processes: run by test_sharded.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
import torch.distributed as dist
from lending import lend, weights
from readers import Attends, ParentReads
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regraft.errors import ModelError


def main() -> None:
    rank, port = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    whole = nn.Sequential(Attends(), ParentReads())
    torch.manual_seed(0)
    model = nn.Sequential(Attends(), ParentReads())
    chosen = weights(model, x)
    lend(model, chosen)
    lend(whole, weights(whole, x))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        torch.manual_seed(7)
        wanted = whole(x)
        wanted.square().sum().backward()
        torch.manual_seed(7)
        got = model(x)
        got.square().sum().backward()
        torch.testing.assert_close(got, wanted)
        for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            if other.grad is None:  # a bias that its parent does not read
                continue
            torch.testing.assert_close(
                parameter.grad.full_tensor(), other.grad, msg=lambda text, name=name: f"{name}: {text}"
            )
        model.zero_grad(), whole.zero_grad()
    late = ParentReads()
    lend(late, weights(late, x))
    fully_shard(late.qkv, mesh=mesh)
    try:
        late(x)
    except ModelError as error:
        assert "FSDP" in str(error)
    else:
        raise AssertionError("a weight gathered below its reader was not refused")
    dist.destroy_process_group()
    print("both the same", flush=True)


if __name__ == "__main__":
    main()

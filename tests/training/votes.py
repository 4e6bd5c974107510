"""Whether two processes of DDP repeat the batch, where only some of them could show that it is one."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import regraft


class TimeOrBatch(nn.Module):
    """A network whose first axis is the batch, or, for one process alone, time."""

    def __init__(self, recurrent):
        super().__init__()
        self.layer, self.drop, self.recurrent = nn.RNN(4, 4), nn.Dropout(0.5), recurrent

    def forward(self, x):
        x = self.drop(x)
        return self.layer(x)[0] if self.recurrent else self.layer(x[None])[0][0]


def lengths(model, x):
    """How long the batches of the real forwards are."""
    seen = []
    hook = model.module.drop.register_forward_hook(lambda _, args, output: seen.append(len(output)))
    loss = regraft.stochastic_passes(model, 2, x).sum()
    hook.remove()
    loss.backward()
    return [length for length in seen if length in (6, 12)]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    equal, different = torch.ones(6, 4), torch.rand(6, 4)
    model = DistributedDataParallel(TimeOrBatch(recurrent=False))
    found = [
        lengths(model, equal if rank else different)[-2:],  # process 1 can show nothing: both loop
        lengths(model, different)[-1:],  # both can: both repeat
        lengths(DistributedDataParallel(TimeOrBatch(recurrent=rank == 1)), different)[-2:],
    ]
    every = [None, None]
    dist.all_gather_object(every, found)
    if rank == 0:
        print(every[0] == every[1], found)
    # Leave without taking the interpreter apart: gloo's threads may still hold tensors, and torch then aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Trains a small BERT with R-Drop in two processes; each prints one line of JSON. Run by test_many.py."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import regraft
from regraft.training.rdrop.state import state_of
from tests.training.models import bert, tokens

WAY, FOLDER = sys.argv[1:3]


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.3).train()
    if WAY == "ddp, wrapped first":
        model = DistributedDataParallel(model)
        regraft.rdrop(model, alpha=0.5)
    elif WAY == "ddp":
        model = DistributedDataParallel(regraft.rdrop(model, alpha=0.5))
    else:
        from torch.distributed.fsdp import fully_shard

        regraft.rdrop(model, alpha=0.5)
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(rank)  # the same weights, other masks
    y = torch.tensor([0, 1, 0, 1])
    outputs = model(input_ids=tokens(), labels=y)
    first = outputs.loss.item()
    outputs.loss.backward()
    optimizer.step()
    losses = []
    with torch.no_grad():
        for _ in range(40):
            losses.append(model(input_ids=tokens(), labels=y).loss.item())
    kl = state_of(model).terms.kl.item()
    if WAY == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        state = model.module.state_dict()
    if rank == 0:
        torch.save(state, os.path.join(FOLDER, "model.pt"))
    line = {
        "first": first,
        "logits": outputs.logits.flatten().tolist(),
        "mean": sum(losses) / len(losses),
        "kl": kl,
    }
    every = [None, None]
    dist.all_gather_object(every, line)
    if rank == 0:
        print(json.dumps(every))
    # Leave without taking the interpreter apart: gloo's threads may still hold tensors, and torch then aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Runs recipes/bert.py as one of several processes, and prints what each of them did. Run by test_recipe_many.py.

With "fsdp" as its first argument it shards the model as `accelerate launch --use_fsdp` does on GPUs. accelerate
offers that for accelerators alone, so here it is told that this process has one.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer

WAY = sys.argv.pop(1)
RECIPE = Path(__file__).parents[2] / "recipes" / "bert.py"
sys.path.insert(0, str(RECIPE.parent))  # as python itself does for a script
runs = []


def watched(train):
    def run(self, *args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            draw = torch.rand(()).item()
        result = train(self, *args, **kwargs)
        state = self.accelerator.get_state_dict(self.model)
        weight = state.get(
            "classifier.weight", torch.zeros(0)
        )  # of a sharded model the first process has all
        sharded = any(type(one).__name__ == "DTensor" for one in self.model.parameters())
        wrapped = type(self.model_wrapped).__name__
        losses = {"loss": result.training_loss, "weight": weight.flatten()[:4].tolist()}
        runs.append({"draw": draw, "sharded": sharded, "wrapped": wrapped, **losses})
        return result

    return run


def as_if_accelerated():
    from accelerate.state import DistributedType, PartialState

    def prepare(self, *_, **__):
        self.device = torch.device("cpu")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare
    dist.init_process_group("gloo")
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    }


if WAY == "fsdp":
    as_if_accelerated()
torch.set_num_threads(1)
Trainer.train = watched(Trainer.train)
runpy.run_path(str(RECIPE), run_name="__main__")
every = [runs]
if dist.is_initialized():
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, runs)
if int(os.environ.get("RANK", "0")) == 0:
    print("\n" + json.dumps(every))
if dist.is_initialized():
    # Leave without taking the interpreter apart: gloo's threads may still hold tensors, and torch then aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

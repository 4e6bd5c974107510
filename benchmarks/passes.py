"""What several stochastic passes cost: a training step of R-Drop, and Monte Carlo prediction.

    python benchmarks/passes.py                     # a few minutes on two cores
    python benchmarks/passes.py --device cuda
    torchrun --standalone --nproc-per-node 2 benchmarks/passes.py --threads 1 --fsdp2

Every method takes its turn in every round, in an order that rotates, and is divided by the single pass of
the same round; shown are the medians of those ratios. Memory is the peak above the model and its inputs, of
a process that does nothing else (on a GPU: of the allocator).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from timing import in_turns, peak_bytes
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.training.rdrop.infer_loss import OwnLoss
from regraft.training.rdrop.state import state_of

PLACES = ("head", "last third", "last half", "everywhere")
FORKS = {"fork at two thirds": 2 / 3, "fork at five sixths": 5 / 6}
RATE = 0.1
SAMPLES = 32


def vit(place):
    """ViT-tiny on small images: 12 blocks of width 192."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10)
    put(place, model.head_drop, model.blocks)
    if place == "everywhere":
        model.pos_drop.p = RATE
    return model, {"x": torch.randn(16, 3, 96, 96)}, torch.randint(0, 10, (16,))


def bert(place):
    """BERT-mini: 4 layers of width 256."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    model = BertForSequenceClassification(config)
    put(place, model.dropout, model.bert.encoder.layer)
    if place == "everywhere":
        model.bert.embeddings.dropout.p = RATE
    return model, {"input_ids": torch.randint(0, 30_000, (16, 64))}, torch.randint(0, 10, (16,))


def put(place, head, blocks):
    """Set the rates: in the head, in the last blocks too, or in all. A third of 4 blocks is 1."""
    head.p = RATE
    share = {"head": 0, "last third": 1 / 3, "last half": 1 / 2, "everywhere": 1}[place]
    count = round(share * len(blocks))
    for block in blocks[len(blocks) - count :]:
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = RATE


def forked_vit(place):
    """6 blocks, so that two thirds and five sixths are whole blocks; dropout everywhere."""
    from timm.models.vision_transformer import VisionTransformer

    del place
    rates = {"drop_rate": RATE, "proj_drop_rate": RATE, "pos_drop_rate": RATE}
    sizes = {"img_size": 96, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(**sizes, **rates), {"x": torch.randn(16, 3, 96, 96)}, torch.randint(0, 10, (16,))


def forked_bert(place):
    from transformers import BertConfig, BertForSequenceClassification

    del place
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}
    model = BertForSequenceClassification(BertConfig(num_labels=10, **sizes))
    return model, {"input_ids": torch.randint(0, 30_000, (16, 64))}, torch.randint(0, 10, (16,))


def large_vocabulary(dtype):
    """A small Llama with 128,000 tokens: nearly all of a step's memory is its logits'."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128_000, attention_dropout=RATE, **sizes))
    ids = torch.randint(0, 128_000, (4, 64))
    return model.to(dtype).train(), {"input_ids": ids, "labels": ids}


def vocabulary_memory(device):
    """Peak of an R-Drop step over that of the two passes alone, with their own losses."""
    for dtype in (torch.bfloat16, torch.float32):
        model, inputs = large_vocabulary(dtype)
        model.to(device)
        inputs = {name: value.to(device) for name, value in inputs.items()}

        def step(model=model, inputs=inputs):
            model(**inputs).loss.backward()
            model.zero_grad()

        def alone(model=model, inputs=inputs):
            sum(model(**inputs).loss for _ in range(2)).backward()
            model.zero_grad()

        alone()
        single = peak_bytes(alone, cuda=device == "cuda")
        for name, options in {"plain": {}, "its own": {"loss": "loss"}}.items():
            regraft.rdrop(model, strategy="loop", **options)
            if name == "plain":  # to show it of so many classes takes more forwards than rdrop makes
                state = state_of(model)
                state.own, state.resolved = (
                    OwnLoss(True, True),
                    dataclasses.replace(state.options, shift=True),
                )
            step()
            ratio = peak_bytes(step, cuda=device == "cuda") / single
            print(f"R-Drop memory, 128,000 tokens, {dtype}, {name}: {ratio:.2f} of two passes", flush=True)
            regraft.revert(model)


MODELS = {"ViT-tiny": vit, "BERT-mini": bert}
FORKED = {"ViT of 6 blocks": forked_vit, "BERT of 6 layers": forked_bert}


def logits(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def doubled(inputs, n):
    return {name: torch.cat([value] * n) for name, value in inputs.items()}


def training(model, inputs, labels):
    """The methods of a training step, each up to its gradients."""

    def step(loss):
        loss.backward()
        model.zero_grad(set_to_none=True)

    def authors():
        both = logits(model(**doubled(inputs, 2))).unflatten(0, (2, -1))
        step(regraft.rdrop_loss(both, labels))

    return {
        "single pass": lambda: step(F.cross_entropy(logits(model(**inputs)), labels)),
        "two forwards": lambda: step(
            regraft.rdrop_loss(torch.stack([logits(model(**inputs)) for _ in range(2)]), labels)
        ),
        "doubled batch": authors,
        "regraft": lambda: step(
            regraft.rdrop_loss(logits(regraft.stochastic_passes(model, 2, **inputs)), labels)
        ),
    }


def prediction(model, inputs, labels):
    """The methods of Monte Carlo prediction, each up to its mean and variance; the model stays in training
    mode for those that know no better, which is the same here: it has no BatchNorm."""
    del labels

    def moments(passes):
        p = passes.softmax(-1)
        return p.mean(0), p.var(0)

    def looped():
        return moments(torch.stack([logits(model(**inputs)) for _ in range(SAMPLES)]))

    def repeated():
        parts = [logits(model(**doubled(inputs, 8))).unflatten(0, (8, -1)) for _ in range(SAMPLES // 8)]
        return moments(torch.cat(parts))

    methods = {
        "single pass": lambda: logits(model(**inputs)).softmax(-1),
        f"{SAMPLES} forwards": looped,
        "batch of 8 passes": repeated,
        "regraft": lambda: regraft.mc_predict(model, SAMPLES, **inputs),
    }
    methods |= rivals(model, inputs)
    return {name: no_gradient(method) for name, method in methods.items()}


def forking(model, inputs, labels):
    """Passes that part late, of a model with dropout everywhere, beside the doubled batch."""
    methods = training(model, inputs, labels)
    for name, fork in FORKS.items():

        def step(fork=fork):
            passes = regraft.stochastic_passes(model, 2, fork=fork, **inputs)
            regraft.rdrop_loss(logits(passes), labels).backward()
            model.zero_grad(set_to_none=True)

        methods[name] = step
    return methods


def forked_prediction(model, inputs, labels):
    del labels
    methods = {"single pass": lambda: logits(model(**inputs))}
    for name, fork in FORKS.items():
        methods[name] = lambda fork=fork: logits(
            regraft.stochastic_passes(model, SAMPLES, fork=fork, **inputs)
        )
    return {name: no_gradient(method) for name, method in methods.items()}


def rivals(model, inputs):
    """Other packages' wrappers, where they are installed."""
    found = {}
    if find_spec("baal") is not None:
        from baal.bayesian.dropout import patch_module

        wrapped = patch_module(model, inplace=False).eval()
        found["baal"] = lambda: torch.stack([logits(wrapped(**inputs)) for _ in range(SAMPLES)]).var(0)
    if find_spec("torch_uncertainty") is not None:
        from torch_uncertainty.methods import mc_dropout

        ensemble = mc_dropout(Logits(model, inputs), num_estimators=SAMPLES, on_batch=False).eval()
        found["torch-uncertainty"] = lambda: ensemble(next(iter(inputs.values())))
    return found


class Logits(nn.Module):
    """A model of one tensor, for packages that take no other."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.name = model, next(iter(inputs))

    def forward(self, x):
        return logits(self.model(**{self.name: x}))


def no_gradient(method):
    @functools.wraps(method)
    def run():
        with torch.no_grad():
            return method()

    return run


JOBS = {
    "R-Drop step": (training, MODELS, PLACES),
    f"MC n={SAMPLES}": (prediction, MODELS, PLACES),
    "R-Drop step, fork": (forking, FORKED, ("everywhere",)),
    f"MC n={SAMPLES}, fork": (forked_prediction, FORKED, ("everywhere",)),
}


def sharded(arguments):
    """A step of R-Drop with dropout in the head, of models that torchrun's processes shard by FSDP2."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, inputs, labels = build("head")
        for block in model.blocks if hasattr(model, "blocks") else model.bert.encoder.layer:
            fully_shard(block)
        fully_shard(model.train())
        ratios, single = in_turns(training(model, inputs, labels), arguments.rounds, "cpu", "single pass")
        if dist.get_rank() == 0:
            show({"case": f"R-Drop step, FSDP2, {name}, head", "single_ms": single * 1e3, "ratios": ratios})
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still hold tensors


def built(job, name, place, device):
    torch.manual_seed(0)
    methods, models, _ = JOBS[job]
    model, inputs, labels = models[name](place)
    model.train().to(device)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    return methods(model, inputs, labels.to(device))


def peak(job, name, place, method, device):
    """MiB above the model and its inputs, in this process, which did nothing else."""
    methods = built(job, name, place, device)
    if device == "cuda":
        methods[method]()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        methods[method]()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    methods[method]()  # the analysis of the model, which comes once, is no part of a step
    gc.collect()
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak starts anew; getrusage's is the parent's at first
    before = resident("VmRSS")
    for _ in range(3):
        methods[method]()
    return resident("VmHWM") - before


def resident(name):
    """MiB of this process, of Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def peak_elsewhere(arguments, *what):
    command = [sys.executable, "-W", "ignore", __file__, "--peak", json.dumps(what)]
    command += ["--threads", str(arguments.threads), "--device", arguments.device]
    # What a step frees goes back to the system, as without this small tensors would not.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.strip().split("\n")[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", default="", help="part of a line's name")
    parser.add_argument("--output", type=Path, help="also as JSON")
    parser.add_argument("--fsdp2", action="store_true", help="in two processes, under torchrun")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.fsdp2:
        sharded(arguments)
    if arguments.peak:
        print(peak(*json.loads(arguments.peak), arguments.device))
        return
    if arguments.only in "R-Drop memory, 128,000 tokens":
        vocabulary_memory(arguments.device)
    lines = []
    for job, (_, models, places) in JOBS.items():
        for name in models:
            for place in places:
                title = f"{job}, {name}, {place}"
                if arguments.only not in title:
                    continue
                methods = built(job, name, place, arguments.device)
                rounds = arguments.rounds if job.startswith("R-Drop") else max(3, arguments.rounds // 3)
                ratios, single = in_turns(methods, rounds, arguments.device, "single pass")
                line = {"case": title, "single_ms": single * 1e3, "ratios": ratios}
                if not arguments.no_memory:
                    line["peak_mib"] = {m: peak_elsewhere(arguments, job, name, place, m) for m in methods}
                lines.append(line)
                show(line)
    if arguments.output:
        arguments.output.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


def show(line):
    print(f"{line['case']} (single pass {line['single_ms']:.0f} ms)")
    for name, ratio in line["ratios"].items():
        memory = f"{line['peak_mib'][name]:8.0f} MiB" if "peak_mib" in line else ""
        print(f"    {name:20} {ratio:6.2f}x {memory}", flush=True)


if __name__ == "__main__":
    main()

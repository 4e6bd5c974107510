"""What a graft itself costs: in a training step, and when it is made.

    python benchmarks/overhead.py                  # two minutes on one core
    python benchmarks/overhead.py --device cuda
    python benchmarks/overhead.py --weights        # dropconnect over every Linear instead

A step of AdamW on a tiny BERT whose every dropout, attention's included, is grafted with plain `dropout`,
which computes what the model computed: what is more than 1.00 is the graft. The sites that are calls are
reached while the forward runs, so that a small model, in which Python is most of a step, shows them best.
Then the seconds of `inspect` (with its two forwards on fake tensors), `apply` and `revert` for large models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from timing import in_turns

import regraft


def bert(attention):
    """Width 128, 4 layers, 16 x 64 tokens: a step is short."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config).train()


def bert_mini():
    """BERT-mini with 32 x 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    return BertForSequenceClassification(config).train()


def vit_tiny():
    """ViT-tiny with 64 images."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=10).train()


def bert_large():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    return BertForSequenceClassification(config).train()


def vit_large():
    import timm

    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    return timm.create_model("vit_large_patch16_224", **rates).train()


def step_of(model, device, shape=(16, 64)):
    """A step of AdamW on so many tokens or images."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    images = len(shape) == 4
    x = torch.randn(shape, device=device) if images else torch.randint(5, 1000, shape, device=device)
    labels = torch.randint(0, 2, shape[:1], device=device)

    def step():
        out = torch.nn.functional.cross_entropy(model(x), labels) if images else model(x, labels=labels).loss
        out.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_step(build, rules, arguments, shape=(16, 64)):
    """The ratio of a grafted step to a plain one, the plain one's seconds, and how many sites there are."""
    plain, grafted = build(), build()
    report = regraft.apply(grafted, rules)
    methods = {
        "plain": step_of(plain, arguments.device, shape),
        "grafted": step_of(grafted, arguments.device, shape),
    }
    ratios, seconds = in_turns(methods, arguments.rounds, arguments.device, "plain")
    return ratios["grafted"], seconds, len(report.grafted)


def making(build, repeats):
    """Median seconds of `inspect`, `apply` and `revert`, each time on a model that was just built."""
    taken = {"inspect": [], "apply": [], "revert": []}
    for _ in range(repeats):
        model = build()
        for name, run in (
            ("inspect", lambda model=model: regraft.inspect(model)),
            ("apply", lambda model=model: regraft.apply(model, {"Dropout": "gaussian"})),
            ("revert", lambda model=model: regraft.revert(model)),
        ):
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", action="store_true", help="the step of dropconnect over every Linear")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    results = {"step": {}, "seconds": {}}
    dropouts = {"Dropout": "dropout"}
    steps = {name: (partial(bert, name), dropouts, arguments) for name in ("eager", "sdpa")}
    if arguments.weights:
        weights = {"Linear": "dropconnect(p=0.3)"}
        steps = {
            "BERT-mini": (bert_mini, weights, arguments, (32, 128)),
            "ViT-tiny": (vit_tiny, weights, arguments, (64, 3, 224, 224)),
        }
    for name, step in steps.items():
        ratio, seconds, sites = training_step(*step)
        results["step"][name] = {"ratio": ratio, "milliseconds": seconds * 1e3, "sites": sites}
        print(f"step, {name:5} {sites} sites {seconds * 1e3:7.1f} ms plain   {ratio:.3f}x", flush=True)
    for name, build in () if arguments.weights else (("BERT-large", bert_large), ("ViT-L", vit_large)):
        found = results["seconds"][name] = making(build, arguments.repeats)
        print(
            f"{name:10}", "  ".join(f"{verb} {seconds:.2f} s" for verb, seconds in found.items()), flush=True
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

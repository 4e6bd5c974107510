"""What max-norm costs: AdamW steps of timm's ViT-tiny, with and without, in interleaved pairs.

    python benchmarks/max_norm.py                  # half a minute on one core
    python benchmarks/max_norm.py --device cuda

Each pair is a step without and a step with, in alternating order; shown are the medians of the pairs'
ratios, of whole training steps (forward, backward, AdamW) and of `optimizer.step()` alone. "within" is the
usual case, in which no row is over its bound; in "clipping" nearly every row is, at every step.
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from timing import in_turns
from torch.nn import functional as F

import regraft

BOUNDS = {"within": 1e3, "clipping": 0.1}


def build(device, batch, image):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=image, num_classes=10).to(device).train()
    x, y = torch.randn(batch, 3, image, image, device=device), torch.randint(0, 10, (batch,), device=device)
    return model, x, y


def measure(bound, args):
    made = []
    for limited in (False, True):
        model, x, y = build(args.device, args.batch, args.image)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        if limited:
            regraft.max_norm(model, {"Linear": bound}, optimizer)

        def whole(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        whole()
        made.append((whole, optimizer.step))
    (train, step), (train_limited, step_limited) = made
    measured = {}
    for part, rounds, plain, limited in (
        ("training step", args.rounds, train, train_limited),
        ("optimizer.step()", 4 * args.rounds, step, step_limited),
    ):
        ratios, seconds = in_turns({"without": plain, "with": limited}, rounds, args.device, "without")
        measured[part] = ratios["with"], seconds
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "max-norm scales back")
    results = {}
    print(f"torch {torch.__version__}, {args.device}, batch {args.batch} of {args.image} x {args.image}")
    for name, bound in BOUNDS.items():
        for part, (ratio, seconds) in measure(bound, args).items():
            results[f"{name}, {part}"] = {"ratio": ratio, "milliseconds": seconds * 1e3}
            print(f"{name:9} {part:17} {seconds * 1e3:8.2f} ms without   {100 * (ratio - 1):+6.2f} %")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()

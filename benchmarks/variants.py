"""How much the variants cost: forward and backward, as ratios to torch's own dropout and linear layer.

    python benchmarks/variants.py                      # CPU, one thread and all
    python benchmarks/variants.py --memory             # bytes kept, and needed on the way
    python benchmarks/variants.py --device cuda --dtype bfloat16
    python benchmarks/variants.py --compile            # under torch.compile, both sides

Each figure is the median of ratios of single runs taken in turns, so that whatever else the machine does
meanwhile falls on both sides; half seconds in which other programs ran are measured again. Rivals are what
one would write, or install, instead.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import rivals
import torch
from timing import IMAGES, RATE, SHAPE, WEIGHTS, Row, memory, ratio
from torch import nn

import regraft

rnn = regraft.nn


def dropouts() -> list[Row]:
    return [
        Row("dropout", lambda: rnn.Dropout(RATE)),
        Row("gaussian", lambda: rnn.GaussianDropout(RATE), 0.7),
        Row("multisample, K = 8", lambda: rnn.MultiSampleDropout(RATE), 0.75),
        Row("multisample, K = 8, exact", lambda: rnn.MultiSampleDropout(RATE, exact=True)),
        Row("uniform", lambda: rnn.UniformDropout(RATE), 0.7),
        Row("spatial", lambda: rnn.SpatialDropout(RATE), 0.15),
        Row("token", lambda: rnn.TokenDropout(RATE)),
        Row("droppath", lambda: rnn.DropPath(RATE), 0.15),
        Row("standout, tied", lambda: rnn.StandoutDropout(RATE), 2.5),
        Row("standout, learned", lambda: rnn.StandoutDropout(RATE, gate="learned", features=SHAPE[-1])),
        Row("concrete", lambda: rnn.ConcreteDropout(RATE), 4),
        Row("alpha", lambda: rnn.AlphaDropout(RATE)),
        Row("dropblock", lambda: rnn.DropBlock(RATE), shape=IMAGES),
        Row("dropblock, coupled channels", lambda: rnn.DropBlock(RATE, couple_channels=True), shape=IMAGES),
        Row("elementwise", lambda: rnn.ElementwiseDropout(RATE)),
        Row("shaped, [None, 1, None]", lambda: rnn.ShapedDropout(RATE, noise_shape=[None, 1, None])),
        Row("noise", lambda: rnn.GaussianNoise(0.1)),
        Row("drophead", lambda: rnn.DropHead(RATE), shape=WEIGHTS),
        Row("dropkey, column", lambda: rnn.DropKey(RATE), shape=WEIGHTS),
        Row("dropkey, element", lambda: rnn.DropKey(RATE, keys="element"), shape=WEIGHTS),
        Row("mc, in eval", lambda: rnn.MCDropout(RATE), evaluating=True),
        Row("consistent, in eval", lambda: rnn.ConsistentDropout(RATE), evaluating=True),
        Row("neftune", lambda: rivals.Written(regraft.variants.neftune.neftune)),
    ]


def linear(rows: int, inside: int, outside: int, target: float, mask: str) -> list[Row]:
    name = f"dropconnect, mask per {mask}, {rows} x {inside} x {outside}"
    shape = (rows, inside)

    def base() -> nn.Module:
        return nn.Linear(inside, outside)

    def ours() -> nn.Module:
        return rnn.DropConnectLinear(inside, outside, p=RATE, mask=mask)

    found = [Row(name, ours, target, shape=shape, base=base)]
    if rows * inside * outside < 1 << 28 or mask == "batch":  # a mask for each example would fill the memory
        found += [
            Row(name, build, None, rival, shape, base)
            for rival, build in rivals.linear_rivals(inside, outside, mask)
        ]
    return found


class Recurrent(nn.Module):
    """Two layers of LSTM, under weight drop at a rate."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(512, 512, num_layers=2)
        if p:
            regraft.apply(self, {"recurrent": f"weightdrop(p={p})"}, torch.zeros(2, 1, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def linears() -> list[Row]:
    return [
        *linear(2048, 768, 3072, 1.10, "batch"),
        *linear(2048, 768, 3072, 2.5, "example"),
        *linear(32, 768, 768, 3, "batch"),
        *linear(32, 768, 768, 2.5, "example"),
        Row(
            "mixout, 2048 x 768 x 3072",
            lambda: rnn.MixoutLinear(768, 3072, p=RATE),
            shape=(2048, 768),
            base=lambda: nn.Linear(768, 3072),
        ),
        Row(
            "weightdrop, LSTM of 512, 2 layers, (64, 64, 512)",
            lambda: Recurrent(RATE),
            shape=(64, 64, 512),
            base=Recurrent,
        ),
    ]


def prepared(row: Row, args: argparse.Namespace) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The row's module and its base, where and how they are to run, and an input."""
    torch.manual_seed(0)
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    ours, base = row.build().to(**like).train(not row.evaluating), row.base().to(**like)
    if args.compile:
        torch._dynamo.reset()
        ours, base = torch.compile(ours, fullgraph=True), torch.compile(base, fullgraph=True)
    return ours, base, torch.randn(row.shape, **like, requires_grad=True)


def timing(rows: list[Row], args: argparse.Namespace) -> None:
    threads = [1] if args.device != "cpu" else sorted(set(args.threads))
    heads = ["1 thread" if count == 1 else f"{count} threads" for count in threads]
    heads = heads if args.device == "cpu" else [torch.cuda.get_device_name()]
    print(f"| variant | by | {' | '.join(heads)} | target |\n|---|---|{'---:|' * (len(heads) + 1)}")
    targeted = args.device == "cpu" and args.dtype == "float32" and not args.compile
    for row in rows:
        figures = []
        for count in threads:
            torch.set_num_threads(count)
            figures.append(ratio(*prepared(row, args), args.seconds, args.patience))
        missed = row.target and max(figure for figure, _ in figures) > row.target
        target = f"<= {row.target:g}{' (missed)' if missed else ''}" if row.target and targeted else ""
        cells = " | ".join(f"{'' if quiet else '~'}{figure:.2f}" for figure, quiet in figures)
        print(f"| {row.name} | {row.rival or 'regraft'} | {cells} | {target} |", flush=True)


def memories(rows: list[Row], args: argparse.Namespace) -> None:
    print("| variant | by | kept for the backward pass | peak beside the output |\n|---|---|---:|---:|")
    base = Row("nn.Dropout", lambda: nn.Dropout(RATE), rival="torch")
    for row in [base, *(row for row in rows if len(row.shape) > 2)]:
        module, _, x = prepared(row, args)
        kept, peak = memory(module, x)
        print(f"| {row.name} | {row.rival or 'regraft'} | {kept:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="bytes for each element instead of times")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait, for each figure, for a quiet machine"
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    args = parser.parse_args()
    every = dropouts() + rivals.written() + rivals.torchs_own() + rivals.installed() + linears()
    rows = [row for row in every if args.only in row.name]
    order = [row.name for row in rows]
    rows.sort(key=lambda row: order.index(row.name))
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}{', compiled' if args.compile else ''}\n")
    measure: Callable[[list[Row], argparse.Namespace], None] = memories if args.memory else timing
    measure(rows, args)


if __name__ == "__main__":
    main()

"""How much the variants cost: forward and backward, as ratios to torch's own dropout and linear layer.

    python benchmarks/variants.py                      # CPU, one thread and all
    python benchmarks/variants.py --device cuda --dtype bfloat16
    python benchmarks/variants.py --compile            # under torch.compile, both sides

Each figure is the median of ratios of single runs taken in turns, so that whatever else the machine does
meanwhile falls on both sides. Rivals are what one would write, or install, instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import regraft

SHAPE = (64, 128, 768)
IMAGES = (64, 96, 32, 32)
RATE = 0.1
rnn = regraft.nn


@dataclass
class Row:
    """One line of the table: `build` makes the module, `target` is the most its ratio may be."""

    name: str
    build: Callable[[], nn.Module]
    target: float | None = None
    rival: str = ""
    shape: tuple[int, ...] = SHAPE
    base: Callable[[], nn.Module] = lambda: nn.Dropout(RATE)


class Written(nn.Module):
    """A rival that is a few lines of code."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class WrittenDropConnect(nn.Linear):
    """A mask for the whole batch, as it is usually written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.bernoulli(torch.full_like(self.weight, 1 - RATE))
        return F.linear(x, self.weight * mask / (1 - RATE), self.bias)


class WrittenStandout(nn.Module):
    """A linear gate of its own, a Bernoulli draw from its sigmoid."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.sigmoid(self.gate(x))
        return x * torch.bernoulli(keep)


def k_masks(x: torch.Tensor, samples: int = 8) -> torch.Tensor:
    """The mean of K dropout masks, each drawn."""
    return torch.stack([F.dropout(x, RATE) for _ in range(samples)]).mean(0)


def linear(rows: int, inside: int, outside: int, target: float, mask: str) -> list[Row]:
    name, shape = f"{rows} x {inside} x {outside}", (rows, inside)

    def base() -> nn.Module:
        return nn.Linear(inside, outside)

    ours = Row(
        f"dropconnect, mask per {mask}, {name}",
        lambda: rnn.DropConnectLinear(inside, outside, p=RATE, mask=mask),
        target,
        shape=shape,
        base=base,
    )
    rival = Row(
        f"dropconnect, {name}", lambda: WrittenDropConnect(inside, outside), None, "written out", shape, base
    )
    return [ours, rival] if mask == "batch" else [ours]


def dropouts() -> list[Row]:
    return [
        Row("gaussian", lambda: rnn.GaussianDropout(RATE), 0.7),
        Row("gaussian", lambda: Written(lambda x: x * (1 + 0.1 * torch.randn_like(x))), None, "written out"),
        Row("multisample, K = 8", lambda: rnn.MultiSampleDropout(RATE), 0.75),
        Row("multisample, K = 8, exact", lambda: rnn.MultiSampleDropout(RATE, exact=True)),
        Row("multisample, K = 8", lambda: Written(k_masks), None, "K masks, written out"),
        Row("uniform", lambda: rnn.UniformDropout(RATE), 0.7),
        Row("spatial", lambda: rnn.SpatialDropout(RATE), 0.15),
        Row("spatial", lambda: nn.Dropout1d(RATE), None, "nn.Dropout1d"),
        Row("token", lambda: rnn.TokenDropout(RATE)),
        Row("droppath", lambda: rnn.DropPath(RATE), 0.15),
        Row("standout, tied", lambda: rnn.StandoutDropout(RATE), 2.5),
        Row("standout, learned", lambda: rnn.StandoutDropout(RATE, gate="learned", features=SHAPE[-1])),
        Row("standout, learned", lambda: WrittenStandout(SHAPE[-1]), None, "written out"),
        Row("concrete", lambda: rnn.ConcreteDropout(RATE), 4),
        Row("alpha", lambda: rnn.AlphaDropout(RATE)),
        Row("alpha", lambda: nn.AlphaDropout(RATE), None, "nn.AlphaDropout"),
        Row("dropblock", lambda: rnn.DropBlock(RATE), shape=IMAGES),
        Row("dropout", lambda: rnn.Dropout(RATE)),
    ]


def installed() -> list[Row]:
    """Rivals from packages, those that are installed."""
    rows = []
    if importlib.util.find_spec("timm"):
        from timm.layers import DropBlock2d, DropPath

        rows += [
            Row("droppath", lambda: DropPath(RATE), None, "timm"),
            Row("dropblock", lambda: DropBlock2d(RATE, 7, couple_channels=False), None, "timm", IMAGES),
        ]
    if importlib.util.find_spec("dropblock"):
        from dropblock import DropBlock2D

        rows.append(Row("dropblock", lambda: DropBlock2D(RATE, 7), None, "dropblock", IMAGES))
    if importlib.util.find_spec("baal"):
        from baal.bayesian.dropout import Dropout

        rows.append(Row("mc", lambda: Dropout(RATE), None, "baal"))
    return rows


def linears() -> list[Row]:
    return [
        *linear(2048, 768, 3072, 1.10, "batch"),
        *linear(2048, 768, 3072, 2.5, "example"),
        *linear(32, 768, 768, 3, "batch"),
        *linear(32, 768, 768, 2.5, "example"),
    ]


def timed(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    torch.autograd.grad(module(x), [x, *module.parameters()], upstream, allow_unused=True)
    wait()
    return time.perf_counter() - start


def ratio(row: Row, args: argparse.Namespace) -> tuple[float, float]:
    """The median ratio to the base, and the base's median seconds."""
    torch.manual_seed(0)
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    ours, base = row.build().to(**like), row.base().to(**like)
    if args.compile:
        torch._dynamo.reset()
        ours, base = torch.compile(ours, fullgraph=True), torch.compile(base, fullgraph=True)
    x = torch.randn(row.shape, **like, requires_grad=True)
    upstream = torch.randn_like(base(x))
    for _ in range(3):
        timed(ours, x, upstream), timed(base, x, upstream)
    pairs = []
    until = time.perf_counter() + args.seconds
    while time.perf_counter() < until or len(pairs) < 5:
        pairs.append((timed(ours, x, upstream), timed(base, x, upstream)))
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    args = parser.parse_args()
    rows = [row for row in dropouts() + installed() + linears() if args.only in row.name]
    order = [row.name.partition(",")[0] for row in rows]
    rows.sort(key=lambda row: order.index(row.name.partition(",")[0]))
    threads = [1] if args.device != "cpu" else sorted(set(args.threads))
    heads = ["1 thread" if count == 1 else f"{count} threads" for count in threads]
    heads = heads if args.device == "cpu" else [torch.cuda.get_device_name()]
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}{', compiled' if args.compile else ''}")
    print(f"| variant | by | {' | '.join(heads)} | target |\n|---|---|{'---:|' * (len(heads) + 1)}")
    for row in rows:
        figures = []
        for count in threads:
            torch.set_num_threads(count)
            figures.append(ratio(row, args)[0])
        target = f"<= {row.target:g}" if row.target else ""
        missed = " (missed)" if row.target and max(figures) > row.target else ""
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        print(f"| {row.name} | {row.rival or 'regraft'} | {cells} | {target}{missed} |", flush=True)


if __name__ == "__main__":
    main()

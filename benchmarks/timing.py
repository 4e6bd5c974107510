"""Ratios measured in turns: of modules in time, undisturbed, and in memory; of whole steps in time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

SHAPE = (64, 128, 768)
IMAGES = (64, 96, 32, 32)
WEIGHTS = (16, 12, 128, 128)
RATE = 0.1

LOT = 0.5
"""Seconds of one lot of runs, long enough to tell by the system's clock ticks whether others ran too."""
OTHERS = 0.1
"""How much, of one core, other programs may run during a lot that counts, beside what they run on cores
that the measurement has no thread for."""


@dataclass
class Row:
    """One line of the table: `build` makes the module, `target` is the most its ratio may be."""

    name: str
    build: Callable[[], nn.Module]
    target: float | None = None
    rival: str = ""
    shape: tuple[int, ...] = SHAPE
    base: Callable[[], nn.Module] = lambda: nn.Dropout(RATE)
    evaluating: bool = False
    """Time it in eval: a variant that acts there. The base stays in training."""


def seconds_of(run: Callable[[], object], device: str) -> float:
    """What a run takes, all that it asked of a GPU included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turns(
    methods: dict[str, Callable[[], object]], rounds: int, device: str, base: str
) -> tuple[dict[str, float], float]:
    """The median over rounds of each method's time over the base's in the same round, and the base's in
    seconds. The methods take turns in an order that rotates, after two rounds that do not count."""
    names = list(methods)
    took: list[dict[str, float]] = []
    for i in range(-2, rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        times = {name: seconds_of(methods[name], device) for name in order}
        if i >= 0:
            took.append(times)
    ratios = {name: statistics.median(times[name] / times[base] for times in took) for name in names}
    return ratios, statistics.median(times[base] for times in took)


def timed(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> float:
    def run() -> None:
        torch.autograd.grad(module(x), [x, *module.parameters()], upstream, allow_unused=True)

    return seconds_of(run, x.device.type)


def busy() -> tuple[float, float]:
    """Seconds all processors have worked so far, and of these for this program."""
    own = os.times()
    stat = Path("/proc/stat")
    if not stat.exists():  # no Linux: every lot counts
        return own.user + own.system, own.user + own.system
    ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    working = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for disks
    return working / os.sysconf("SC_CLK_TCK"), own.user + own.system


def lot(run: Callable[[], tuple[float, float]]) -> tuple[list[tuple[float, float]], bool]:
    """Pairs of times from half a second of runs; and did this program have its cores to itself?"""
    pairs = []
    working, own = busy()
    start = time.perf_counter()
    while time.perf_counter() < start + LOT or not pairs:
        pairs.append(run())
    elapsed = time.perf_counter() - start
    working_after, own_after = busy()
    others = (working_after - working) - (own_after - own)
    spare = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
    return pairs, others / elapsed <= spare + OTHERS


def ratio(ours: nn.Module, base: nn.Module, x: torch.Tensor, seconds: float, patience: float):
    """The median ratio of times, ours to the base, and whether it was measured undisturbed.

    Each pair runs in turns. Lots of pairs during which other programs ran do not count, unless by the
    end of `patience` seconds none did.
    """
    upstream = torch.randn_like(base(x))

    def pair() -> tuple[float, float]:
        return timed(ours, x, upstream), timed(base, x, upstream)

    for _ in range(3):
        pair()
    quiet: list[tuple[float, float]] = []
    loud: list[tuple[float, float]] = []
    start, spent = time.perf_counter(), 0.0
    while spent < seconds and time.perf_counter() < start + max(patience, seconds):
        begun = time.perf_counter()
        pairs, alone = lot(pair)
        (quiet if alone else loud).extend(pairs)
        spent += (time.perf_counter() - begun) * alone
    return statistics.median(a / b for a, b in quiet or loud), bool(quiet)


def memory(module: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Of one forward in training, in bytes for each element of x: kept for the backward pass; and the
    peak beside the output, all that the operators allocate on their way included."""
    module(x)  # what the first call makes for all later ones does not count
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = {x.untyped_storage()._cdata, *(p.untyped_storage()._cdata for p in module.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    kept = sum(size for key, size in saved.items() if key not in own)
    output = y.untyped_storage().nbytes()
    del y
    return kept / x.numel(), (peak_bytes(lambda: module(x), cuda=x.is_cuda) - output) / x.numel()


def peak_bytes(run: Callable[[], object], *, cuda: bool) -> int:
    """The most that the operators of `run` had allocated at one time."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run()
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak

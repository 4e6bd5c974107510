"""The distribution of each random variant, as its definition says, and how to sample it.

Seeds are fixed, so each check either always passes or never does; `RARE` is what a right sampler falls
below once in 10,000 seeds, and `ERRORS` standard errors are exceeded once in 1.7 million.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft import nn

RARE = 1e-4
ERRORS = 5
COUNT = 1 << 17
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = ["contiguous", "channels_last", "transposed"]


@dataclass(frozen=True)
class Law:
    """Discrete: `values` with `masses`. Continuous: the `masses` of the cells between `edges`."""

    values: tuple[float, ...] = ()
    masses: tuple[float, ...] = ()
    edges: Tensor | None = None
    moments: tuple[float, float] = (math.nan, math.nan)
    """Mean and variance, of a continuous law."""

    @property
    def mean(self) -> float:
        if not self.values:
            return self.moments[0]
        return sum(value * mass for value, mass in zip(self.values, self.masses, strict=True))

    @property
    def variance(self) -> float:
        if not self.values:
            return self.moments[1]
        pairs = zip(self.values, self.masses, strict=True)
        return sum(value**2 * mass for value, mass in pairs) - self.mean**2

    def cells(self, draws: Tensor) -> Tensor:
        """The number of each draw's value, or of the cell that it lies in."""
        if self.edges is not None:
            return torch.bucketize(draws.contiguous(), self.edges)
        values = torch.tensor(self.values, dtype=torch.float64)
        nearest = torch.bucketize(draws.contiguous(), (values[1:] + values[:-1]) / 2)
        error = (draws - values[nearest]).abs().max()
        assert error < 0.01 * (1 + values.abs().max()), "a value that the definition does not have"
        return nearest

    def counts(self, draws: Tensor) -> Tensor:
        return self.cells(draws.flatten()).bincount(minlength=len(self.masses))

    def probabilities(self) -> Tensor:
        return torch.tensor(self.masses, dtype=torch.float64)


def surprise(counts: Tensor, probabilities: Tensor) -> float:
    """The chi-square test's p-value, with rare cells taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-3:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    if len(counts) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def poisson_surprise(events: int, expected: float) -> float:
    """The p-value of so many rare events, or of fewer or more of them, whichever is smaller."""
    rate = torch.tensor(expected, dtype=torch.float64)
    most = torch.special.gammaincc(torch.tensor(events + 1.0).double(), rate)
    least = torch.special.gammainc(torch.tensor(float(events)).double(), rate) if events else torch.ones(())
    return 2 * min(float(most), float(least))


def two_values(p: float) -> Law:
    return Law((0.0, 1 / (1 - p)), (p, 1 - p))


def binomial(trials: int) -> Callable[[float], Law]:
    def law(p: float) -> Law:
        masses = [math.comb(trials, k) * (1 - p) ** k * p ** (trials - k) for k in range(trials + 1)]
        return Law(tuple(k / (trials * (1 - p)) for k in range(trials + 1)), tuple(masses))

    return law


def equal_cells(quantile: Callable[[Tensor], Tensor], moments=(math.nan, math.nan), cells: int = 32) -> Law:
    edges = quantile(torch.arange(1, cells, dtype=torch.float64) / cells)
    return Law(masses=(1 / cells,) * cells, edges=edges, moments=moments)


def normal(p: float) -> Law:
    return equal_cells(lambda u: 1 + (p / (1 - p)) ** 0.5 * torch.special.ndtri(u), (1.0, p / (1 - p)))


def uniform(p: float) -> Law:
    return equal_cells(lambda u: 1 + (3 * p / (1 - p)) ** 0.5 * (2 * u - 1), (1.0, p / (1 - p)))


def concrete(p: float) -> Law:
    """Of the smooth mask; its moments are integrated over a fine grid of its uniform draw."""
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    below = torch.sigmoid(0.1 * logits + math.log(p / (1 - p)))
    masses = torch.cat([below, torch.ones(1)]).diff(prepend=torch.zeros(1))
    u = (torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20)
    mask = torch.sigmoid((u.logit() - math.log(p / (1 - p))) / 0.1) / (1 - p)
    moments = (mask.mean().item(), mask.var().item())
    return Law(masses=tuple(masses.tolist()), edges=torch.sigmoid(logits) / (1 - p), moments=moments)


def alpha(p: float) -> Law:
    floor = -1.0507009873554805 * 1.6732632423543772
    a = ((1 - p) * (1 + p * floor**2)) ** -0.5
    shift = -a * p * floor
    return Law((a * floor + shift, a + shift), (p, 1 - p))


def ones(*shape: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.ones(shape[::-1], dtype=dtype).permute(3, 2, 1, 0)
    x = torch.ones(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def elements(module, dtype, layout) -> Tensor:
    return module(ones(2, 16, 64, 64, dtype=dtype, layout=layout))


def channels(module, dtype, layout) -> Tensor:
    return module(ones(COUNT // 64, 64, 2, 1, dtype=dtype, layout=layout))[:, :, 0, 0]


def positions(module, dtype, layout) -> Tensor:
    return module(ones(2, 2, COUNT // 64, 32, dtype=dtype, layout=layout))[:, 0]


def examples(module, dtype, layout) -> Tensor:
    return module(ones(COUNT, 1, 2, 1, dtype=dtype, layout=layout))[:, 0, 0, 0]


def far_apart(module, dtype, layout) -> Tensor:
    return module(ones(16, 64, 64, 64, dtype=dtype, layout=layout))[:, :, ::3, ::3]


def far_apart_in_one_channel(module, dtype, layout) -> Tensor:
    y = module(ones(304, 2, 64, 64, dtype=dtype, layout=layout))[:, :, ::3, ::3]
    assert torch.equal(y[:, 0], y[:, 1])
    return y[:, 0]


def features(module, dtype, layout) -> Tensor:
    return module.eval()(ones(3, 512, 16, 16, dtype=dtype, layout=layout))[1]


def weights(module, dtype, layout) -> Tensor:
    """What the layer's weights, all 1, are in this forward; they lie in memory as `layout` says."""
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    if hasattr(module, "mixout_weight"):
        module.mixout_weight.zero_()
    module = module.to(dtype)
    if layout != "contiguous":
        module.weight.data = module.weight.data.T.contiguous().T
    return module(torch.eye(module.in_features, dtype=dtype)).T


def multisample(**options) -> Callable[[float], torch.nn.Module]:
    return lambda p: nn.MultiSampleDropout(p, **options)


def linear(made, **options) -> Callable[[float], torch.nn.Module]:
    return lambda p: made(512, 256, p=p, **options)


Case = tuple[Callable[[float], torch.nn.Module], Callable[[float], Law], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "dropout": (nn.Dropout, two_values, elements),
    "mc": (lambda p: nn.MCDropout(p).eval(), two_values, elements),
    "gaussian": (nn.GaussianDropout, normal, elements),
    "multisample": (nn.MultiSampleDropout, binomial(8), elements),
    "multisample-exact": (multisample(exact=True), binomial(8), elements),
    "multisample-1": (multisample(num_samples=1), two_values, elements),
    "multisample-255": (multisample(num_samples=255), binomial(255), elements),
    "uniform": (nn.UniformDropout, uniform, elements),
    "concrete": (nn.ConcreteDropout, concrete, elements),
    "alpha": (nn.AlphaDropout, alpha, elements),
    "consistent": (nn.ConsistentDropout, two_values, features),
    "spatial": (nn.SpatialDropout, two_values, channels),
    "token": (nn.TokenDropout, two_values, positions),
    "droppath": (nn.DropPath, two_values, examples),
    "drophead": (nn.DropHead, two_values, channels),
    "elementwise": (nn.ElementwiseDropout, two_values, elements),
    "shaped": (lambda p: nn.ShapedDropout(p, noise_shape=[None, None, 1, 1]), two_values, channels),
    "dropblock": (lambda p: nn.DropBlock(p, block_size=3), two_values, far_apart),
    "dropblock-coupled": (
        lambda p: nn.DropBlock(p, block_size=3, couple_channels=True),
        two_values,
        far_apart_in_one_channel,
    ),
    "dropconnect": (linear(nn.DropConnectLinear), two_values, weights),
    "dropconnect-exact": (linear(nn.DropConnectLinear, exact=True), two_values, weights),
    "weightdrop": (linear(nn.WeightDropLinear), two_values, weights),
    "mixout": (linear(nn.MixoutLinear), two_values, weights),
}
CONTINUOUS = ("gaussian", "uniform", "concrete")
DISCRETE = [case for case in CASES if case not in CONTINUOUS]
ELSEWHERE = {"standout", "neftune", "off", "dropkey", "noise"}
"""Variants whose law is of another form (test_other_laws.py), or that have none."""


@functools.lru_cache(maxsize=1)  # one draw is looked at in several ways, in turn
def drawn(case: str, p: float, dtype=torch.float64, layout="contiguous", passes: int = 1) -> Tensor:
    """What the variant makes of ones, as float64; several passes on a new first axis."""
    build, _, run = CASES[case]
    module = build(p)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [run(module, dtype, layout).double() for _ in range(passes)]
    return draws[0] if passes == 1 else torch.stack(draws)


@functools.lru_cache(maxsize=64)
def law_of(case: str, p: float) -> Law:
    return CASES[case][1](p)

"""Every random variant draws from the distribution its definition says: chi-square on the whole of it.

Seeds are fixed, so each check either always passes or never does; the bounds are what a right sampler
exceeds once in 10,000 (chi-square) or 1.7 million (five standard errors) seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from regraft import nn
from regraft.variants import registry
from regraft.variants.registry import names

RARE = 1e-4
COUNT = 1 << 17
RATES = [0.1, 0.5, 0.9, 0.999]
LAYOUTS = ["contiguous", "channels_last", "transposed"]


@dataclass(frozen=True)
class Law:
    """Discrete: `values` with `masses`. Continuous: the `masses` of the cells between `edges`."""

    values: tuple[float, ...] = ()
    masses: tuple[float, ...] = ()
    edges: Tensor | None = None

    @property
    def mean(self) -> float:
        return sum(value * mass for value, mass in zip(self.values, self.masses, strict=True))

    @property
    def variance(self) -> float:
        pairs = zip(self.values, self.masses, strict=True)
        return sum(value**2 * mass for value, mass in pairs) - self.mean**2

    def counts(self, draws: Tensor) -> Tensor:
        if self.edges is not None:
            return torch.bucketize(draws, self.edges).bincount(minlength=len(self.edges) + 1)
        values = torch.tensor(self.values, dtype=torch.float64)
        nearest = torch.bucketize(draws, (values[1:] + values[:-1]) / 2)
        error = (draws - values[nearest]).abs().max()
        assert error < 0.01 * (1 + values.abs().max()), "a value that the definition does not have"
        return nearest.bincount(minlength=len(values))

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
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def two_values(p: float) -> Law:
    return Law((0.0, 1 / (1 - p)), (p, 1 - p))


def binomial(p: float, trials: int) -> Law:
    masses = [math.comb(trials, k) * (1 - p) ** k * p ** (trials - k) for k in range(trials + 1)]
    return Law(tuple(k / (trials * (1 - p)) for k in range(trials + 1)), tuple(masses))


def equal_cells(quantile, cells: int = 32) -> Law:
    edges = quantile(torch.arange(1, cells, dtype=torch.float64) / cells)
    return Law(masses=(1 / cells,) * cells, edges=edges)


def normal(p: float) -> Law:
    return equal_cells(lambda u: 1 + (p / (1 - p)) ** 0.5 * torch.special.ndtri(u))


def uniform(p: float) -> Law:
    return equal_cells(lambda u: 1 + (3 * p / (1 - p)) ** 0.5 * (2 * u - 1))


def concrete(p: float) -> Law:
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    below = torch.sigmoid(0.1 * logits + math.log(p / (1 - p)))
    masses = torch.cat([below, torch.ones(1)]).diff(prepend=torch.zeros(1))
    return Law(masses=tuple(masses.tolist()), edges=torch.sigmoid(logits) / (1 - p))


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


SIDE = 16
"""Inputs are (2, 16, 64, 64): COUNT elements."""


def elements(module, dtype, layout) -> Tensor:
    return module(ones(2, SIDE, 64, 64, dtype=dtype, layout=layout))


def channels(module, dtype, layout) -> Tensor:
    return module(ones(COUNT // 64, 64, 2, 1, dtype=dtype, layout="contiguous"))[:, :, 0, 0]


def positions(module, dtype, layout) -> Tensor:
    return module(ones(2, 2, COUNT // 64, 32, dtype=dtype, layout="contiguous"))[:, 0]


def examples(module, dtype, layout) -> Tensor:
    return module(ones(COUNT, 1, 2, 1, dtype=dtype, layout="contiguous"))[:, 0, 0, 0]


def far_apart(module, dtype, layout) -> Tensor:
    return module(ones(16, 64, 64, 64, dtype=dtype, layout=layout))[:, :, ::3, ::3]


def weights(module, dtype, layout) -> Tensor:
    """What the layer's weights, all 1, are in this forward."""
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    if hasattr(module, "mixout_weight"):
        module.mixout_weight.zero_()
    return module.to(dtype)(torch.eye(module.in_features, dtype=dtype)).T


def features(module, dtype, layout) -> Tensor:
    return module.eval()(ones(3, COUNT, 1, 1, dtype=dtype, layout="contiguous"))[1]


CASES = {
    "dropout": (nn.Dropout, two_values, elements),
    "mc": (lambda p: nn.MCDropout(p).eval(), two_values, elements),
    "gaussian": (nn.GaussianDropout, normal, elements),
    "multisample": (nn.MultiSampleDropout, lambda p: binomial(p, 8), elements),
    "multisample-exact": (
        lambda p: nn.MultiSampleDropout(p, exact=True),
        lambda p: binomial(p, 8),
        elements,
    ),
    "multisample-1": (lambda p: nn.MultiSampleDropout(p, num_samples=1), two_values, elements),
    "multisample-255": (
        lambda p: nn.MultiSampleDropout(p, num_samples=255),
        lambda p: binomial(p, 255),
        elements,
    ),
    "uniform": (nn.UniformDropout, uniform, elements),
    "concrete": (nn.ConcreteDropout, concrete, elements),
    "alpha": (nn.AlphaDropout, alpha, elements),
    "consistent": (nn.ConsistentDropout, two_values, features),
    "spatial": (nn.SpatialDropout, two_values, channels),
    "token": (nn.TokenDropout, two_values, positions),
    "droppath": (nn.DropPath, two_values, examples),
    "dropblock": (lambda p: nn.DropBlock(p, block_size=3), two_values, far_apart),
    "dropconnect": (lambda p: nn.DropConnectLinear(512, 256, p=p), two_values, weights),
    "dropconnect-exact": (
        lambda p: nn.DropConnectLinear(512, 256, p=p, exact=True),
        two_values,
        weights,
    ),
    "mixout": (lambda p: nn.MixoutLinear(512, 256, p=p), two_values, weights),
}


def smooth_moments(p: float) -> tuple[float, float]:
    """Mean and variance of the concrete mask, integrated over a fine grid of its uniform draw."""
    u = (torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20)
    mask = torch.sigmoid((u.logit() - math.log(p / (1 - p))) / 0.1) / (1 - p)
    return mask.mean().item(), mask.var().item()


CONTINUOUS = {
    "gaussian": lambda p: (1.0, p / (1 - p)),
    "uniform": lambda p: (1.0, p / (1 - p)),
    "concrete": smooth_moments,
}
"""Mean and variance of the variants whose law is not discrete."""
ELSEWHERE = {"standout", "neftune", "off"}
"""Variants with a law of another form, tested below, or with none."""
cases = pytest.mark.parametrize("case", CASES)


def drawn(case: str, p: float, dtype=torch.float64, layout="contiguous", seed=0) -> tuple[Tensor, Law]:
    build, law, run = CASES[case]
    torch.manual_seed(seed)
    with torch.no_grad():
        return run(build(p), dtype, layout).double().flatten().contiguous(), law(p)


def test_every_variant_has_its_law_tested():
    names()
    assert {case.split("-")[0] for case in CASES} | ELSEWHERE == registry._builtin


@cases
@pytest.mark.parametrize("p", RATES)
def test_draws_follow_the_law(case, p):
    draws, law = drawn(case, p)
    assert surprise(law.counts(draws), law.probabilities()) > RARE


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draws_follow_the_law_in_every_precision(case, dtype):
    if case == "multisample-255" and dtype is not torch.float32:
        case = "multisample-exact"  # 256 values lie too close for 8 or 11 bits
    draws, law = drawn(case, 0.3, dtype)
    if case in CONTINUOUS and dtype is not torch.float32:
        # Rounding moves values across the cells' edges: mean and variance instead.
        exact, _ = drawn(case, 0.3)
        error = exact.std() / len(draws) ** 0.5
        assert abs(draws.mean() - exact.mean()) < 7 * error
        assert abs(draws.var() / exact.var() - 1) < 0.02
    else:
        assert surprise(law.counts(draws), law.probabilities()) > RARE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [nn.UniformDropout(0.3), nn.GaussianDropout(0.3)], ids=str)
def test_noise_in_half_precision_has_no_bias(module, dtype):
    """torch's own uniform draw in bfloat16 has mean 0.498."""
    torch.manual_seed(0)
    noise = module(torch.ones(1 << 21, dtype=dtype)).double()
    assert abs(noise.mean() - 1) < 5 * noise.std() / len(noise) ** 0.5


@cases
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_draws_follow_the_law_in_every_layout(case, layout):
    draws, law = drawn(case, 0.3, layout=layout)
    assert surprise(law.counts(draws), law.probabilities()) > RARE


@cases
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance(case, p):
    draws, law = drawn(case, p)
    mean, variance = (law.mean, law.variance) if law.values else CONTINUOUS[case](p)
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - mean) < 5 * error
    fourth = ((draws - draws.mean()) ** 4).mean()
    error = ((fourth - draws.var() ** 2).clamp(min=0) / len(draws)) ** 0.5
    assert abs(draws.var() - variance) < 5 * error + 25 * variance / len(draws)


@cases
def test_draws_are_independent_of_each_other(case):
    """Neighbours, rows and passes: no correlation beyond five standard errors."""
    draws, _ = drawn(case, 0.5)
    again, _ = drawn(case, 0.5, seed=1)
    centred, other = draws - draws.mean(), again - again.mean()
    scale = draws.var() * len(draws) ** 0.5
    for lag in (1, 2, 3, 4, 7, 16, 64, 256, 512, 4096):
        assert abs((centred[lag:] * centred[:-lag]).sum() / len(draws) ** 0.5) < 5 * scale / len(draws) ** 0.5
    assert abs((centred * other).sum() / len(draws) ** 0.5) < 5 * scale / len(draws) ** 0.5


@pytest.mark.parametrize(
    ("build", "trials"),
    [(nn.Dropout, 1), (nn.MultiSampleDropout, 8), (lambda p: nn.DropConnectLinear(2048, 2048, p=p), 1)],
    ids=["dropout", "multisample", "dropconnect"],
)
def test_a_rate_of_one_in_a_million_is_met(build, trials):
    """16 bits cannot: 2^-16 is 15 times that. Drops are Poisson distributed."""
    module = build(1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.ones_(module.weight)
            kept = torch.cat([module(torch.eye(2048)) - module.bias for _ in range(3)])
        else:
            kept = module(torch.ones(3, 2048, 2048))
    drops = int((kept < 0.99999).sum())
    expected = kept.numel() * trials * 1e-6
    assert abs(drops - expected) < 4 * expected**0.5


STANDOUT = [
    (-2.0, {}),
    (0.5, {}),
    (1.5, {}),
    (1.5, {"rescale": False}),
    (1.0, {"alpha": -1.0, "beta": 0.5}),
    (-9.0, {"min_keep": 0.2}),
]
standout = pytest.mark.parametrize(("level", "options"), STANDOUT)


def standout_law(level: float, p: float, options: dict) -> Law:
    logit = options.get("alpha", 1.0) * level + options.get("beta", math.log((1 - p) / p))
    keep = max(1 / (1 + math.exp(-logit)), options.get("min_keep", 0.05))
    kept = level / keep if options.get("rescale", True) else level
    values, masses = zip(*sorted([(0.0, 1 - keep), (kept, keep)]), strict=True)
    return Law(values, masses)


@standout
@pytest.mark.parametrize("gate", ["tied", "learned"])
def test_standout_keeps_with_the_sigmoid_of_the_activation(level, options, gate):
    module = nn.StandoutDropout(0.3, gate=gate, features=1, **options)
    if gate == "learned":
        torch.nn.init.ones_(module.gate_weight)  # a gate that hands the activation on
    torch.manual_seed(0)
    y = module(torch.full((1 << 16, 1), level)).detach().double().flatten()
    law = standout_law(level, 0.3, options)
    assert surprise(law.counts(y), law.probabilities()) > RARE


@standout
def test_standout_of_a_linear_layer_follows_its_own_output(level, options):
    module = nn.StandoutLinear(1, 4, bias=False, p=0.3, **options)
    torch.nn.init.constant_(module.weight, level)
    torch.manual_seed(0)
    y = module(torch.ones(1 << 14, 1)).detach().double().flatten()
    law = standout_law(level, 0.3, options)
    assert surprise(law.counts(y), law.probabilities()) > RARE


def test_dropconnect_by_example_has_the_mean_and_variance_of_a_mask_for_each_row():
    p = 0.3
    torch.manual_seed(0)
    module = nn.DropConnectLinear(6, 3, p=p, mask="example").double()
    row = torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        y = module(row.expand(1 << 16, 6))
        mean = module.weight @ row + module.bias
        variance = p / (1 - p) * (module.weight**2) @ (row**2)
        standard = ((y - mean) / variance.sqrt()).flatten()
    law = equal_cells(torch.special.ndtri)
    assert surprise(law.counts(standard), law.probabilities()) > RARE
    assert (torch.corrcoef(y.T) - torch.eye(3)).abs().max() < 5 / (1 << 8)


def test_neftune_is_uniform_within_its_bound():
    torch.manual_seed(0)
    module = nn.NEFTuneEmbedding(10, 64, alpha=5.0).double()
    tokens = torch.randint(10, (64, 32))
    noise = module(tokens) - module.weight[tokens]
    bound = 5 / (32 * 64) ** 0.5
    law = equal_cells(lambda u: bound * (2 * u - 1))
    assert surprise(law.counts(noise.detach().flatten()), law.probabilities()) > RARE
    assert noise.abs().max() <= bound

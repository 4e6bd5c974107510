"""Laws of another form: standout's, which depends on the input, and additive noise."""

from __future__ import annotations

import math

import pytest
import torch
from laws import DTYPES, ERRORS, RARE, Law, equal_cells, surprise

from regraft import nn

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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.999])
@pytest.mark.parametrize("gate", ["tied", "learned"])
def test_standout_keeps_with_the_sigmoid_of_the_activation(level, options, gate, p, layout, dtype):
    module = nn.StandoutDropout(p, gate=gate, features=1, **options).to(dtype)
    if gate == "learned":
        torch.nn.init.ones_(module.gate_weight)  # a gate that hands the activation on
    x = torch.full((1 << 16, 1), level, dtype=dtype)
    x = x.repeat(1, 3)[:, 1:2] if layout == "sliced" else x
    torch.manual_seed(0)
    follows(standout_law(level, p, options), module(x), dtype)


def follows(law, y, dtype):
    """The whole distribution, the mean and the variance."""
    y = y.detach().double().flatten()
    rounding = 2 * torch.finfo(dtype).eps
    assert surprise(law.counts(y), law.probabilities()) > RARE
    spread = law.variance**0.5
    assert abs(y.mean() - law.mean) <= ERRORS * spread / len(y) ** 0.5 + rounding * abs(law.mean)
    fourth = sum(mass * (value - law.mean) ** 4 for value, mass in zip(law.values, law.masses, strict=True))
    error = (max(0.0, fourth - law.variance**2) / len(y)) ** 0.5
    assert abs(y.var() - law.variance) <= ERRORS * error + rounding * (law.variance + law.mean**2)


@pytest.mark.parametrize("gate", ["tied", "learned"])
def test_elements_and_passes_of_standout_are_independent(gate):
    module = nn.StandoutDropout(0.5, gate=gate, features=64).double()
    x = torch.zeros(2048, 64, dtype=torch.float64) + 1e-9  # a level at which a half is kept
    torch.manual_seed(0)
    first, second = ((module(x) > 0).detach() for _ in range(2))
    pairs = [(first, second), (first[::2], first[1::2]), (first[:, ::2], first[:, 1::2])]
    for one, other in pairs:
        both = (one.long() * 2 + other.long()).flatten().bincount(minlength=4)
        assert surprise(both, torch.full((4,), 0.25, dtype=torch.float64)) > RARE


@standout
def test_standout_of_a_linear_layer_follows_its_own_output(level, options):
    module = nn.StandoutLinear(1, 4, bias=False, p=0.3, **options)
    torch.nn.init.constant_(module.weight, level)
    torch.manual_seed(0)
    y = module(torch.ones(1 << 14, 1)).detach().double().flatten()
    law = standout_law(level, 0.3, options)
    assert surprise(law.counts(y), law.probabilities()) > RARE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.999])
def test_dropconnect_by_example_has_the_mean_and_variance_of_a_mask_for_each_row(p, dtype):
    torch.manual_seed(0)
    module = nn.DropConnectLinear(6, 3, p=p, mask="example").double()
    row = torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        y = module.to(dtype)(row.expand(1 << 16, 6).to(dtype)).double()
        module.double()
        mean = module.weight @ row + module.bias
        variance = p / (1 - p) * (module.weight**2) @ (row**2)
        standard = ((y - mean) / variance.sqrt()).flatten()
    law = equal_cells(torch.special.ndtri)
    assert surprise(law.counts(standard), law.probabilities()) > RARE
    assert (torch.corrcoef(y.T) - torch.eye(3)).abs().max() < 5 / (1 << 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [5.0, 15.0])
def test_neftune_is_uniform_within_its_bound(dtype, alpha):
    """Added to 0: the noise alone, not rounded to the digits of what it is added to."""
    torch.manual_seed(0)
    module = nn.NEFTuneEmbedding(10, 64, alpha=alpha).to(dtype)
    torch.nn.init.zeros_(module.weight)
    tokens = torch.randint(10, (64, 32))
    first, second = (module(tokens).detach().double() for _ in range(2))
    bound = alpha / (32 * 64) ** 0.5
    law = equal_cells(lambda u: bound * (2 * u - 1), (0.0, bound**2 / 3))
    if dtype is not torch.bfloat16:  # whose digits are too few for the cells' edges
        assert surprise(law.counts(first), law.probabilities()) > RARE
    assert abs(first.mean()) < ERRORS * (law.variance / first.numel()) ** 0.5
    assert abs(first.var() / law.variance - 1) < ERRORS * (0.8 / first.numel()) ** 0.5
    assert first.abs().max() <= bound * (1 + torch.finfo(dtype).eps)
    for one, other in ((first, second), (first[:, ::2], first[:, 1::2]), (first[..., ::2], first[..., 1::2])):
        correlation = (one * other).mean() / law.variance
        assert abs(correlation) < ERRORS / one.numel() ** 0.5

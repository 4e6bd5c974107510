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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_normal_and_added(dtype):
    torch.manual_seed(0)
    sigma = 0.25
    noise = nn.GaussianNoise(sigma)(torch.zeros(1 << 17, dtype=dtype)).double()
    law = equal_cells(lambda u: sigma * torch.special.ndtri(u), (0.0, sigma**2))
    assert abs(noise.mean()) < ERRORS * sigma / len(noise) ** 0.5
    assert abs(noise.var() / sigma**2 - 1) < ERRORS * (2 / len(noise)) ** 0.5 + torch.finfo(dtype).eps
    if dtype is not torch.bfloat16:
        assert surprise(law.counts(noise), law.probabilities()) > RARE


@pytest.mark.parametrize("keys", ["column", "element"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropkey_is_a_softmax_over_the_keys_that_are_left(p, keys):
    """Against its definition: scores masked before the softmax, each key with probability p."""
    torch.manual_seed(0)
    scores = torch.randn(500, 4, 6, 12, dtype=torch.float64)
    weights = scores.softmax(-1)
    y = nn.DropKey(p, keys=keys)(weights)
    dropped = y == 0
    if keys == "column":
        assert torch.equal(dropped, dropped[:, :, :1].expand_as(dropped))
    masked = scores.masked_fill(dropped, -math.inf).softmax(-1)
    torch.testing.assert_close(y, masked)
    # A row that lost all its keys keeps them all, so among the others a key is dropped less often.
    draws = dropped[:, :, :1] if keys == "column" else dropped
    chance = (p - p**12) / 1
    error = (chance * (1 - chance) / draws.numel()) ** 0.5
    assert abs(draws.double().mean() - chance) < ERRORS * error * 1.5


def test_dropkey_draws_keys_independently():
    torch.manual_seed(0)
    dropped = nn.DropKey(0.5)(torch.full((20_000, 1, 1, 6), 1 / 6, dtype=torch.float64))[:, 0, 0] == 0
    counts = dropped.sum(-1).bincount(minlength=7)[:6].double()
    masses = torch.tensor([math.comb(6, k) / 64 for k in range(6)], dtype=torch.float64)
    masses[0] += 1 / 64  # all six: none is dropped
    assert surprise(counts, masses) > RARE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dropkey_without_any_key_left_is_finite(dtype):
    weights = torch.ones(64, 2, 3, 1, dtype=dtype, requires_grad=True)  # one key, dropped nearly always
    y = nn.DropKey(0.999)(weights)
    y.sum().backward()
    assert torch.equal(y, torch.ones_like(y))
    assert weights.grad.isfinite().all()
    empty = torch.zeros(2, 2, 3, 4, dtype=dtype, requires_grad=True)  # a query that may attend to nothing
    nn.DropKey(0.5)(empty).sum().backward()
    assert empty.grad.isfinite().all()


def test_drophead_drops_a_head_for_all_queries_and_keys():
    torch.manual_seed(0)
    y = nn.DropHead(0.5)(torch.ones(100, 8, 5, 7))
    assert torch.equal(y, y[..., :1, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    flat = nn.DropHead(0.5)(torch.ones(800, 5, 7))  # nn.MultiheadAttention has (B * H, L, S)
    assert torch.equal(flat, flat[:, :1, :1].expand_as(flat))


def test_a_shape_for_the_mask():
    from regraft.errors import InputsError, OptionError

    torch.manual_seed(0)
    y = nn.ShapedDropout(0.5, noise_shape=[1, None, 1])(torch.ones(6, 40, 5))
    assert torch.equal(y, y[:1, :, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    with pytest.raises(InputsError, match="3 entries"):
        nn.ShapedDropout(0.5, noise_shape=[1, None, 1])(torch.ones(6, 40))
    for bad in ([2, None], (1, None), "1", [0.5]):
        with pytest.raises(OptionError, match="noise_shape"):
            nn.ShapedDropout(0.5, noise_shape=bad)

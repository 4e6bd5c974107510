"""Every random variant draws from the distribution its definition says, in every precision and layout."""

from __future__ import annotations

import pytest
import torch
from laws import (
    CASES,
    COUNT,
    DISCRETE,
    DTYPES,
    ELSEWHERE,
    ERRORS,
    LAYOUTS,
    RARE,
    drawn,
    law_of,
    poisson_surprise,
    surprise,
)

from regraft import nn
from regraft.variants import registry
from regraft.variants.registry import names

RARELY = 1e-6
"""A rate at which drops need a test of their own, with more draws; but not noise that only grows smaller."""


def every_draw(halves: bool = True):
    """A test over every variant, rate, precision and layout."""
    return pytest.mark.parametrize(
        ("case", "p", "dtype", "layout"),
        [
            pytest.param(case, p, dtype, layout, id=f"{case}-{p}-{str(dtype)[6:]}-{layout}")
            for case in CASES
            for p in ([RARELY] if case in ("gaussian", "uniform") else []) + [0.1, 0.5, 0.999]
            for dtype in DTYPES
            for layout in LAYOUTS
            # 8 bits of a half tell neither 256 values apart, nor the cells of a continuous law.
            if dtype is not torch.bfloat16 or (case != "multisample-255" and (halves or case in DISCRETE))
            if not (dtype is torch.bfloat16 and p == RARELY)  # smaller than what 8 bits tell from 1
        ],
    )


def test_every_variant_has_its_law_tested():
    names()
    assert {case.split("-")[0] for case in CASES} | ELSEWHERE == registry._builtin


@every_draw(halves=False)
def test_the_whole_distribution(case, p, dtype, layout):
    law, draws = law_of(case, p), drawn(case, p, dtype, layout)
    assert draws.numel() >= COUNT
    assert surprise(law.counts(draws), law.probabilities()) > RARE


@every_draw()
def test_mean(case, p, dtype, layout):
    law, draws = law_of(case, p), drawn(case, p, dtype, layout)
    rounding = torch.finfo(dtype).eps / 2 * (abs(law.mean) + draws.abs().max() / draws.numel() ** 0.5)
    assert abs(draws.mean() - law.mean) <= ERRORS * draws.std() / draws.numel() ** 0.5 + rounding


@every_draw()
def test_variance(case, p, dtype, layout):
    law, draws = law_of(case, p), drawn(case, p, dtype, layout)
    fourth = ((draws - draws.mean()) ** 4).mean()
    error = ((fourth - draws.var() ** 2).clamp(min=0) / draws.numel()) ** 0.5
    rounding = 2 * torch.finfo(dtype).eps * (law.variance + law.mean**2)
    slack = ERRORS * error + ERRORS**2 * law.variance / draws.numel() + rounding
    assert abs(draws.var() - law.variance) <= slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*DISCRETE, "concrete"])
def test_a_rate_of_one_in_a_million_is_met(case, dtype):
    """16 bits cannot: 2^-16 is 15 times that. Drops are Poisson distributed."""
    if case == "multisample-255" and dtype is torch.bfloat16:
        dtype = torch.float16  # 8 bits do not tell 254 from 255
    build, law, _ = CASES[case]
    trials = max(1, len(law(RARELY).values) - 1)
    count = 3 * (1 << 22) // trials
    torch.manual_seed(0)
    drops = rare_drops(case, build(RARELY), count, trials, dtype)
    assert poisson_surprise(drops, count * trials * RARELY) > RARE


def rare_drops(case: str, module: torch.nn.Module, count: int, trials: int, dtype: torch.dtype) -> int:
    if isinstance(module, torch.nn.Linear):
        layer = type(module)(4096, count // 4096, p=RARELY, **module.options).to(dtype)
        layer(torch.ones(1, 4096, dtype=dtype)).sum().backward()
        return int((layer.weight.grad == 0).sum())  # the slope of a weight is its mask
    if case.startswith("dropblock"):  # as blocks of 1; tests/variants/test_shapes.py has larger ones
        module = nn.DropBlock(RARELY, block_size=1)
    if case == "shaped":
        module = nn.ShapedDropout(RARELY)
    shapes = {
        "drophead": (count, 1, 1),
        "droppath": (count, 1),
        "consistent": (1, count),
        "token": (1, count, 1),
    }
    with torch.no_grad():
        kept = module(torch.ones(shapes.get(case, (16, count // 16)), dtype=dtype))
    if trials == 1:
        return int((kept < kept.max() / 2).sum())
    fewer = kept[kept < kept.max()].double() / kept.max()
    return round(float((trials * (1 - fewer)).sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [nn.UniformDropout(0.3), nn.GaussianDropout(0.3)], ids=str)
def test_noise_in_half_precision_has_no_bias(module, dtype):
    """torch's own uniform draw in bfloat16 has mean 0.498."""
    torch.manual_seed(0)
    noise = module(torch.ones(1 << 21, dtype=dtype)).double()
    assert abs(noise.mean() - 1) < ERRORS * noise.std() / len(noise) ** 0.5

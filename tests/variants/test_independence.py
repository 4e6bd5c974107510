"""Elements, features, examples and passes are drawn independently of each other."""

from __future__ import annotations

import pytest
import torch
from laws import CASES, CONTINUOUS, DTYPES, ERRORS, LAYOUTS, RARE, Law, drawn, law_of, surprise
from torch import Tensor

MOST = 4
"""Cells to which a law is brought down, so that each of their pairs is frequent."""


def grouped(law: Law) -> Tensor:
    """The group of each of the law's cells: MOST at most, about equally likely."""
    before = law.probabilities().cumsum(0) - law.probabilities() / 2
    return (before * MOST).long().clamp(0, MOST - 1).unique(return_inverse=True)[1]


def joint_surprise(law: Law, one: Tensor, other: Tensor) -> float:
    """The p-value of the pairs' whole joint distribution, against that of two independent draws."""
    group = grouped(law)
    size = int(group.max()) + 1
    pairs = group[law.cells(one.flatten())] * size + group[law.cells(other.flatten())]
    alone = torch.zeros(size, dtype=torch.float64).index_add(0, group, law.probabilities())
    return surprise(pairs.bincount(minlength=size * size), torch.outer(alone, alone).flatten())


@pytest.mark.parametrize(
    ("dtype", "layout"),
    list(zip([torch.float32, torch.float64, torch.float64], LAYOUTS, strict=True)),
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_neighbours_along_each_axis(case, dtype, layout, step):
    """Examples, features and positions; a 16-bit draw shares its 64-bit word with the next three."""
    law, draws = law_of(case, 0.5), drawn(case, 0.5, dtype, layout)
    for axis in range(draws.dim()):
        if draws.shape[axis] > step:
            ahead = draws.narrow(axis, step, draws.shape[axis] - step)
            behind = draws.narrow(axis, 0, draws.shape[axis] - step)
            # Each draw is in one pair only: pairs that share one are not independent of each other.
            pairs = torch.arange(ahead.shape[axis]) // step % 2 == 0
            one, other = (part.transpose(0, axis)[pairs] for part in (behind, ahead))
            assert joint_surprise(law, one, other) > RARE, f"axis {axis}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "consistent"])
def test_passes(case, dtype):
    """One pass after another; `consistent` has one mask for all of a run, by definition."""
    if dtype is torch.bfloat16 and case in ("multisample-255", *CONTINUOUS):
        dtype = torch.float32  # more values than 8 bits tell apart
    law = law_of(case, 0.5)
    first, second, third = drawn(case, 0.5, dtype, "channels_last", passes=3)
    for one, other in ((first, second), (second, third), (first, third)):
        assert joint_surprise(law, one, other) > RARE


@pytest.mark.parametrize("case", CASES)
def test_far_neighbours_are_not_correlated(case):
    draws = drawn(case, 0.5).flatten()
    centred = draws - draws.mean()
    for lag in (1, 2, 3, 4, 7, 16, 64, 256, 512, 4096, 1 << 14, 1 << 16):
        products = centred[lag:] * centred[:-lag]
        assert abs(products.mean()) < ERRORS * draws.var() / len(products) ** 0.5


def test_runs_of_consistent_dropout():
    build, _, run = CASES["consistent"]
    module = build(0.5)
    first, second = (
        run(module, torch.float64, "contiguous") for _ in range(2)
    )  # each run begins with eval()
    assert joint_surprise(law_of("consistent", 0.5), first, second) > RARE

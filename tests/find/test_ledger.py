"""The ledger: every draw of a forward is at a site, has a name, or is told as unrecognized."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from noisy import NOISY, CoinResidual, GaussianNamed, StochasticDepth
from programs import PROGRAMS
from snapshots import assert_same, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

import regraft

X = torch.randn(6, 8)
ALL = PROGRAMS | NOISY
GENERATORS = {"LayerDrop": 1, "Switch": 1, "numpy": 1, "mixup": 1}
"""Of each program, its draws from the generators of Python and numpy, which torch's tag does not count."""
programs = pytest.mark.parametrize("name", ALL)


class Count(TorchDispatchMode):
    """Counts draws by torch's own tag: no code of regraft."""

    def __init__(self):
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dead = "scaled_dot_product" in str(func) and not any(isinstance(a, float) and a for a in args)
        self.draws += torch.Tag.nondeterministic_seeded in func.tags and not dead
        return func(*args, **(kwargs or {}))


@programs
def test_each_draw_is_accounted_for(name):
    build, inputs, sites, other, unrecognized = ALL[name]
    inspection = regraft.inspect(build(), inputs())
    balance = inspection.balance
    assert inspection.probe.ran, inspection.probe.reason
    assert balance == {
        "draws": sites + other + unrecognized,
        "sites": sites,
        "other": other,
        "unrecognized": unrecognized,
    }
    assert sum(row["count"] for row in inspection.left) == other + unrecognized
    assert all(row["remedy"] and row["paths"] for row in inspection.left)


@programs
def test_a_real_forward_draws_what_the_ledger_says(name):
    build, inputs, *numbers = ALL[name]
    torch.manual_seed(3)
    model, batch = build(), inputs()
    with Count() as count, torch.no_grad():
        model(*batch)
    if name not in ("LayerDrop", "stochastic depth", "a coin"):  # a layer that is skipped draws nothing
        assert count.draws == sum(numbers) - GENERATORS.get(name, 0)


@programs
def test_the_model_is_left_as_it_was(name):
    build, inputs, *_ = ALL[name]
    model = build()
    before = snapshot(model)
    regraft.inspect(model, inputs())
    assert_same(before, model)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [StochasticDepth, CoinResidual])
def test_what_a_number_leaves_out_is_seen_all_the_same(cls, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    inspection = regraft.inspect(cls(), X)
    sites = [site for site in inspection.sites if site.family == "Dropout"]
    assert [site.calls for site in sites] == [1] * len(sites)
    assert [row["name"] for row in inspection.left] == ["LayerDrop"]
    assert not any("never used" in finding.finding for finding in inspection.findings)
    assert all(edit.calls == 1 for edit in regraft.plan(cls(), {"Linear": "dropconnect(p=0.1)"}, X).grafted)
    assert regraft.verify(cls(), X).passed


@pytest.mark.parametrize("name", ["numpy", "mixup", "stochastic depth", "Switch"])
def test_draws_of_other_generators_have_their_line(name):
    build, inputs, *_ = ALL[name]
    draws = [d for d in regraft.inspect(build(), inputs()).probe.draws if d.op in ("numpy", "python")]
    for draw in draws:
        file, _, line = draw.source.partition(":")
        source = (Path(__file__).parent.parent / file).read_text().splitlines()[int(line) - 1]
        assert "random." in source


def test_a_class_that_is_called_dropout_is_replaced_by_the_rule_that_its_finding_names():
    (finding,) = regraft.inspect(GaussianNamed(), X).findings
    assert "{'own_Dropout': 'dropout(p=0.1)'}" in finding.remedy
    report = regraft.apply(GaussianNamed(), {"own_Dropout": "dropout(p=0.1)"}, X, verify=True)
    assert report.balance["grafted"] == 1

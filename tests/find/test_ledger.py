"""The ledger: every draw of a forward is at a site, has a name, or is told as unrecognized."""

from __future__ import annotations

import pytest
import torch
from programs import PROGRAMS
from snapshots import assert_same, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

import regraft

programs = pytest.mark.parametrize("name", PROGRAMS)


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
    build, inputs, sites, other, unrecognized = PROGRAMS[name]
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
    build, inputs, *numbers = PROGRAMS[name]
    torch.manual_seed(3)
    model, batch = build(), inputs()
    with Count() as count, torch.no_grad():
        model(*batch)
    elsewhere = {"LayerDrop": 1, "Switch": 1}.get(name, 0)  # numpy's and Python's generators
    if name != "LayerDrop":  # a layer that is skipped draws nothing
        assert count.draws == sum(numbers) - elsewhere


@programs
def test_the_model_is_left_as_it_was(name):
    build, inputs, *_ = PROGRAMS[name]
    model = build()
    before = snapshot(model)
    regraft.inspect(model, inputs())
    assert_same(before, model)

"""Max-norm on the matrices that multiply: the rows of each output unit, and of each expert."""

from __future__ import annotations

import pytest
import torch
from lending import weights
from readers import Attends, Experts, ParentReads, Raw, Recurs
from torch import nn

import regraft

X = torch.randn(2, 5, 6)


def held(model: nn.Module, limits: dict):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    result = regraft.max_norm(model, limits, optimizer, inputs=X)
    model(X).square().sum().backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    return result


@pytest.mark.parametrize(
    ("build", "axes"),
    [
        (Attends, {"attention.in_proj_weight": 1, "attention.out_proj.weight": 1}),
        (lambda: Recurs(nn.LSTM), {"rnn.weight_ih_l0": 1, "rnn.weight_hh_l0": 1}),
        (ParentReads, {"qkv.weight": 1, "step.weight": 1}),
        (Experts, {"up": 1, "down": 2}),
    ],
    ids=["attention", "lstm", "parent", "experts"],
)
def test_rows_are_those_of_the_product(build, axes):
    model = build()
    result = held(model, {"Linear": 0.01})
    names = dict(model.named_parameters())
    for name, axis in axes.items():
        norms = names[name].norm(dim=axis)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.01))
    assert {one["path"] for one in result.skipped} == set()


def test_a_weight_that_is_copied_before_it_multiplies_is_skipped_by_name():
    model = Raw()
    result = regraft.max_norm(model, {"Linear": 1.0}, torch.optim.SGD(model.parameters(), lr=0.1), inputs=X)
    left = {one["path"] for one in result.skipped}
    known = {name for name, one in weights(model, X).items() if one.contracted is not None}
    assert {one["path"] for one in result.limited} == known
    assert left == {"q", "o"} - known

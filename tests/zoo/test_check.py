"""The check of a graft sees each kind of failure; without this its silence would mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from . import check
from .entry import RATE, Entry

EMPTY = {"skipped": [], "mended": [], "grafted": [], "balance": {}, "left": []}


def _small():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(RATE), nn.Linear(4, 2)), (torch.randn(3, 4),)


SMALL = Entry("torch", "small", _small)


def _skip(path):
    return {"path": path, "paths": [path], "source": "net.py:1", "reason": "because"}


@pytest.fixture
def applied(monkeypatch):
    """Puts something else in the place of the graft."""

    def use(change, report=EMPTY):
        def apply(row, model, inputs):
            change(model)
            return report

        monkeypatch.setattr(check, "_apply", apply)

    return use


def test_a_call_that_is_left_and_not_explained_is_silent(applied):
    applied(lambda model: None)
    row = check.graft_row(SMALL)
    assert (row.plain, row.reached_plain, len(row.silent)) == (1, 0, 1)


def test_a_call_that_is_left_and_explained_is_skipped(applied):
    applied(lambda model: None, EMPTY | {"skipped": [_skip("1")]})
    row = check.graft_row(SMALL)
    assert (row.silent, row.skipped) == ([], {"because": 1})


@pytest.mark.parametrize("path", ["", "0", "2", "1.inner"])
def test_an_explanation_of_another_place_is_none(applied, path):
    applied(lambda model: None, EMPTY | {"skipped": [_skip(path)]})
    assert check.graft_row(SMALL).silent


def test_a_call_that_is_gone_without_a_variant_is_lost(applied):
    applied(lambda model: setattr(model[1], "p", 0.0))
    assert check.graft_row(SMALL).lost == 1


def test_another_eval_output_is_seen(applied):
    applied(lambda model: model[0].bias.data.add_(1))
    assert check.graft_row(SMALL).eval_differs


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0], "extra", 1),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.data)),
        lambda model: setattr(model[1], "p", 0.2),
        lambda model: model.eval(),
        lambda model: model[2].register_forward_hook(print),
        lambda model: setattr(model[1], "__class__", type("Dropout", (nn.Dropout,), {})),
        lambda model: setattr(model, "1", nn.Dropout(RATE)),
        lambda model: model.register_buffer("more", torch.ones(1)),
    ],
    ids=["attribute", "parameter", "rate", "mode", "hook", "class", "module", "key"],
)
def test_what_a_revert_leaves_behind_is_seen(change):
    model, _ = _small()
    was = check.snapshot(model)
    assert not check.differences(was, check.snapshot(model))
    change(model)
    assert check.differences(was, check.snapshot(model))


def test_an_error_names_its_step(applied):
    def fail(model):
        raise ValueError("no graft")

    applied(fail)
    assert check.graft_row(SMALL).error == "apply: ValueError: no graft"

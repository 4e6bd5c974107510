"""Rates in numbers: recurrent layers, floats on modules, and what a rule makes of a rate."""

from __future__ import annotations

import pytest
import tiny
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft
from regraft.errors import RateError

X = torch.randn(2, 5, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layers_rate_is_set_runs_and_is_reverted(kind):
    module = kind(4, 4, 2, dropout=0.1, batch_first=True)
    before = snapshot(module)
    with torch.no_grad():
        expected = module.eval()(X)[0]
    module.train()
    report = regraft.apply(module, {"Dropout": "dropout(p=0.4)"})
    assert (report.grafted[0].op, report.grafted[0].after) == (kind.__name__, f"{kind.__name__}(p=0.4)")
    assert module.dropout == 0.4
    assert type(module) is kind
    assert not torch.equal(module(X)[0], module(X)[0])
    with torch.no_grad():
        assert torch.equal(module.eval()(X)[0], expected)
    module.train()
    regraft.apply(module, {kind.__name__: "off"})
    assert torch.equal(module(X)[0], module(X)[0])
    regraft.revert(module)
    assert_same(before, module)
    assert module.dropout == 0.1


def test_a_recurrent_layer_in_a_model():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.drop = nn.LSTM(4, 4, 2, dropout=0.2, batch_first=True), nn.Dropout(0.2)

        def forward(self, x):
            return self.drop(self.rnn(x)[0])

    model = Reader()
    report = regraft.apply(model, {"Dropout": "dropout(p='x2')"}, X)
    assert [edit.after for edit in report.grafted] == ["LSTM(p=0.4)", "Dropout(p=0.4)"]
    report = regraft.apply(model, {"Dropout": "gaussian"}, X)
    assert [edit.after for edit in report.grafted] == ["GaussianDropout(p=0.2)"] * 2
    assert model.rnn.dropout == 0.2


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        ("gaussian", 0.3),
        ("gaussian(p=0.5)", 0.5),
        ("gaussian(p=0)", 0.0),
        ("gaussian(p='x2')", 0.6),
        ("gaussian(p='x0.5')", 0.15),
        (regraft.variant("gaussian", p=lambda site: site.p / 3), 0.1),
    ],
    ids=str,
)
def test_a_rate_is_the_sites_own_a_number_relative_or_of_the_site(rule, rate):
    net = nn.Sequential(nn.Dropout(0.3))
    report = regraft.apply(net, {"Dropout": rule})
    assert net[0].p == pytest.approx(rate)
    assert report.grafted[0].options["p"] == pytest.approx(rate)
    values = net(torch.ones(100_000))
    assert values.var().item() == pytest.approx(rate / (1 - rate), rel=0.05, abs=1e-9)


def test_a_linear_without_a_rate_gets_the_documented_default():
    net = tiny.mlp()
    report = regraft.apply(net, {"Linear": "dropconnect"})
    assert {edit.options["p"] for edit in report.grafted} == {0.2}
    assert net[0].p == 0.2
    regraft.revert(net)
    assert not hasattr(net[0], "p")


@pytest.mark.parametrize("rate", ["x4", lambda site: 1.5, lambda site: "0.1", lambda site: None])
def test_a_rate_that_leaves_its_range_names_the_rule_and_the_site(rate):
    net = nn.Sequential(nn.Dropout(0.3))
    before = snapshot(net)
    with pytest.raises(RateError, match="--> rule 0: 'Dropout', at '0'") as caught:
        regraft.apply(net, {"Dropout": regraft.variant("gaussian", p=rate)})
    assert isinstance(caught.value, ValueError)
    assert_same(before, net)


def test_all_rates_out_of_range_are_told_together():
    net = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.8), nn.Dropout(0.7))
    with pytest.raises(ValueError, match="2 problems, nothing was changed"):
        regraft.apply(net, {"Dropout": "gaussian(p='x1.5')"})


def test_floats_that_models_read_at_call_time_are_followed():
    """BART reads `self.dropout` at each call: the graft uses what the call carries."""
    model = tiny.bart()
    regraft.apply(model, {"Dropout": "gaussian"})
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    batch = {**tiny.tokens(), "decoder_input_ids": tiny.tokens()["input_ids"]}
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["drop_prob", "p", "drop_rate", "dropout_rate"])
def test_a_private_modules_own_name_for_its_rate_is_used(name):
    class DropPath(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, 0.3)

        def forward(self, x):
            keep = 1 - getattr(self, name)
            rows = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep)
            return x * rows / keep if self.training else x

    net = nn.Sequential(DropPath())
    regraft.apply(net, {"DropPath": "droppath(p=0.5)"})
    assert getattr(net[0], name) == 0.5
    kept = (net(torch.ones(20_000, 1)) != 0).float().mean().item()
    assert kept == pytest.approx(0.5, abs=0.02)
    regraft.revert(net)
    assert getattr(net[0], name) == 0.3

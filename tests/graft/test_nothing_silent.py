"""Promise 5: every selected site is grafted and known to run, or skipped with a reason and a remedy."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft

RULES = {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)", "Embedding": "neftune"}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (tiny.bert, None),
        (tiny.albert, None),
        (tiny.vit, None),
        (tiny.encoder, torch.ones(2, 4, 16)),
        (tiny.Attention, torch.ones(2, 4, 16)),
    ],
)
def test_every_selected_site_is_in_one_of_the_two_lists(build, inputs):
    model = build()
    sites = [site for site in regraft.inspect(model, inputs).sites if site.family != "Convolution"]
    rules = {key: value for key, value in RULES.items() if any(key in (s.op, s.family) for s in sites)}
    report = regraft.apply(model, rules, inputs)
    listed = [(one.path, one.op) for one in [*report.grafted, *report.skipped]]
    assert sorted(listed) == sorted((site.path, site.op) for site in sites)
    assert all(edit.calls for edit in report.grafted)
    assert all(skip.reason and skip.remedy for skip in report.skipped)
    assert all(0 <= one.rule < len(rules) for one in [*report.grafted, *report.skipped])


def test_bert_base_has_38_sites_and_all_are_grafted():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        report = regraft.apply(model, {"Dropout": "multisample"})
        assert (len(report.grafted), len(report.skipped)) == (38, 0)
        assert sum(len(edit.paths) for edit in report.grafted) == 38 + 12
        assert "38 sites grafted, 0 skipped" in str(report)
        regraft.revert(model)


def test_trap_14_a_rate_of_0_is_said_loudly_and_the_rule_that_helps_is_named():
    model = tiny.bert(p=0.0)
    report = regraft.apply(model, {"Dropout": "gaussian"})
    assert report.grafted == []
    assert {skip.reason for skip in report.skipped} == {"its rate is 0"}
    assert {skip.remedy for skip in report.skipped} == {"name one: 'Dropout': 'gaussian(p=0.1)'"}
    assert "every selected site is at rate 0" in report.notes[0]
    assert "every selected site is at rate 0" in str(report).split("\n\n")[0]
    report = regraft.apply(model, {"Dropout": "gaussian(p=0.1)"})
    assert len(report.grafted) == 8
    assert report.notes == []


def test_one_site_at_0_among_others_is_no_note():
    net = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1))
    report = regraft.apply(net, {"Dropout": "gaussian"})
    assert [skip.path for skip in report.skipped] == ["0"]
    assert not any("rate 0" in note for note in report.notes)


@pytest.mark.parametrize("rule", ["gaussian(sigma=0.1)", "gaussian(p=0.0)", "off", "standout(beta=1.0)"])
def test_a_rate_of_0_is_no_reason_where_the_rule_sets_it_or_needs_none(rule):
    report = regraft.apply(nn.Sequential(nn.Dropout(0.0)), {"Dropout": rule})
    assert len(report.grafted) == 1


def test_a_relative_rate_of_0_is_still_0():
    report = regraft.apply(nn.Sequential(nn.Dropout(0.0)), {"Dropout": "gaussian(p='x2')"})
    assert report.skipped[0].reason == "its rate is 0"


@pytest.mark.parametrize("variant", ["gaussian", "dropout", "multisample"])
def test_a_model_that_drops_everything_is_skipped_unless_the_rule_names_a_rate(variant):
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(1.0)

        def forward(self, x):
            return F.dropout(self.drop(x), 1.0, self.training)

    net = Everything()
    report = regraft.apply(net, {"Dropout": variant}, torch.ones(2, 3))
    assert report.grafted == []
    assert {skip.reason for skip in report.skipped} == {"its rate is 1: it drops everything"}
    assert len(regraft.apply(net, {"Dropout": f"{variant}(p=0.1)"}, torch.ones(2, 3)).grafted) == 2
    assert len(regraft.apply(net, {"Dropout": f"{variant}(p='x0.5')"}, torch.ones(2, 3)).grafted) == 2
    assert net(torch.ones(200)).count_nonzero() > 0


@pytest.mark.parametrize("variant", ["dropout(p=0.3)", "gaussian"])
def test_a_recurrent_layer_skips_what_cannot_be(variant):
    one = regraft.apply(nn.LSTM(4, 4), {"Dropout": variant})
    assert "of one layer has no dropout" in one.skipped[0].reason
    two = regraft.apply(nn.LSTM(4, 4, 2, dropout=0.1), {"Dropout": variant})
    after = {"gaussian": "GaussianDropout(p=0.1)"}.get(variant, "LSTM(p=0.3)")
    assert [edit.after for edit in two.grafted] == [after]


class Instance(nn.Module):
    """Somebody put a forward on the instance: a change of class has no effect there."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.call = tiny.Calls()
        self.drop.forward = lambda x: F.dropout(x, 0.5, self.training)
        self.call.forward = lambda x: F.dropout(x, 0.5, self.training)

    def forward(self, x):
        return self.call(self.drop(x))


def test_a_forward_on_the_instance_hides_the_classs_and_is_skipped():
    report = regraft.apply(Instance(), {"Dropout": "gaussian"}, torch.ones(2, 3))
    assert report.grafted == []
    assert [skip.path for skip in report.skipped] == ["drop", "call"]
    assert {skip.reason for skip in report.skipped} == {
        "something put a forward on the instance, which hides the class's"
    }


def test_a_stateful_variant_at_a_call_is_skipped_with_the_reason():
    report = regraft.apply(tiny.bart(), {"Dropout": "concrete"})
    assert report.grafted == []
    assert all("brings state of its own" in skip.reason for skip in report.skipped)


def test_an_any_type_rule_takes_what_its_variant_fits():
    report = regraft.apply(tiny.mlp(), {"*": "gaussian"})
    assert [edit.op for edit in report.grafted] == ["Dropout"]
    report = regraft.apply(tiny.mlp(), {lambda site: True: "gaussian"})
    assert [skip.reason for skip in report.skipped] == ["'gaussian' cannot replace Linear"] * 2


def test_later_rules_win_and_none_leaves_alone():
    model = tiny.bert()
    rules = [
        ("Dropout", "gaussian"),
        ("Dropout@**.layer.0.**", "multisample(p=0.3)"),
        ("Dropout@**.attention.**", None),
        (lambda site: site.path == "dropout", "off"),
    ]
    report = regraft.apply(model, rules)
    assert {edit.path: (edit.variant, edit.rule) for edit in report.grafted} == {
        "bert.embeddings.dropout": ("gaussian", 0),
        "bert.encoder.layer.0.output.dropout": ("multisample", 1),
        "bert.encoder.layer.1.output.dropout": ("gaussian", 0),
        "dropout": ("off", 3),
    }
    assert report.rules[2] == ["Dropout@**.attention.**", None]
    assert type(model.bert.encoder.layer[0].attention.output.dropout) is nn.Dropout


def test_a_class_means_the_calls_that_use_its_rate():
    """BERT's attention drops at the rate of an nn.Dropout that is never called."""
    model = tiny.bert()
    before = model(**tiny.tokens()).logits
    report = regraft.apply(model, {nn.Dropout: "off"})
    assert len(report.grafted) == len(regraft.apply(tiny.bert(), {"Dropout": "off"}).grafted) == 8
    assert torch.equal(model(**tiny.tokens()).logits, model(**tiny.tokens()).logits)
    assert not torch.equal(before, model(**tiny.tokens()).logits)
    regraft.revert(model, nn.Dropout)
    assert all(site.variant is None for site in regraft.inspect(model).sites)


class BorrowsARate(nn.Module):
    """Calls a dropout module in one place and uses its rate in another."""

    def __init__(self, cls):
        super().__init__()
        self.drop = cls(0.5)

    def forward(self, x):
        return F.dropout(self.drop(x), self.drop.p, self.training)


class MyDropout(nn.Dropout):
    pass


@pytest.mark.parametrize(("cls", "meant"), [(nn.Dropout, 2), (MyDropout, 0), (nn.Module, 2)])
def test_a_module_that_runs_and_lends_its_rate_is_two_sites(cls, meant):
    model = BorrowsARate(nn.Dropout)
    if not meant:
        with pytest.raises(LookupError):
            regraft.plan(model, {cls: "gaussian"}, torch.ones(2, 3))
        return
    plan = regraft.plan(model, {cls: "gaussian"}, torch.ones(2, 3))
    assert len(plan.grafted) == meant

"""Plans that were edited by hand: the edits are what is carried out, and what does not go together is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import tiny
import torch
from snapshots import assert_same, differences, snapshot
from torch import nn

import regraft
from regraft.errors import FileError, MisfitError, OptionError, RateError, RulesError, UnknownVariantError

X = torch.ones(2, 4, 16)


class Block(nn.Module):
    """A residual block, so that what a drop-path inserted behind it drops is what it adds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(x)


def stack():
    return nn.Sequential(Block(), Block(), nn.Dropout(0.1), nn.LSTM(16, 16, 2, dropout=0.2))


CASES = {
    "bert": (tiny.bert, None, {"Dropout": "gaussian(p='x2')", "Linear@classifier": "standout"}),
    "stack": (
        stack,
        X,
        {"after:Block": "droppath(p=0.5)", "before:LSTM": "gaussian(p=0.3)", "Dropout": "dropout(p=0.4)"},
    ),
    "calls": (lambda: tiny.Calls(tiny.Calls()), X, {"Dropout": "multisample(num_samples=4)"}),
}


def edited(plan, change):
    """The plan, read from its JSON after `change` has been made to it."""
    values = json.loads(plan.to_json())
    change(values)
    return regraft.Plan.from_json(json.dumps(values))


@pytest.mark.parametrize(("build", "inputs", "rules"), CASES.values(), ids=CASES)
def test_before_and_after_are_read_by_nobody(build, inputs, rules):
    def scribble(values):
        for edit in values["grafted"]:
            edit["before"] = f"<{edit['before']} p=0.99 on what it adds>"
            edit["after"] = edit["after"].replace("on what it adds", "") + " p=0.77, then nothing"

    plan = regraft.plan(build(), rules, inputs)
    other = edited(plan, scribble)
    first = build()
    second = copy.deepcopy(first)
    one, two = regraft.apply(first, plan), regraft.apply(second, other)
    assert [type(module) for module in first.modules()] == [type(module) for module in second.modules()]
    assert str(one) != str(two)
    changed = {name for edit, twin in zip(one.grafted, two.grafted, strict=True) for name in vars(edit)
               if getattr(edit, name) != getattr(twin, name)}  # fmt: skip
    assert changed == {"before"}  # `after` is written anew from what the edit does
    given = inputs if inputs is not None else tiny.tokens()
    outputs = []
    for model in (first, second):
        torch.manual_seed(5)
        output = model.train()(**given) if isinstance(given, dict) else model.train()(given)
        outputs.append(output[0] if isinstance(output, tuple) else getattr(output, "logits", output))
    assert torch.equal(*outputs)


def test_an_option_that_is_changed_is_carried_out_and_printed():
    def change(values):
        values["grafted"][0]["options"]["p"] = 0.35

    net = tiny.mlp()
    report = regraft.apply(net, edited(regraft.plan(net, {"Dropout": "gaussian"}), change))
    assert report.grafted[0].after == repr(net[2]) == "GaussianDropout(p=0.35)"
    assert "p=0.35" in str(report)


def test_a_rule_that_an_edit_does_not_follow_is_refused():
    plan = regraft.plan(tiny.mlp(), {"Dropout": "gaussian(p=0.2)", "Linear": "dropconnect(p=0.1)"})

    def variant(values):
        values["rules"][0][1] = "uniform(p=0.2)"

    def rate(values):
        values["grafted"][0]["options"]["p"] = 0.5

    def path(values):
        values["rules"][0][0] = "Dropout@head.**"

    def number(values):
        values["grafted"][0]["rule"] = 7

    for change, message in [
        (variant, "rule 0 says 'Dropout': 'uniform(p=0.2)', and the edit 'gaussian'"),
        (rate, "and the edit p=0.5[\\s\\S]*edits are what is carried out"),
        (path, "'Dropout@head.\\*\\*': 'gaussian\\(p=0.2\\)', which does not mean this path"),
        (number, "there is no rule 7"),
    ]:
        with pytest.raises(FileError, match=message if "\\" in message else re.escape(message)) as caught:
            edited(plan, change)
        assert "grafted[" in str(caught.value)
    with pytest.raises(RulesError) as caught:
        edited(plan, lambda values: [variant(values), rate(values)])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("variant", "gausian", UnknownVariantError),
        ("options", {"p": 1.5}, RateError),
        ("options", {"p": 0.1, "sgima": 2}, OptionError),
        ("options", [], FileError),
        ("kind", "modul", FileError),
        ("path", 3, FileError),
        ("methods", "forward", FileError),
        ("family", "Linear", TypeError),
        ("rule", None, FileError),
        ("residual", "yes", FileError),
    ],
)
def test_an_edit_that_is_none_is_refused_when_it_is_read(name, value, error):
    def change(values):
        values["grafted"][0][name] = value

    plan = regraft.plan(tiny.mlp(), {"Dropout": "gaussian"})
    with pytest.raises(error) as caught:
        edited(plan, change)
    assert isinstance(caught.value, regraft.RegraftError)
    assert "grafted[0]" in str(caught.value)


def test_an_edit_of_what_the_model_has_not_is_refused_when_it_is_applied():
    net = tiny.mlp()
    plan = regraft.plan(net, {"Dropout": "gaussian"})
    before = snapshot(net)

    def elsewhere(values):
        values["grafted"][0] |= {"path": "1", "paths": ["1"]}

    with pytest.raises(MisfitError, match="1: the plan has Dropout, which this model has not"):
        regraft.apply(net, edited(plan, elsewhere))
    assert_same(before, net)


def test_sites_that_the_plan_does_not_name_are_named():
    plan = regraft.plan(tiny.bert(layers=1), {"Dropout": "gaussian", "Linear@classifier": "standout"})
    report = regraft.apply(tiny.bert(layers=2), plan)
    (note,) = [note for note in report.notes if "not in the plan" in note]
    assert note.startswith("3 sites that 'Dropout' matches in this model are not in the plan and stay")
    assert "bert.encoder.layer.1.output.dropout" in note
    assert not any("not in the plan" in note for note in regraft.apply(tiny.bert(layers=1), plan).notes)


def test_a_rule_that_is_added_by_hand_has_no_effect_and_is_named():
    net = tiny.mlp()

    def add(values):
        values["rules"].append(["Linear", "dropconnect(p=0.1)"])

    report = regraft.apply(net, edited(regraft.plan(net, {"Dropout": "gaussian"}), add))
    assert any("2 sites that 'Linear' matches in this model are not in the plan" in x for x in report.notes)


def test_a_plan_is_a_value_without_a_model():
    net = tiny.mlp()
    plan = regraft.plan(net, {"Dropout": "gaussian", "after:Linear": "uniform(p=0.1)"})
    assert plan.grafted[0].site.module is net[2]
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        assert other.grafted[0].site is None
        again = tiny.mlp()
        assert regraft.apply(again, other).grafted == plan.grafted
        assert type(again[2]).__name__ == "GaussianDropout"
    with_sites = tiny.mlp()  # the plan's sites are another model's
    regraft.apply(with_sites, plan)
    assert type(with_sites[2]).__name__ == "GaussianDropout"
    assert type(net[2]) is nn.Dropout


def test_a_report_stays_what_it_was():
    model = tiny.bert()
    report = regraft.apply(model, {"Dropout": "gaussian(p=0.2)"})
    text, values = str(report), copy.deepcopy(report.to_dict())
    schedule = regraft.schedule(model, p={"start": 0.0, "end": 0.5, "steps": 4})
    schedule.step()
    regraft.apply(model, {"Dropout": "multisample(p=0.3)"})
    regraft.revert(model)
    assert (str(report), report.to_dict()) == (text, values)
    report.to_dict()["grafted"][0]["options"]["p"] = 0.9
    assert report.to_dict() == values


def test_a_saved_plan_has_the_rates_outside_a_schedule(tmp_path):
    model = tiny.bert()
    regraft.apply(model, {"Dropout": "gaussian"})
    schedule = regraft.schedule(model, p={"start": 0.4, "end": 0.0, "steps": 4})
    schedule.step()
    assert model.dropout.p == schedule.rate == pytest.approx(0.3)
    regraft.save_plan(model, tmp_path)
    again = tiny.bert()
    report = regraft.load_plan(again, tmp_path)
    assert all("(p=0.1)" in edit.after for edit in report.grafted)
    assert again.dropout.p == model.dropout.p
    report.schedules[0].remove()
    assert again.dropout.p == 0.1


def test_a_saved_insertion_reads_as_the_rule_it_was(tmp_path):
    net = tiny.mlp()
    rules = {"after:Linear@0": "dropout(p=0.3)", regraft.before("Linear@3", "input"): "gaussian(p=0.1)"}
    regraft.apply(net, rules)
    plan = json.loads(regraft.save_plan(net, tmp_path).read_text())
    assert [rule[0] for rule in plan["rules"]] == ["after:Linear@0", "before:Linear@3#input"]
    again = tiny.mlp()
    regraft.load_plan(again, tmp_path)
    assert differences(snapshot(net), snapshot(again)) != []  # other weights
    assert [type(one) for one in net] == [type(one) for one in again]

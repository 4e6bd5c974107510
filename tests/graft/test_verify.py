"""`regraft.verify`: the promises, checked on a model; broken ones are caught."""

import json

import pytest
import torch
from torch import nn

import regraft


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))


X = torch.randn(2, 4)


def outcomes(made):
    return {check.promise: check.passed for check in made.checks}


def test_all_promises_hold_and_the_model_is_left_alone():
    model = net()
    before = dict(model.named_modules())
    made = regraft.verify(model, inputs=X)
    assert made.passed
    assert all(passed is True for passed in outcomes(made).values()), made
    assert dict(model.named_modules()) == before
    assert type(model[1]) is nn.Dropout
    assert model.training


def test_without_inputs_the_eval_output_is_not_compared():
    made = regraft.verify(net())
    assert made.passed is None
    assert outcomes(made)["each graft runs"] is None
    assert outcomes(made)["same eval"] is None
    assert outcomes(made)["nothing silent"] is None
    assert "not checked" in str(made)


def test_rules_of_ones_own():
    made = regraft.verify(net(), inputs=X, rules={"Dropout": "multisample"})
    assert made.rules == [["Dropout", "multisample"]]
    mc = regraft.verify(net(), inputs=X, rules={"Dropout": "mc"})
    assert outcomes(mc)["same eval"] is None  # the variant changes it by name
    with pytest.raises(regraft.errors.NoMatchError):
        regraft.verify(net(), rules={"Dropout@nowhere": "gaussian"})


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        ("revert", "a way back"),
        ("eval", "same eval"),
        ("weights", "same weights"),
        ("hooks", "same model otherwise"),
        ("reason", "nothing silent"),
        ("copy", "travels: deep copy and pickle"),
        ("half", "all or nothing"),
    ],
)
def test_a_broken_promise_is_caught(broken, promise, monkeypatch):
    from regraft.graft import verify

    real = verify.apply

    def apply(model, rules, inputs=None):
        if broken == "half" and any("NoSuchKind" in str(rule[0]) for rule in rules):
            model[1] = nn.Dropout(0.5)
        report = real(model, rules, inputs)
        if broken == "eval":
            model[0].bias.data += 1
        if broken == "weights":
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        if broken == "hooks":
            model.register_forward_hook(lambda *_: None)
        if broken == "reason":
            report.grafted[0].__dict__["calls"] = 0
        if broken == "copy":
            model.forward = lambda x: x
        return report

    monkeypatch.setattr(verify, "apply", apply)
    if broken == "revert":
        monkeypatch.setattr(verify, "revert", lambda model: model)
    made = regraft.verify(net(), inputs=X)
    assert not made.passed
    assert outcomes(made)[promise] is False
    assert json.loads(made.to_json())["passed"] is False
    assert "FAIL" in str(made)

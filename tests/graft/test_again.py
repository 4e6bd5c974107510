"""Again and again: twice is once, later grafts take earlier ones' places, blocks end, plans travel."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from snapshots import assert_same, differences, snapshot
from torch import nn

import regraft
from regraft.errors import MisfitError

X = torch.ones(2, 4, 16)
BUILDS = [
    (tiny.bert, None, {"Dropout": "gaussian(p='x2')", "Linear@classifier": "standout(gate='learned')"}),
    (tiny.encoder, X, {"Dropout": "multisample"}),
    (tiny.Attention, X, {"Dropout": "gaussian(p=0.2)", "Linear": "mixout(p=0.1)"}),
    (lambda: tiny.Calls(tiny.Calls()), X, {"Dropout": "mc", "*@child": "off"}),
]
builds = pytest.mark.parametrize(
    ("build", "inputs", "rules"), BUILDS, ids=["bert", "encoder", "attention", "calls"]
)


@builds
def test_apply_twice_equals_once(build, inputs, rules):
    model = build()
    original = snapshot(model)
    first = regraft.apply(model, rules, inputs)
    once = snapshot(model)
    second = regraft.apply(model, rules, inputs)
    assert (first.grafted, first.skipped) == (second.grafted, second.skipped)
    assert first.state_keys == second.state_keys
    assert differences(once, snapshot(model)) == []
    regraft.revert(model)
    assert_same(original, model)


def test_the_same_rule_again_keeps_what_a_variant_has_learned():
    model = tiny.mlp()
    rules = {"Linear": "standout(gate='learned')", "Dropout": "concrete"}
    report = regraft.apply(model, rules)
    gate, logit = model[0].gate_weight, model[2].concrete_logit
    again = regraft.apply(model, rules)
    assert again.state_keys == report.state_keys != []
    assert model[0].gate_weight is gate
    assert model[2].concrete_logit is logit
    regraft.apply(model, {"Linear": "standout(gate='learned', alpha=2.0)"})
    assert model[0].gate_weight is not gate


def test_a_relative_rate_is_relative_to_the_models_own_however_often():
    model = tiny.bert()
    for _ in range(3):
        report = regraft.apply(model, {"Dropout": "gaussian(p='x0.5')"})
        assert model.dropout.p == 0.05
        assert {edit.before.partition("(")[2] for edit in report.grafted} == {"p=0.1)"}
    regraft.revert(model)
    assert model.dropout.p == 0.1


def test_a_relative_rate_multiplies_what_each_call_carries():
    model = tiny.Attention(p=0.4)
    regraft.apply(model, {"Dropout": "dropout(p='x0.5')"}, X)
    model.p = 0.8  # a schedule of the user's own
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is nn.functional.scaled_dot_product_attention:
                seen.append((kwargs or {}).get("dropout_p"))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(X)
    assert seen == [0.4]


PAIRS = [
    ("multisample(p=0.3)", "gaussian"),
    ("standout(gate='learned', features=16)", "gaussian"),
    ("gaussian", "dropout(p=0.3)"),
    ("dropout(p=0.3)", "gaussian"),
    ("mc", "off"),
    ("off", "multisample"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize(
    ("build", "inputs"), [(tiny.encoder, X), (tiny.bert, None), (lambda: nn.Sequential(nn.Dropout(0.1)), X)]
)
def test_the_later_graft_takes_the_earlier_ones_place(build, inputs, first, second):
    model, alone = build(), build()
    original = snapshot(model)
    regraft.apply(model, {"Dropout": first}, inputs)
    regraft.apply(model, {"Dropout": second}, inputs)
    regraft.apply(alone, {"Dropout": second}, inputs)
    for (name, one), other in zip(model.named_modules(), alone.modules(), strict=True):
        assert grafts(one) == grafts(other), name
        if grafts(other):
            assert type(one).__name__ == type(other).__name__
        assert getattr(one, "p", None) == getattr(other, "p", None)
        assert (
            getattr(one, "dropout", None) is None
            or not isinstance(one.dropout, float)
            or one.dropout == other.dropout
        )
    assert list(model.state_dict()) == list(alone.state_dict())
    regraft.revert(model)
    assert_same(original, model)


def grafts(module):
    """What acts at a module; boundaries may stay from an earlier graft."""
    record = module.__dict__.get("_regraft", {})
    return {
        slot: (graft.edit["variant"], graft.edit["options"]) for slot, graft in record.items() if graft.edit
    }


def test_grafts_at_other_sites_add_up():
    model = tiny.bert()
    original = snapshot(model)
    regraft.apply(model, {"Dropout@**.attention.**": "gaussian"})
    regraft.apply(model, {"Dropout@**.output.dropout": "multisample"})
    regraft.apply(model, {"Linear@classifier": "dropconnect(p=0.2)"})
    variants = {site.path: site.variant for site in regraft.inspect(model).sites if site.variant}
    assert len(variants) == 2 + 4 + 1  # two attentions; of four outputs the two in attention were replaced
    assert variants["bert.encoder.layer.0.attention.output.dropout"].startswith("MultiSample")
    assert variants["bert.encoder.layer.0.attention.self"].startswith("gaussian")
    regraft.revert(model)
    assert_same(original, model)


@builds
def test_grafted_for_a_block_and_after_an_exception(build, inputs, rules):
    model = build()
    before = snapshot(model)
    with regraft.grafted(model, rules, inputs) as report:
        assert report.grafted
        assert differences(before, snapshot(model))
    assert_same(before, model)
    with pytest.raises(ZeroDivisionError), regraft.grafted(model, rules, inputs):
        raise ZeroDivisionError
    assert_same(before, model)


def test_a_block_on_a_grafted_model_gives_back_the_grafts_and_their_trained_state():
    model = tiny.mlp()
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)", "Linear": "standout(gate='learned')"})
    with torch.no_grad():
        model[0].gate_weight.fill_(0.5)
    weight, keys = model[0].gate_weight, list(model.state_dict())
    x = torch.ones(3, 6)
    torch.manual_seed(1)
    expected = model(x)
    with regraft.grafted(model, {"Dropout": "off", "Linear": "dropconnect(p=0.1)"}):
        assert "0.gate_weight" not in model.state_dict()
        with regraft.grafted(model, {"Dropout": "mc"}):
            assert type(model[2]).__name__ == "MCDropout"
        assert type(model[2]).__name__ == "Off"
    assert list(model.state_dict()) == keys
    assert model[0].gate_weight is weight
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


@builds
@pytest.mark.parametrize("second", ["uniform(p=0.3)", "off", "dropout(p=0.3)"])
def test_blocks_that_overlap_take_out_their_own(build, inputs, rules, second):
    model = build()
    before = snapshot(model)
    outer, inner = regraft.grafted(model, rules, inputs), regraft.grafted(model, {"Dropout": second}, inputs)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    alone = build()
    regraft.apply(alone, {"Dropout": second}, inputs)
    assert [grafts(one) for one in model.modules()] == [grafts(one) for one in alone.modules()]
    inner.__exit__(None, None, None)
    assert_same(before, model)


def test_blocks_on_top_of_a_graft_give_it_back_whichever_ends_first():
    for order in [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)]:
        model = tiny.mlp()
        regraft.apply(model, {"Dropout": "concrete"})
        logit = model[2].concrete_logit
        names = ["gaussian(p=0.2)", "uniform(p=0.3)", "multisample(p=0.4)"]
        blocks = [regraft.grafted(model, {"Dropout": name}) for name in names]
        for block in blocks:
            block.__enter__()
        for done, number in enumerate(order):
            blocks[number].__exit__(None, None, None)
            left = [names[one] for one in sorted(set(range(3)) - set(order[: done + 1]))]
            expected = left[-1].partition("(")[0] if left else "concrete"
            assert model[2]._regraft["variant"].variant == expected
        assert model[2].concrete_logit is logit
        regraft.revert(model)
        assert type(model[2]) is nn.Dropout


def test_what_is_applied_inside_a_block_stays():
    model = tiny.mlp()
    with regraft.grafted(model, {"Dropout": "gaussian(p=0.2)"}):
        regraft.apply(model, {"Dropout": "uniform(p=0.3)"})
    assert type(model[2]).__name__ == "UniformDropout"
    with regraft.grafted(model, {"Dropout": "gaussian(p=0.2)"}):
        regraft.revert(model)
    assert type(model[2]) is nn.Dropout


def test_a_block_whose_rules_are_wrong_never_begins():
    model = tiny.mlp()
    before = snapshot(model)
    with pytest.raises(LookupError), regraft.grafted(model, {"Dropot": "gaussian"}):
        raise AssertionError
    assert_same(before, model)


@builds
def test_a_plan_travels_as_json(build, inputs, rules):
    plan = regraft.plan(build(), rules, inputs)
    text = plan.to_json()
    assert json.loads(text)["schema"] == 1
    again = regraft.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    model, direct = build(), build()
    report = regraft.apply(model, again)
    assert report.grafted == regraft.apply(direct, rules, inputs).grafted
    assert [type(one).__name__ for one in model.modules()] == [type(one).__name__ for one in direct.modules()]


def test_a_plan_from_a_predicate_lists_the_paths_it_chose():
    def wide(site):
        return site.p == 0.5

    net = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.5))
    plan = regraft.Plan.from_json(regraft.plan(net, {wide: "gaussian"}).to_json())
    assert plan.rules == [["<wide>", "gaussian"]]
    assert [edit.path for edit in plan.grafted] == ["1"]
    regraft.apply(net, plan)
    assert repr(net[1]) == "GaussianDropout(p=0.5)"


def test_a_callable_rate_is_a_number_in_the_plan():
    net = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2))
    plan = regraft.plan(net, {"Dropout": regraft.variant("gaussian", p=lambda site: site.p / 2)})
    assert [edit.options["p"] for edit in regraft.Plan.from_json(plan.to_json()).grafted] == [0.05, 0.1]


def test_a_plan_for_another_model_lists_the_differences():
    plan = regraft.plan(tiny.mlp(), {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"})
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.1))
    before = snapshot(other)
    with pytest.raises(MisfitError) as caught:
        regraft.apply(other, plan)
    text = str(caught.value)
    assert "2 sites differ" in text
    assert "0: the plan has Linear/Linear[6, 8], this model Linear/Linear[6, 9]" in text
    assert "3: the plan has Linear/Linear[8, 3], this model nothing" in text
    assert isinstance(caught.value, ValueError)
    assert_same(before, other)


def test_a_plan_fits_where_only_sites_it_leaves_alone_differ():
    plan = regraft.plan(tiny.mlp(), {"Dropout": "gaussian"})
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.4), nn.Identity())
    assert regraft.apply(other, plan).grafted[0].path == "2"


@pytest.mark.parametrize("rules", [rules for _, _, rules in BUILDS[:1]])
def test_saved_plans_rebuild_the_grafts_beside_a_checkpoint(tmp_path, rules):
    model = tiny.bert()
    regraft.apply(model, rules)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert regraft.save_plan(model, tmp_path) == tmp_path / "regraft.json"
    again = tiny.bert()
    report = regraft.load_plan(again, tmp_path)
    again.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert len(report.grafted) == 9
    for one, other in zip(model.modules(), again.modules(), strict=True):
        assert type(one) is type(other)
    torch.manual_seed(5)
    expected = model(**tiny.tokens()).logits
    torch.manual_seed(5)
    assert torch.equal(again(**tiny.tokens()).logits, expected)


def test_the_keys_of_a_shared_modules_state_are_all_of_its_names():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    before = set(model.state_dict())
    report = regraft.apply(model, {"Linear": "standout(gate='learned')"}, torch.ones(2, 4))
    assert set(report.state_keys) == set(model.state_dict()) - before
    assert {key.rpartition(".")[0] for key in report.state_keys} == {"0", "1.1"}

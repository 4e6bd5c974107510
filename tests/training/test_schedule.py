"""Rates over time: the shapes, every kind of site, and what is left when the schedule goes."""

import copy
import json
import math

import pytest
import tiny
import torch
import torch._dynamo.testing
from torch import nn

import regraft
from regraft.errors import MisfitError, NoMatchError, OptionError, RateError, WrongKindError
from regraft.variants.registry import names, spec

P = {"start": 0.0, "end": 0.4, "steps": 4}
X = torch.randn(2, 4, 16)


def net(p=0.1):
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(p), nn.Linear(16, 16))


def rates_over(schedule, steps=6):
    return [round(schedule.rate, 6)] + [round(schedule.step(), 6) for _ in range(steps)]


SHAPES = {
    "linear": ({}, [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
    "down": ({"start": 0.4, "end": 0.0}, [0.4, 0.3, 0.2, 0.1, 0, 0, 0]),
    "cosine": ({"shape": "cosine"}, [0, 0.058579, 0.2, 0.341421, 0.4, 0.4, 0.4]),
    "step": ({"shape": "step", "stairs": 2}, [0, 0, 0.2, 0.2, 0.4, 0.4, 0.4]),
    "late": ({"shape": "late"}, [0, 0, 0, 0, 0.4, 0.4, 0.4]),
    "early": ({"start": 0.4, "end": 0.0, "shape": "early"}, [0.4, 0.4, 0.4, 0.4, 0, 0, 0]),
    "curriculum": (
        {"shape": "curriculum"},
        [round(0.4 * (1 - math.exp(-2.5 * t)), 6) for t in range(4)] + [0.4, 0.4, 0.4],
    ),
}


@pytest.mark.parametrize(("given", "expected"), SHAPES.values(), ids=SHAPES)
def test_shapes(given, expected):
    assert rates_over(regraft.schedule(net(), {**P, **given})) == expected


def test_what_a_shape_leaves_out_has_a_default():
    assert rates_over(regraft.schedule(net(), {"start": 0.3, "steps": 2, "shape": "early"}), 3) == [
        0.3,
        0.3,
        0,
        0,
    ]
    assert rates_over(regraft.schedule(net(), {"end": 0.3, "steps": 2, "shape": "late"}), 3) == [
        0,
        0,
        0.3,
        0.3,
    ]
    assert len(set(rates_over(regraft.schedule(net(), {**P, "steps": 10, "shape": "step"}), 10))) == 6


NOISY = [
    (name, family)
    for name in names()
    for family in ("Dropout", "Linear")
    if spec(name).rated and family in spec(name).families
    if name != "concrete" and not spec(name).attention
]


@pytest.mark.parametrize(("name", "family"), NOISY, ids=["-".join(one) for one in NOISY])
def test_every_variants_rate_is_what_it_draws_by(name, family):
    model = net(0.0 if family == "Linear" else 0.1).train()
    path = "1" if family == "Dropout" else "2"
    regraft.apply(model, {f"*@{path}": f"{name}(p=0.3)"})
    model[2].weight.data.mul_(1.5)  # mixout mixes with the weight as it was
    x = torch.randn(2, 16, 16, 16) if name == "dropblock" else X
    with torch.no_grad():
        plain = net().eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        schedule = regraft.schedule(model, {"start": 0.0, "end": 0.6, "steps": 3}, f"*@{path}")
        assert [one.variant for one in schedule.rates] == [name]
        torch.testing.assert_close(model(x), plain(x))
        schedule.step(to=3)
        assert not torch.allclose(model(x), plain(x))
        assert "p=0.6" in repr(model)
        schedule.remove()
    assert "p=0.3" in repr(model)


def test_ungrafted_sites_of_every_kind(recwarn):
    models = {
        "module": (net(), None, "1"),
        "call": (tiny.Calls(nn.Linear(16, 16), p=0.2), X, ""),
        "attention": (tiny.Attention(p=0.3), X, ""),
        "recurrent": (nn.LSTM(16, 16, 2, dropout=0.1, batch_first=True), X, ""),
        "bert": (tiny.bert(layers=1), None, "bert.encoder.layer.0.attention.self"),
        "graph": (regraft.trace(tiny.Calls(nn.Linear(16, 16), p=0.2).eval()), X, "dropout"),
    }
    for name, (model, inputs, path) in models.items():
        model.train()
        before = {one.path: one.p for one in regraft.inspect(model, inputs).sites if one.family == "Dropout"}
        classes = [type(one) for one in model.modules()]
        schedule = regraft.schedule(model, P, "Dropout", inputs)
        assert path in [one.path for one in schedule.rates], name
        x = inputs if inputs is not None else tiny.tokens() if name == "bert" else X

        def run(model=model, x=x):
            out = model(**x) if isinstance(x, dict) else model(x)
            return tiny.logits(out)

        with torch.no_grad():
            assert torch.equal(run(), run()), name
            schedule.step(to=4)
            assert not torch.equal(run(), run()), name
        schedule.remove()
        after = {one.path: one.p for one in regraft.inspect(model, inputs).sites if one.family == "Dropout"}
        assert after == before, name
        assert [type(one) for one in model.modules()] == classes, name
    assert not recwarn


def test_rates_that_differ_by_depth_stay_relative():
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, drop_path_rate=0.3
    )
    schedule = regraft.schedule(model, {"start": "x0", "end": "x1", "steps": 2}, "DropPath")
    assert [one.base for one in schedule.rates] == pytest.approx([0.15, 0.15, 0.3, 0.3])
    schedule.step()
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == pytest.approx([0.075, 0.15])
    regraft.revert(model)
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == pytest.approx([0.15, 0.3])


def test_the_report_of_the_graft_stays_and_the_inspection_follows():
    model = net()
    report = regraft.apply(model, {"Dropout": "gaussian(p=0.3)"})
    schedule = regraft.schedule(model, P)
    schedule.step(to=4)
    assert report.grafted[0].options["p"] == 0.3
    assert [one.variant for one in regraft.inspect(model).sites if one.variant] == ["GaussianDropout(p=0.4)"]
    assert model[1].p == 0.4
    regraft.revert(model)
    assert (type(model[1]), model[1].p) == (nn.Dropout, 0.1)
    with pytest.raises(MisfitError, match="no longer its own"):
        schedule.step()
    assert (model[1].p, schedule.steps_done) == (0.1, 4)
    schedule.remove()
    assert model[1].p == 0.1


def test_removing_leaves_what_others_have_grafted_since():
    model = net()
    schedule = regraft.schedule(model, P)
    regraft.apply(model, {"Dropout": "gaussian(p=0.5)"})
    with pytest.raises(MisfitError, match="1 of the 1 rates") as caught:
        schedule.step()
    assert "'1'" in str(caught.value)
    assert "make a new one after the grafts" in str(caught.value)
    schedule.remove()
    assert repr(model[1]) == "GaussianDropout(p=0.5)"


def test_state_goes_through_json():
    schedule = regraft.schedule(net(), {**P, "shape": "cosine"})
    for _ in range(3):
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    model = net()
    again = regraft.schedule(model, P)
    again.load_state_dict(state)
    assert (again.rate, again.steps_done) == (schedule.rate, 3)
    assert model[1].p == schedule.rate
    assert again.step() == schedule.step()
    with pytest.raises(MisfitError, match="no state of a schedule"):
        again.load_state_dict({"step": 1})


RELATIVE = {"start": "x0", "end": "x2", "steps": 4}
GRAFTED = {"bare": None, "fixed": "gaussian(p=0.3)", "relative": "gaussian(p='x2')"}


@pytest.mark.parametrize("rule", GRAFTED.values(), ids=GRAFTED)
def test_relative_rates_are_of_the_model_however_often_it_is_scheduled(rule):
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), tiny.Calls(nn.Linear(16, 16), p=0.2)).train()
    if rule:
        regraft.apply(model, {"Dropout": rule}, X)
    expected = None
    for turn in range(3):
        schedule = regraft.schedule(model, RELATIVE, "Dropout", X)
        bases = [one.base for one in schedule.rates]
        expected = expected or bases
        assert bases == expected, turn
        schedule.step(to=turn + 1)
    schedule.step(to=4)
    assert schedule.rate == pytest.approx(2 * max(expected))
    classes = [type(one) for one in model.modules()]
    schedule.remove()
    assert [one.p for one in regraft.inspect(model, X).sites if one.family == "Dropout"] == [0.1, 0.2]
    if rule is None:
        assert not any(hasattr(one, "_regraft") for one in model.modules()), "boundaries go, too"
        assert [type(one) for one in model.modules()] != classes
    again = regraft.schedule(model, RELATIVE, "Dropout", X)
    assert [one.base for one in again.rates] == expected


def test_a_second_schedule_takes_over_and_the_first_says_so():
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2))
    first = regraft.schedule(model, P, "Dropout")
    second = regraft.schedule(model, RELATIVE, "Dropout@1")
    with pytest.raises(MisfitError, match="1 of the 2 rates"):
        first.step()
    second.step(to=4)
    assert (model[0].p, model[1].p) == (0.0, 0.4)
    first.remove()
    assert (type(model[0]), model[0].p, model[1].p) == (nn.Dropout, 0.1, 0.4)
    second.step(to=2)
    second.remove()
    assert (type(model[1]), model[1].p) == (nn.Dropout, 0.2)


def test_a_run_resumed_in_the_middle_is_exact(tmp_path):
    """From a plan saved in the middle, and from the model as built: the rates are those of an unbroken run."""
    model = net(0.2)
    regraft.apply(model, {"Dropout": "gaussian"})
    whole = regraft.schedule(model, RELATIVE)
    whole.step(to=2)
    state = json.loads(json.dumps(whole.state_dict()))
    file = regraft.save_plan(model, tmp_path)
    unbroken = [whole.step() for _ in range(3)]
    for prepare in (
        lambda new: regraft.load_plan(new, file),
        lambda new: regraft.apply(new, {"Dropout": "gaussian"}),
    ):
        new = net(0.2)
        prepare(new)
        assert new[1].p == 0.2
        again = regraft.schedule(new, RELATIVE)
        again.load_state_dict(state)
        assert [again.step() for _ in range(3)] == unbroken
    other = net(0.7)  # built with another rate: the state knows the one of the run
    regraft.apply(other, {"Dropout": "gaussian"})
    again = regraft.schedule(other, {**RELATIVE, "end": "x1"})
    again.load_state_dict(state)
    assert [again.step() for _ in range(3)] == unbroken
    wider = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1))
    with pytest.raises(MisfitError, match="other sites"):
        regraft.schedule(wider, RELATIVE).load_state_dict(state)


def test_a_copy_keeps_the_rate_it_was_made_at():
    model = net()
    schedule = regraft.schedule(model, P)
    schedule.step(to=2)
    copied = copy.deepcopy(model)
    schedule.step(to=4)
    assert (copied[1].p, model[1].p) == (0.2, 0.4)
    regraft.revert(copied)
    assert copied[1].p == 0.1


COMPILED = {
    "module": (net, "Dropout", "gaussian(p=0.1)", X),
    "linear": (net, "Linear", "dropconnect(p=0.1)", X),
    "call": (lambda: tiny.Calls(nn.Linear(16, 16), p=0.2), "Dropout", "dropout(p=0.1)", X),
    "attention": (tiny.Attention, "Dropout", "multisample(p=0.1)", X),
}


@pytest.mark.parametrize(("build", "key", "rule", "x"), COMPILED.values(), ids=COMPILED)
def test_a_changing_rate_compiles_once_more_and_no_further(build, key, rule, x):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build().train()
    regraft.apply(model, {key: rule}, x)
    schedule = regraft.schedule(model, {"start": 0.01, "end": 0.5, "steps": 20}, key, x)
    assert schedule.notes == []
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts, outputs = [], []
    for _ in range(20):
        outputs.append(compiled(x))
        counts.append(counter.frame_count)
        schedule.step()
    assert counts[-1] == 2, counts
    assert counts[1] == 2, counts
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_kernels_own_rate_is_said_to_compile_anew_and_stairs_help():
    torch._dynamo.reset()
    model = tiny.Attention().train()
    schedule = regraft.schedule(model, {**P, "steps": 20}, "Dropout", X)
    assert "compiles anew" in schedule.notes[0]
    schedule.remove()
    schedule = regraft.schedule(model, {**P, "steps": 20, "shape": "step", "stairs": 4}, "Dropout", X)
    assert schedule.notes == []
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(24):
        compiled(X)
        schedule.step()
    assert counter.frame_count <= 7
    torch._dynamo.reset()


BAD = [
    ({"end": 0.1}, None, OptionError, "needs 'steps'"),
    ({"start": 0.1, "steps": 3}, None, OptionError, "needs 'end'"),
    ({"end": 0.1, "steps": 3, "shape": "early"}, None, OptionError, "needs 'start'"),
    ({"end": 0.1, "steps": 0}, None, RateError, "steps=0"),
    ({"end": 0.1, "steps": 2.5}, None, OptionError, "whole number"),
    ({"end": 1.0, "steps": 3}, None, RateError, "p=1 drops everything"),
    ({"end": "x20", "steps": 3}, None, RateError, "the rate would be 2"),
    ({"end": "half", "steps": 3}, None, OptionError, "is no rate"),
    ({"end": 0.1, "steps": 3, "shape": "lineer"}, None, OptionError, "did you mean 'linear'"),
    ({"stop": 0.1, "steps": 3}, None, OptionError, "has no 'stop'"),
    (0.1, None, OptionError, "is no schedule"),
    ({"end": 0.0, "steps": 3}, None, RateError, "no rate changes"),
    ({"end": 0.1, "steps": 3}, "Dropout@9", NoMatchError, "matches nothing"),
    ({"end": 0.1, "steps": 3}, "Linear", WrongKindError, "nothing there has a rate"),
]


@pytest.mark.parametrize(("p", "selector", "error", "said"), BAD, ids=[str(p) + str(s) for p, s, *_ in BAD])
def test_bad_schedules_change_nothing(p, selector, error, said):
    model = net()
    with pytest.raises(error, match=said):
        regraft.schedule(model, p, selector)
    assert (type(model[1]), model[1].p) == (nn.Dropout, 0.1)


def test_a_rate_relative_to_nothing_and_rates_that_are_learned():
    with pytest.raises(RateError, match="relative to 0 is 0"):
        regraft.schedule(net(0.0), {"end": "x2", "steps": 3})
    model = net()
    regraft.apply(model, {"Dropout": "concrete"})
    with pytest.raises(WrongKindError, match="learns its rate"):
        regraft.schedule(model, P, "Dropout")
    regraft.apply(model, {"Dropout": "gaussian(sigma=0.1)", "Linear@2": "dropconnect(p=0.2)"})
    schedule = regraft.schedule(model, P, "re:[12]")
    assert list(schedule.skipped) == ["1"]
    assert "plays no part" in schedule.skipped["1"]

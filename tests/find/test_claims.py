"""What is claimed of a model is what was seen: classes by what they draw, rates at the draw, sites that ran."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from programs import PROGRAMS, GaussianDropout, LockedDropout, MultiSampleDropout
from torch import nn
from torch.nn import functional as F

import regraft
from regraft import errors

X = torch.randn(6, 16)


class ByHand(nn.Module):
    """A dropout under any name, by any draw."""

    def __init__(self, p, how):
        super().__init__()
        self.p, self.how = p, how

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if self.how == "bernoulli":
            mask = torch.bernoulli(torch.full_like(x, 1 - self.p))
        elif self.how == "rand":
            mask = (torch.rand_like(x) > self.p).to(x.dtype)
        elif self.how == "rows":
            mask = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        elif self.how == "unscaled":
            return x * torch.bernoulli(torch.full_like(x, 1 - self.p))
        else:
            return x * (1 + torch.randn_like(x) * math.sqrt(self.p / (1 - self.p)))
        return x * mask / (1 - self.p)


def named(name, *args):
    """A module of a class called `name`."""
    return type(name, (ByHand,), {})(*args)


@pytest.mark.parametrize("name", ["Dropout", "GaussianDropout", "Anything"])
@pytest.mark.parametrize(
    ("how", "op"),
    [
        ("bernoulli", "Dropout"),
        ("rand", "Dropout"),
        ("rows", "DropPath"),
        ("normal", None),
        ("unscaled", None),
    ],
)
def test_1_a_class_is_what_it_draws_whatever_its_name(name, how, op):
    state = torch.get_rng_state()
    (site,) = regraft.inspect(nn.Sequential(named(name, 0.2, how)), X).sites
    own = "own_Dropout" if name == "Dropout" else name
    assert (site.op, site.p, site.calls) == (op or own, 0.2, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_1_a_class_with_a_law_of_its_own_is_never_meant_by_dropout():
    net = nn.Sequential(nn.Linear(16, 16), named("Dropout", 0.2, "normal"), nn.Dropout(0.1))
    report = regraft.apply(net, {"Dropout": "gaussian"}, X)
    assert [edit.path for edit in report.grafted] == ["2"]
    assert [(row["paths"], row["count"]) for row in report.left] == [(["1"], 1)]


def test_1_calls_inside_any_class_are_sites_at_their_own_rate():
    net = nn.Sequential(MultiSampleDropout(0.5, 5))
    sites = {site.op: site for site in regraft.inspect(net, X).sites}
    assert (sites["dropout"].kind, sites["dropout"].p, sites["dropout"].calls) == ("call", 0.5, 5)
    report = regraft.apply(net, {"Dropout": "dropout(p=0.1)"}, X)
    assert [(edit.kind, edit.before, edit.after) for edit in report.grafted] == [
        ("call", "dropout(p=0.5)", "dropout(p=0.1)")
    ]
    y = net(torch.ones(4000, 5))
    assert 2 < len(y.unique()) <= 6  # still the mean of five masks
    assert (y == 0).float().mean() < 0.001


@pytest.mark.parametrize("rule", ["MultiSampleDropout", "*@0", "0", MultiSampleDropout])
def test_1_a_rule_on_the_class_replaces_its_whole_forward_and_says_so(rule):
    net = nn.Sequential(MultiSampleDropout(0.5, 5))
    report = regraft.apply(net, {"*@0" if rule == "0" else rule: "dropout(p=0.25)"}, X)
    (edit,) = report.grafted
    assert (edit.kind, edit.cost) == ("module", "the whole forward of MultiSampleDropout is replaced")
    assert report.balance["grafted"] == report.balance["draws"] == 5
    assert sorted(net(torch.ones(4000, 5)).unique().tolist()) == pytest.approx([0, 1 / 0.75])


def test_1_noise_without_a_rate_is_an_unrecognized_draw_with_a_remedy_that_works():
    net = nn.Sequential(nn.Linear(16, 16), GaussianDropout(0.3))
    inspection = regraft.inspect(net, X)
    (finding,) = inspection.findings
    assert (finding.path, finding.source.partition(":")[0]) == ("1", "find/programs.py")
    assert "randn_like of [6, 16]" in finding.finding
    assert "{'GaussianDropout': 'dropout(p=0.1)'}" in finding.remedy
    report = regraft.apply(net, {"GaussianDropout": "dropout(p=0.1)"}, X, verify=True)
    assert (report.balance["grafted"], report.left) == (1, [])


CHANNELS = torch.ones(400, 50, 2, 2)
KEPT = {
    nn.Dropout2d: CHANNELS,
    nn.Dropout1d: CHANNELS[..., 0],
    nn.Dropout3d: CHANNELS[..., None],
    nn.AlphaDropout: CHANNELS,
    nn.FeatureAlphaDropout: CHANNELS,
}
AS_CALLS = {
    nn.Dropout2d: F.dropout2d,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, 0.2, self.training)


@pytest.mark.parametrize("called", [False, True], ids=["module", "call"])
@pytest.mark.parametrize("way", ["rule", "schedule"])
@pytest.mark.parametrize("cls", KEPT)
def test_2_a_change_of_rate_keeps_the_law(cls, way, called):
    x = KEPT[cls]
    net = nn.Sequential(Calls(AS_CALLS[cls]) if called else cls(0.2))
    if way == "rule":
        regraft.apply(net, {cls.__name__: "dropout(p=0.4)"}, x)
    else:
        regraft.schedule(net, p={"start": 0.4, "end": 0.1, "steps": 9}, inputs=x)
    torch.manual_seed(5)
    got = net(x)
    torch.manual_seed(5)
    assert torch.equal(got, cls(0.4)(x))
    assert torch.equal(net.eval()(x), x)


def test_2_elementwise_is_a_name_of_its_own():
    net = nn.Sequential(nn.Dropout2d(0.2))
    regraft.apply(net, {"Dropout2d": "elementwise(p=0.4)"}, CHANNELS)
    kept = net(CHANNELS).flatten(2) != 0
    assert not (kept.all(2) | ~kept.any(2)).all()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_3_dropblock_is_a_kind(library):
    if library == "timm":
        from timm.layers import DropBlock2d

        block = DropBlock2d(0.1, block_size=3)
    else:
        from torchvision.ops import DropBlock2d

        block = DropBlock2d(0.1, block_size=3)
    x = torch.ones(64, 4, 12, 12)
    net = nn.Sequential(nn.Conv2d(4, 4, 1), block)
    (site,) = [site for site in regraft.inspect(net, x).sites if site.kind == "module"]
    assert (site.op, site.p, site.family) == ("DropBlock", 0.1, "Dropout")
    with pytest.raises(errors.NoMatchError):
        regraft.plan(net, {"Dropout": "gaussian"}, x)
    regraft.apply(net, {"DropBlock": "dropout(p=0.3)"}, x)
    assert type(net[1]) is type(block)
    assert (net[1](x) == 0).float().mean() > 0.2
    regraft.apply(net, {"DropBlock": "dropblock(block_size=5)"}, x)
    assert type(net[1]).__name__ == "DropBlock"


@pytest.mark.parametrize("name", ["AWD-LSTM", "the article"])
def test_3_that_a_model_does_not_regularize_is_said_only_where_nothing_is_drawn(name):
    build, inputs, *_ = PROGRAMS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, MultiSampleDropout)):
            module.p = module.dropout_rate = 0.0
    assert "does not regularize" not in str(regraft.inspect(model, inputs()))
    assert "does not regularize" in str(regraft.inspect(nn.Sequential(nn.Linear(16, 16)), X))


def test_4_a_rate_is_the_one_measured_at_the_draw():
    build, inputs, *_ = PROGRAMS["AWD-LSTM"]
    inspection = regraft.inspect(build(), inputs())
    rates = {draw.source: draw.p for draw in inspection.probe.draws}
    assert sorted(draw.p for draw in inspection.probe.draws) == [0.1, 0.3, 0.3, 0.4, 0.65]
    assert len(rates) == 2
    assert not any(site.op == "DropPath" for site in inspection.sites)
    assert any("at p=0.1, on a weight" in row["name"] for row in inspection.left)


def test_5_functions_that_are_seldom_called_by_name():
    build, inputs, *_ = PROGRAMS["made by hand"]
    (site,) = [site for site in regraft.inspect(build(), inputs()).sites if site.family == "Dropout"]
    assert site.call.rates == [0.3, 0.4, 0.2, 0.1, 0.25]
    net = build()
    report = regraft.apply(net, {"Dropout": "gaussian(sigma=0.5)"}, inputs(), verify=True)
    assert report.balance["grafted"] == 5


def test_6_without_a_probe_sites_are_unconfirmed_and_the_first_line_says_so():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    report = regraft.apply(net, {"Dropout": "gaussian"})
    assert [edit.calls for edit in report.grafted] == [None]
    assert report.balance == {"unconfirmed": 1}
    assert str(report).splitlines()[0] == (
        "Sequential: 1 site grafted, 1 of them unconfirmed (give inputs=), 0 skipped"
    )


def test_6_models_of_torchvision_are_probed_and_each_linear_that_is_claimed_was_seen_to_multiply():
    import torchvision

    model = torchvision.models.swin_t(weights=None)
    report = regraft.plan(model, {"Linear": "dropconnect(p=0.1)"})
    assert report.balance["unconfirmed"] == 0
    bypassed = [edit for edit in report.grafted if edit.path.endswith(("attn.qkv", "attn.proj"))]
    assert len(bypassed) == 24  # their parent reads the weights: they are lent to it
    assert all(edit.calls and edit.calls > 0 for edit in report.grafted)


def test_7_nothing_grafted_is_a_warning():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    with pytest.warns(UserWarning, match="nothing was grafted: every selected site is at rate 0"):
        regraft.apply(net, {"Dropout": "gaussian"}, torch.ones(2, 4))


def test_7_inputs_that_do_not_run_are_an_error():
    with pytest.raises(errors.InputsError, match="did you mean 'input_ids'"):
        regraft.inspect(tiny.bert(), {"input_id": tiny.tokens()["input_ids"]})
    with pytest.raises(errors.InputsError, match="mat1 and mat2"):
        regraft.plan(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), {"Dropout": "gaussian"}, torch.ones(2, 4))


class Forgets(nn.Module):
    """Counts on in-place dropouts, and goes on with what it gave them."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        x = x * 1
        self.drop(x)
        y = x * 1
        F.dropout(y, 0.5, self.training, inplace=True)
        return y


@pytest.mark.parametrize("variant", ["gaussian", "dropout(p=0.75)", "multisample", "elementwise"])
def test_8_in_place_dropouts_act_in_place_after_a_graft_too(variant):
    net, x = Forgets(), torch.ones(200, 50)
    regraft.apply(net, {"Dropout": variant}, x)
    assert not torch.equal(net(x), x)
    y = net.drop(z := torch.ones(200, 50, requires_grad=True) * 1)
    assert y is z
    assert not torch.equal(y, torch.ones(200, 50))
    y.sum().backward()
    assert torch.equal(net.eval()(x), x)


def test_10_what_is_not_torchs_own_is_said():
    scripted = torch.jit.script(nn.Linear(3, 4))
    inspection = regraft.inspect(nn.Sequential(scripted, nn.Dropout(0.1)), torch.ones(2, 3))
    assert [(f.path, f.remedy) for f in inspection.findings] == [("0", "graft before scripting")]
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4)), {nn.Linear})
    (finding,) = regraft.inspect(quantized, torch.ones(2, 3)).findings
    assert "quantized layers cannot be grafted" in finding.finding
    (skip,) = regraft.plan(quantized, {"Linear": "dropconnect"}, torch.ones(2, 3)).skipped
    assert "quantized layers cannot be grafted" in skip.reason


class KerasDropout(nn.Module):
    """A layer in the shape of Keras 3 on torch, which has no `nn.Dropout` inside and a class of its own."""

    __module__ = "keras.src.layers.regularization.dropout"

    def forward(self, x):
        y = F.dropout(x, 0.3, training=self.training)
        return y + torch.normal(0.0, 0.1, x.shape) if self.training else y


def test_10_a_model_of_keras_that_drew_nothing_is_not_said_not_to_regularize():
    net = nn.Sequential(KerasDropout())
    net[0].forward = lambda x: x  # Keras's own are told to train by an argument of their call
    assert "1 part of the model may draw" in str(regraft.inspect(net, X))


def test_10_a_layer_of_keras_is_named_and_left_alone():
    net = nn.Sequential(nn.Linear(16, 16), KerasDropout(), nn.Dropout(0.1))
    inspection = regraft.inspect(net, X)
    assert {(finding.path, finding.remedy) for finding in inspection.findings} == {
        ("1", "write it with torch's layers to graft it")
    }
    report = regraft.apply(net, {"Dropout": "gaussian"}, X, verify=True)
    assert [edit.path for edit in report.grafted] == ["2"]
    assert [(skip.path, "Keras" in skip.reason) for skip in report.skipped] == [("1", True)]
    assert type(net[1]) is KerasDropout
    assert report.balance["draws"] == 3


def test_10_the_report_says_what_a_step_will_cost():
    report = regraft.plan(tiny.bert(), {"Dropout": "gaussian"})
    assert any("a call as probed" in edit.cost for edit in report.grafted if edit.cost)
    net = nn.Sequential(nn.LSTM(4, 4, 2, dropout=0.2))
    (edit,) = regraft.plan(net, {"Dropout": "gaussian"}, torch.randn(3, 2, 4)).grafted
    assert "0.95 to 1.07 times a training step, measured on a CPU core" in edit.cost


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.drop = nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x):
        return F.linear(self.drop(self.encoder(x)), self.encoder.weight.T)


def test_9_verify_proves_each_graft_in_real_forwards():
    net = TiedAutoencoder()
    regraft.apply(net, {"Linear": "dropconnect(p=0.3)", "Dropout": "gaussian"}, X)
    before = {name: type(module) for name, module in net.named_modules()}
    assert regraft.verify(net, X).passed  # of a grafted model: as it stands
    assert {name: type(module) for name, module in net.named_modules()} == before
    net.drop.forward = lambda x: x  # somebody's own, which hides the graft
    assert regraft.verify(net, X).passed is False


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"linear": "dropconnect"}, "did you mean 'Linear'"),
        ({"DropOut": "gaussian"}, "did you mean 'Dropout'"),
        ({"Dropout@bert.*": "gaussian"}, r"'Dropout@bert\.\*\*' matches 7 sites"),
        ({"Dropout": "gaussian(rate=0.1)"}, r"the rate is p: 'gaussian\(p=\.\.\.\)'"),
        ({"Dropout": "gaussian(0.3)"}, r"write 'gaussian\(p=0\.3\)'"),
        ({"Dropout": nn.Dropout(0.3)}, r"write 'dropout\(p=0\.3\)'"),
        ({"Dropout": 0.3}, r"write 'dropout\(p=0\.3\)'"),
        ({"Dropout": "rdrop"}, r"regraft\.rdrop\(model"),
        ({"DropPath": "droppath"}, r"layer\.\*\.attention\.output\.dense': 'droppath\(p=0\.1\)'"),
    ],
)
@pytest.mark.transformers5
def test_11_a_rule_that_cannot_be_meant_names_the_one_that_is(rules, says):
    with pytest.raises(errors.RegraftError, match=says):
        regraft.plan(tiny.bert(), rules)


def test_11_drop_paths_that_were_built_away_are_offered_again():
    import timm

    model = timm.create_model("convnext_atto", num_classes=2)
    with pytest.raises(errors.NoMatchError, match=r"after:Identity@\*\*\.drop_path\*"):
        regraft.plan(model, {"DropPath": "droppath(p=0.1)"})


def test_a_locked_dropout_takes_its_rate_from_the_call_and_is_no_plain_dropout():
    inspection = regraft.inspect(nn.Sequential(LockedDropout()), torch.ones(3, 4, 5))
    assert [(site.op, site.p) for site in inspection.sites] == [("LockedDropout", None)]
    assert [(draw.p, draw.law) for draw in inspection.probe.draws] == [(0.5, "shared")]

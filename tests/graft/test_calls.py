"""Call sites: the innermost module only, no double counting, every method that runs one, shared layers."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft

X = torch.ones(3000)


def noise(output):
    """What made an output of ones: nothing, a mask, gaussian noise, or both."""
    values = output.unique().numel()
    return "nothing" if values == 1 else "mask" if values <= 4 else "gaussian"


class Family(nn.Module):
    """Each member drops by itself and hands on what came in; the children run in the middle."""

    def __init__(self, *children):
        super().__init__()
        self.members = nn.ModuleList(children)
        self.seen = {}

    def forward(self, x):
        before = F.dropout(x, 0.5, self.training)
        for member in self.members:
            member(x)
        self.seen = {"before": noise(before), "after": noise(F.dropout(x, 0.5, self.training))}
        return x


class Plain(nn.Module):
    """Nothing of its own: what it holds runs inside the parent's mode."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x)


def tree():
    return Family(Family(), Plain(Family(Family())), Family())


PATHS = ["", "members.0", "members.1.child", "members.1.child.members.0", "members.2"]


@pytest.mark.parametrize(
    "chosen", [set(), *({path} for path in PATHS), {"", PATHS[3]}, {"", PATHS[2]}, set(PATHS)]
)
def test_a_mode_is_its_own_modules_and_nobody_elses(chosen):
    model = tree()
    rules = [("Dropout", "gaussian"), ("Dropout", None)]
    rules += [(f"re:{path}".replace(".", "[.]"), "gaussian") for path in sorted(chosen)]
    report = regraft.apply(model, rules, X)
    assert {edit.path for edit in report.grafted} == chosen
    for training in (True, False, True):
        model.train(training)
        model(X)
        for path in PATHS:
            expected = ("gaussian" if path in chosen else "mask") if training else "nothing"
            assert model.get_submodule(path).seen == {"before": expected, "after": expected}, path
    regraft.revert(model)
    model(X)
    assert {model.get_submodule(path).seen["after"] for path in PATHS} == {"mask"}


def test_a_mode_comes_back_after_an_exception_inside_a_child():
    class Fails(nn.Module):
        def forward(self, x):
            F.dropout(x, 0.5, self.training)
            if x.numel() == X.numel():
                raise ValueError
            return x

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Fails()

        def forward(self, x):
            with contextlib.suppress(ValueError):
                self.child(x)
            return F.dropout(x, 0.5, self.training)

    model = Catches()
    report = regraft.apply(model, {"Dropout": "gaussian"}, torch.ones(2))
    assert [edit.path for edit in report.grafted] == ["", "child"]
    assert noise(model(X)) == "gaussian"
    assert noise(F.dropout(X, 0.5)) == "mask"  # nothing is left on


class Counts(nn.Module):
    """A dropout whose module calls the function: one draw, not two."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(self.drop(x), 0.5, self.training)


@pytest.mark.parametrize(
    "rule", [{"Dropout": "dropout(p=0.5)"}, {"dropout": "dropout(p=0.5)"}, {"Dropout@drop": "dropout(p=0.5)"}]
)
def test_no_draw_is_counted_twice(rule):
    model = Counts()
    regraft.apply(model, rule, X)
    kept = (model(torch.ones(100_000)) != 0).float().mean().item()
    assert kept == pytest.approx(0.25, abs=0.01)
    assert model(torch.ones(100_000)).mean().item() == pytest.approx(1.0, abs=0.05)


FUNCTIONS = {
    "dropout": lambda x, training: F.dropout(x, 0.5, training),
    "torch.dropout": lambda x, training: torch.dropout(x, 0.5, training),
    "keyword": lambda x, training: F.dropout(input=x, p=0.5, training=training),
    "method-free": lambda x, training: torch.nn.functional.dropout(x, training=training),
    "dropout1d": lambda x, training: F.dropout1d(x.view(1, 30, -1), 0.5, training),
    "dropout2d": lambda x, training: F.dropout2d(x.view(1, 30, 10, -1), 0.5, training),
    "dropout3d": lambda x, training: F.dropout3d(x.view(1, 30, 10, 5, -1), 0.5, training),
    "feature_dropout": lambda x, training: torch.feature_dropout(x.view(1, 30, -1), 0.5, training),
    "alpha_dropout": lambda x, training: F.alpha_dropout(x, 0.5, training),
    "torch.alpha_dropout": lambda x, training: torch.alpha_dropout(x, 0.5, training),
    "feature_alpha_dropout": lambda x, training: F.feature_alpha_dropout(x.view(1, 30, -1), 0.5, training),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, self.training)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_function_that_drops_is_reached(function):
    model = Function(function)
    (site,) = regraft.inspect(model, X).sites
    assert (site.p, site.kind, site.calls) == (0.5, "call", 1)
    regraft.apply(model, {lambda site: True: "gaussian"}, X)
    assert noise(model(X)) == "gaussian"
    assert noise(model.eval()(X)) == "nothing"
    regraft.revert(model)
    assert noise(model.train()(X)) == "mask"


def free_function(x, training):
    return F.dropout(x, 0.5, training)


def test_a_free_function_belongs_to_the_module_that_calls_it():
    model = nn.Sequential(Function(free_function), Function(free_function))
    report = regraft.apply(model, {"Dropout@1": "gaussian"}, X)
    assert [edit.path for edit in report.grafted] == ["1"]
    assert report.grafted[0].source.startswith("graft/test_calls.py:")
    assert [noise(model[0](X)), noise(model[1](X))] == ["mask", "gaussian"]


def test_several_ops_of_one_module_are_sites_of_their_own():
    class Two(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training), F.dropout2d(x.view(1, 30, 10, -1), 0.5, self.training)

    model = Two()
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    assert [noise(one) for one in model(X)] == ["gaussian", "mask"]
    regraft.apply(model, {"Dropout2d": "off"}, X)
    assert [noise(one) for one in model(X)] == ["gaussian", "nothing"]
    regraft.revert(model, "Dropout")
    assert [noise(one) for one in model(X)] == ["mask", "nothing"]


def test_each_call_keeps_the_rate_it_carries():
    class Rates(nn.Module):
        def forward(self, x):
            return [F.dropout(x, p, self.training) for p in (0.1, 0.0, 0.8)]

    model = Rates()
    x = torch.ones(100_000)
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    found = [output.var().item() for output in model(x)]
    assert found == pytest.approx([0.1 / 0.9, 0.0, 0.8 / 0.2], rel=0.05)
    regraft.apply(model, {"Dropout": "gaussian(p='x0.5')"}, X)
    found = [output.var().item() for output in model(x)]
    assert found == pytest.approx([0.05 / 0.95, 0.0, 0.4 / 0.6], rel=0.05)
    regraft.apply(model, {"Dropout": "gaussian(p=0.5)"}, X)
    assert [output.var().item() for output in model(x)] == pytest.approx([1.0] * 3, rel=0.05)


class Entrances(nn.Module):
    """As timm's models: the methods are used without `forward`."""

    def forward_features(self, x):
        return F.dropout(x, 0.5, self.training)

    def forward_head(self, x):
        return self._inside(x)

    def _inside(self, x):
        return F.dropout(x, 0.5, self.training)

    def forward(self, x):
        return self.forward_head(x), self.forward_features(x)


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "_inside"])
def test_every_method_that_runs_a_site_is_an_entrance(name):
    model = Entrances()
    report = regraft.apply(model, {"Dropout": "gaussian"}, X)
    assert set(report.grafted[0].methods) >= {name}
    assert noise(getattr(model, name)(X)) == "gaussian"
    assert noise(getattr(model.eval(), name)(X)) == "nothing"
    regraft.revert(model)
    assert name not in vars(type(model).__mro__[0]) or type(model) is Entrances


def test_timms_forward_features_runs_the_graft():
    model = tiny.vit()
    report = regraft.apply(model, {"Dropout": "gaussian"})
    assert [(skip.path, skip.reason) for skip in report.skipped] == [("pos_drop", "its rate is 0")]
    features = model.forward_features(tiny.images())
    assert not torch.equal(features, model.forward_features(tiny.images()))
    with regraft.grafted(model, {"Dropout": "off"}):
        first, second = (model.forward_features(tiny.images()) for _ in range(2))
        assert torch.equal(first, second)


def test_trap_2_a_layer_shared_by_all_depths_draws_anew_at_each():
    model = tiny.albert()
    report = regraft.apply(model, {"Dropout": "off"})
    assert {edit.calls for edit in report.grafted if "layer" in edit.path} == {3}
    first, second = (model(**tiny.tokens()).logits for _ in range(2))
    assert torch.equal(first, second)
    regraft.revert(model)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = tiny.Calls(p=0.5)
            self.again = self.layer

        def forward(self, x):
            return self.layer(x), self.again(x), self.layer(x)

    shared = Shared()
    report = regraft.apply(shared, {"Dropout@again": "gaussian"}, X)
    assert [(edit.calls, edit.paths) for edit in report.grafted] == [(3, ["layer", "again"])]
    outputs = shared(X)
    assert [noise(one) for one in outputs] == ["gaussian"] * 3
    assert not torch.equal(outputs[0], outputs[1])


def test_trap_2_bart_is_reached_whole():
    model = tiny.bart()
    report = regraft.apply(model, {"Dropout": "off"})
    assert report.skipped == []
    batch = {**tiny.tokens(), "decoder_input_ids": tiny.tokens()["input_ids"]}
    first, second = (model(**batch).logits for _ in range(2))
    assert torch.equal(first, second)


def test_hooks_on_an_owner_run_outside_its_mode():
    model = tiny.Calls(p=0.5)
    drawn = []
    model.register_forward_pre_hook(lambda module, args: drawn.append(noise(F.dropout(X, 0.5))))
    model.register_forward_hook(lambda module, args, output: drawn.append(noise(F.dropout(X, 0.5))))
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    drawn.clear()
    assert noise(model(X)) == "gaussian"
    assert drawn == ["mask", "mask"]


def test_a_training_owner_in_an_eval_model_and_the_other_way_round():
    model = tiny.Calls(tiny.Calls(p=0.5), p=0.5)
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    model.eval()
    model.child.train()
    assert noise(model(X)) == "gaussian"
    model.train()
    model.child.eval()
    assert noise(model.child(X)) == "nothing"
    assert noise(model(X)) == "gaussian"

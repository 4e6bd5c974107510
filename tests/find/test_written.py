"""Calls that the probe did not run are known from the code, and are grafted or told, never left unsaid."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.find.bytecode_scan import written_calls


def _drop(x, training):
    return F.dropout(x, 0.3, training)


def _deeper(x, training):
    return _drop(x, training)


REGISTRY = {"one": _deeper}


class Direct(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


class ThroughFunctions(nn.Module):
    def forward(self, x):
        return _deeper(x, self.training)


class ThroughARegistry(nn.Module):
    def forward(self, x):
        return REGISTRY["one"](x, self.training)


class ThroughAMethod(nn.Module):
    def _inside(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    def forward(self, x):
        return self._inside(x)


class InAComprehension(nn.Module):
    def forward(self, x):
        return sum([torch.dropout(one, 0.5, self.training) for one in x])


class AttributeOnly(nn.Module):
    """`self.dropout(x)` is a module, which has a site of its own."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Direct, {"dropout": {"forward"}}),
        (ThroughFunctions, {"dropout": {"forward"}}),
        (ThroughARegistry, {"dropout": {"forward"}}),
        (ThroughAMethod, {"scaled_dot_product_attention": {"forward", "_inside"}}),
        (InAComprehension, {"dropout": {"forward"}}),
        (AttributeOnly, {}),
        (nn.TransformerEncoderLayer, {}),
        (nn.Module, {}),
    ],
)
def test_what_the_code_of_a_class_names(cls, expected):
    assert {op: set(methods) for op, methods in written_calls(cls).items()} == expected


def test_without_a_probe_such_calls_are_grafted_and_follow_the_rate_they_carry():
    net = nn.Sequential(nn.Linear(4, 4), Direct())
    report = regraft.apply(net, {"Dropout": "gaussian"})
    (edit,) = report.grafted
    assert (edit.path, edit.kind, edit.calls, edit.before, edit.after) == (
        "1", "call", None, "dropout", "gaussian_dropout",
    )  # fmt: skip
    x = torch.ones(50_000, 4)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(1.0)
    noise = net(x)
    assert (noise != 0).all()
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)  # sqrt(p / (1 - p)) at p = 0.5
    assert torch.equal(net.eval()(x), torch.ones(50_000, 4))


def test_a_variant_that_acts_in_eval_needs_a_rate_there():
    net = nn.Sequential(nn.Linear(4, 4), Direct())
    (skip,) = regraft.apply(net, {"Dropout": "mc"}).skipped
    assert "its rate is not known" in skip.reason
    assert "mc(p=0.1)" in skip.remedy
    assert regraft.apply(net, {"Dropout": "mc(p=0.2)"}).skipped == []
    x = torch.ones(8, 4)
    assert not torch.equal(net.eval()(x), net(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = Direct(), ThroughFunctions()

    def forward(self, x, both=False):
        return self.used(x) + (self.unused(x) if both else 0)


def test_a_module_that_the_probe_did_not_reach_is_told():
    report = regraft.apply(Branches(), {"Dropout": "gaussian"}, torch.ones(2, 4))
    assert [edit.path for edit in report.grafted] == ["used"]
    (skip,) = report.skipped
    assert (skip.path, skip.kind, skip.calls) == ("unused", "call", 0)
    assert "never called in the probe" in skip.reason
    assert "inputs=" in skip.remedy
    report = regraft.apply(Branches(), {"Dropout": "gaussian"}, {"x": torch.ones(2, 4), "both": True})
    assert report.skipped == []


@pytest.mark.transformers5
def test_parts_of_a_model_are_probed_by_themselves():
    """Text inputs leave the vision tower out; and where the whole cannot run, its parts do."""
    import tiny

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.drop = tiny.bert(), nn.Dropout(0.1)

        def forward(self, something):
            raise RuntimeError

    inspection = regraft.inspect(Pair())
    assert inspection.probe.how == "parts of the model, each by itself"
    assert {site.calls for site in inspection.sites if site.path.startswith("text.bert")} >= {1}
    (outside,) = [site for site in inspection.sites if site.path == "drop"]
    assert outside.calls is None
    report = regraft.apply(Pair(), {"Dropout": "gaussian"})
    assert report.skipped == []

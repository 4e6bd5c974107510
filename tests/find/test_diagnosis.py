"""What `inspect` finds wrong with a model as it stands."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft

X = torch.randn(2, 4, 16)


class DrawsInEval(nn.Module):
    """nanoGPT's first mistake: the kernel does not know about `.eval()`."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.2)


class ForgetsTraining(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.2)


class Declares(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return F.dropout(x, 0.1, self.training)


class NeverUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, x):
        return self.used(x)


class Vanished(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_path1 = nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop_path1(self.drop(x))


def frozen():
    model = tiny.mlp()
    model[2].eval()
    return model


FOUND = [
    (DrawsInEval(), X, "", r"scaled_dot_product_attention drops at p=0.2 in eval too \(it does not know"),
    (ForgetsTraining(), X, "", r"^dropout drops at p=0.2 in eval too$"),
    (Declares(), X, "drop", "declares a rate of 0.3, but dropout beside it applies 0.1"),
    (NeverUses(), X, "unused", r"Dropout\(p=0.3\) is made but never used by this forward"),
    (Vanished(), X, "drop_path1", "a DropPath of rate 0 that became nn.Identity"),
    (tiny.mlp(p=0.0), torch.ones(2, 6), "", "every rate is 0: all 1 dropout sites do nothing"),
    (frozen(), torch.ones(2, 6), "2", "is in eval while the model trains"),
]


@pytest.mark.parametrize(("model", "inputs", "path", "message"), FOUND, ids=[row[3][:30] for row in FOUND])
def test_a_fault_is_found_with_its_place_and_a_remedy(model, inputs, path, message):
    (finding,) = regraft.inspect(model, inputs).findings
    assert finding.path == path
    assert re.search(message, finding.finding)
    assert finding.remedy


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (tiny.mlp, torch.ones(2, 6)),
        (tiny.Attention, X),
        (tiny.Calls, X),
        (tiny.encoder, X),
        (tiny.bert, None),
        (tiny.llama, None),
    ],
)
@pytest.mark.transformers5
def test_a_sound_model_has_no_findings(build, inputs):
    assert regraft.inspect(build(), inputs).findings == []


def test_trap_15_a_drop_path_of_rate_0_has_vanished():
    model = tiny.vit()
    findings = regraft.inspect(model).findings
    assert [one.path for one in findings] == [f"blocks.{i}.drop_path{j}" for i in range(2) for j in (1, 2)]
    for one in findings:
        key = re.search("'(after:Identity@.*?)'", one.remedy)[1]
        plan = regraft.plan(model, {key: "droppath(p=0.1)"})
        assert one.path in {edit.path for edit in [*plan.grafted, *plan.skipped]}
        regraft.apply(model, plan)
    assert {one.path for one in regraft.inspect(model).findings} == {
        "blocks.0.drop_path1",
        "blocks.0.drop_path2",
    }


@pytest.mark.parametrize("model", [DrawsInEval(), ForgetsTraining()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("variant", ["dropout", "gaussian", "multisample"])
def test_a_draw_in_eval_is_mended_and_comes_back_with_revert(model, variant):
    report = regraft.apply(model, {"Dropout": variant}, X)
    assert [mended.path for mended in report.mended] == [""]
    assert "dropped in eval too" in report.mended[0].what
    model.eval()
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    regraft.revert(model)
    model.eval()
    assert not torch.equal(model(X), model(X))


class OwnDropout(nn.Module):
    """A private dropout that forgot about eval."""

    def __init__(self):
        super().__init__()
        self.p = 0.2

    def forward(self, x):
        return F.dropout(x, self.p)


def test_a_private_dropout_module_that_draws_in_eval_is_found_and_mended():
    model = nn.Sequential(OwnDropout())
    (finding,) = regraft.inspect(model, X).findings
    assert finding.path == "0"
    assert "in eval too" in finding.finding
    report = regraft.apply(model, {"*": "gaussian"}, X)
    assert [mended.path for mended in report.mended] == ["0"]
    assert torch.equal(model.eval()(X), X)
    assert not torch.equal(regraft.revert(model)(X), X)

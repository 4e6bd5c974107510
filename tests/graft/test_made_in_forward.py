"""Dropouts in modules that the forward makes, or that the model does not know of: calls of the module around."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft


class Fresh(nn.Module):
    """A new dropout at each call: it is in training whatever the model is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return nn.Dropout(0.4)(self.linear(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        return self.dropout(x)


class Calling(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.4, self.training)


class Swapping(nn.Module):
    """Puts another module in the place of a part at its first forward, as BigBird does for short inputs."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.part = nn.Identity()

    def forward(self, x):
        if isinstance(self.part, nn.Identity):
            self.part = self.make().train(self.training)
        return self.part(x)


class Hidden(nn.Module):
    """Keeps its parts in a list, where neither `modules()` nor `eval()` finds them."""

    def __init__(self):
        super().__init__()
        self.parts = [Calling()]

    def forward(self, x):
        return self.parts[0](x)


BUILDS = {
    "made at each call": Fresh,
    "swapped in": lambda: Swapping(Attention),
    "swapped in, a call": lambda: Swapping(Calling),
    "in a list": Hidden,
}
DROPS_IN_EVAL = ("made at each call", "in a list")


def run(model):
    torch.manual_seed(0)
    return model(torch.ones(4, 6))


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_a_call_of_the_module_around(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), BUILDS[name]()).train()
    inspection = regraft.inspect(model, torch.ones(4, 6))
    (site,) = [site for site in inspection.sites if site.family == "Dropout"]
    assert (site.path, site.kind, site.op, site.p, site.calls) == ("1", "call", "dropout", 0.4, 1)
    told = [one.finding for one in inspection.findings]
    assert told == (["dropout drops at p=0.4 in eval too"] if name in DROPS_IN_EVAL else [])


@pytest.mark.parametrize("name", BUILDS)
def test_a_graft_reaches_it_follows_the_mode_and_goes(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), BUILDS[name]()).train()
    before = run(model) if name == "made at each call" else None
    if name.startswith("swapped"):
        model[1].part = nn.Identity()
    report = regraft.apply(model, {"Dropout": "gaussian(p=0.4)"}, inputs=torch.ones(4, 6))
    assert (len(report.grafted), len(report.skipped)) == (1, 0)
    assert run(model).ne(0).all()  # Gaussian noise multiplies; dropout would leave zeros
    assert not torch.equal(model(torch.ones(4, 6)), model(torch.ones(4, 6)))
    model.eval()
    assert torch.equal(run(model), model(torch.ones(4, 6)))
    model.train()
    regraft.revert(model)
    assert run(model).eq(0).any()
    if before is not None:
        assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", BUILDS)
def test_the_graft_compiles_whole(name):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 6), BUILDS[name]()).train()
    regraft.apply(model, {"Dropout": "gaussian(p=0.4)"}, inputs=torch.ones(4, 6))
    run(model)  # what is swapped in by the first forward is there
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second = compiled(torch.ones(4, 6)), compiled(torch.ones(4, 6))
    assert first.ne(0).all()
    assert not torch.equal(first, second)


def test_big_bird_on_a_short_input_is_reached_whole():
    from transformers import BigBirdConfig, BigBirdForSequenceClassification

    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.3,
    )
    model, ids = BigBirdForSequenceClassification(config).train(), torch.randint(1, 60, (2, 8))
    report = regraft.apply(model, {"Dropout": "off"}, inputs={"input_ids": ids})
    assert report.skipped == []
    assert [edit.path for edit in report.grafted if edit.before == "dropout(p=0.3)"] == [
        f"bert.encoder.layer.{number}.attention" for number in range(2)
    ]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "BigBirdSelfAttention" in {type(one).__name__ for one in model.modules()}
    regraft.revert(model)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

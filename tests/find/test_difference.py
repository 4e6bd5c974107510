"""`regraft.diff`: what differs between two models, and nothing else."""

import json

import pytest
import tiny
import torch
from torch import nn

import regraft


def net(p=0.1, width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(p), nn.Linear(width, 2))


class Calls(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.2, self.training)


def whats(rows):
    return [(row["path"], row["before"], row["after"]) for row in rows]


def test_no_difference_of_a_model_and_its_like():
    made = regraft.diff(net(), net())
    assert made.same
    assert made.weights == {"compared": "values", "same": 4, "differ": []}
    assert "no difference" in str(made)


def test_rates_shapes_grafts_and_weights():
    assert whats(regraft.diff(net(), net(0.3)).changed) == [("1", "Dropout(p=0.1)", "Dropout(p=0.3)")]
    wider = regraft.diff(net(), net(width=16))
    assert whats(wider.changed) == [
        ("0", "Linear(4, 8)", "Linear(4, 16)"),
        ("2", "Linear(8, 2)", "Linear(16, 2)"),
    ]
    assert wider.weights["differ"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    grafted = net()
    regraft.apply(grafted, {"Linear@2": "dropconnect(p=0.2)"})
    assert whats(regraft.diff(grafted, net()).changed)[0][2] == "Linear(8, 2)"
    moved = net()
    with torch.no_grad():
        moved[0].weight[0, 0] += 1e-6
    assert regraft.diff(net(), moved).weights["differ"] == ["0.weight"]


def test_a_graft_in_a_forward():
    x = torch.zeros(2, 3)
    grafted = Calls()
    regraft.apply(grafted, {"Dropout": "gaussian"}, inputs=x)
    rows = whats(regraft.diff(Calls(), grafted).changed)
    assert rows == [("", "dropout(p=0.2)", "gaussian_dropout(p=0.2)")]
    assert whats(regraft.diff(grafted, Calls()).changed) == [(rows[0][0], rows[0][2], rows[0][1])]
    probed = regraft.diff(regraft.inspect(Calls(), x), grafted)
    assert whats(probed.changed) == rows


def test_added_and_removed():
    more = nn.Sequential(*net(), nn.ReLU(), nn.Dropout(0.5))
    made = regraft.diff(net(), more)
    assert whats(made.added) == [("3", None, "ReLU"), ("4", None, "Dropout(p=0.5)")]
    assert whats(regraft.diff(more, net()).removed) == [("3", "ReLU", None), ("4", "Dropout(p=0.5)", None)]
    assert json.loads(made.to_json())["view"] == "diff"


class Masked(nn.Module):
    def __init__(self, value=1.0, act=nn.functional.relu, scale=2.0):
        super().__init__()
        self.register_buffer("mask", torch.full((3,), value), persistent=False)
        self.act, self.scale = act, scale
        self.table = torch.tensor([1.0, scale])

    def forward(self, x):
        return self.act(x * self.mask) * self.scale


def hooked():
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, args, out: out * 2)
    return module


def frozen():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    return module


def seeded(build):
    torch.manual_seed(0)
    return build()


UNLIKE = {
    "a slope": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2), "negative_slope=0.2"),
    "a stride": (lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv2d(3, 4, 3, stride=2), "stride=(2, 2)"),
    "an eps": (lambda: nn.LayerNorm(4), lambda: nn.LayerNorm(4, eps=1e-3), "eps=0.001"),
    "heads": (lambda: nn.MultiheadAttention(8, 2), lambda: nn.MultiheadAttention(8, 4), "num_heads=4"),
    "a hook": (lambda: nn.Linear(2, 2), hooked, "forward_hooks="),
    "frozen": (lambda: nn.Linear(2, 2), frozen, "frozen=('bias',)"),
    "mode": (net, lambda: net().eval(), "training=False"),
    "a function": (Masked, lambda: Masked(act=nn.functional.gelu), "gelu"),
    "a lambda": (lambda: Masked(act=lambda x: x + 1), lambda: Masked(act=lambda x: x + 2), "act="),
    "R-Drop": (tiny.bert, lambda: with_rdrop(tiny.bert()), "passes="),
    "a config": (tiny.bert, lambda: with_eps(tiny.bert()), "config="),
}


def with_rdrop(model):
    regraft.rdrop(model)
    return model


def with_eps(model):
    model.config.layer_norm_eps = 0.5
    return model


@pytest.mark.parametrize(("a", "b", "said"), UNLIKE.values(), ids=UNLIKE)
def test_whatever_makes_a_forward_is_compared(a, b, said):
    one, other = seeded(a), seeded(b)
    made = regraft.diff(one, other)
    assert made.same is False
    assert any(said in str(row["after"]) for row in made.changed), made.changed
    assert regraft.diff(one, seeded(a)).changed == []


def test_buffers_outside_the_state_dict_and_tensors_in_attributes_are_compared():
    assert regraft.diff(Masked(), Masked(2.0)).weights["differ"] == ["mask"]
    other = Masked()
    other.table += 1
    assert regraft.diff(Masked(), other).weights["differ"] == ["table"]
    assert regraft.diff(Masked(), Masked()).same is True


def test_what_was_not_compared_is_said_and_same_is_then_none():
    class Held:
        pass

    one, other = Masked(act=Held()), Masked(act=Held())
    made = regraft.diff(one, other)
    assert (made.same, made.uncompared) == (None, ["act"])
    assert "not compared" in str(made)
    assert json.loads(made.to_json())["same"] is None
    assert regraft.diff(one, one).same is True
    with torch.device("meta"):
        assert regraft.diff(net(), net()).same is None
    model = net()
    assert regraft.diff(regraft.inspect(model), model).same is None


def test_real_models_are_the_same_as_their_copies():
    import copy

    import timm

    for model in (
        tiny.bert(),
        timm.create_model("resnet10t"),
        nn.TransformerEncoderLayer(8, 2),
        nn.LSTM(4, 4),
    ):
        made = regraft.diff(model, copy.deepcopy(model))
        assert made.same, (made.changed, made.uncompared)


def test_a_graft_changes_what_it_says_and_no_setting():
    model = net()
    regraft.apply(model, {"Dropout": "dropout(p=0.3)"})
    assert whats(regraft.diff(net(), model).changed) == [("1", "Dropout(p=0.1)", "Dropout(p=0.3)")]
    regraft.revert(model)
    assert regraft.diff(net(), model).same is True


def test_an_inspection_keeps_how_a_model_was():
    model = net()
    before = regraft.inspect(model)
    regraft.apply(model, {"Dropout": "gaussian"})
    made = regraft.diff(before, model)
    assert whats(made.changed) == [("1", "Dropout(p=0.1)", "GaussianDropout(p=0.1)")]
    assert (made.added, made.removed) == ([], [])


def test_meta_models_are_compared_by_shape():
    with torch.device("meta"):
        model = net()
    assert regraft.diff(model, net()).weights == {"compared": "shapes", "same": 4, "differ": []}


@pytest.mark.parametrize("shape", ["to_json", "to_markdown", "to_html", "__str__"])
def test_every_view_shows_both_sides(shape):
    shown = getattr(regraft.diff(net(), net(0.3)), shape)()
    assert "Dropout(p=0.1)" in shown
    assert "Dropout(p=0.3)" in shown


def test_what_is_no_model():
    with pytest.raises(regraft.errors.ModelError, match="a dict cannot be compared"):
        regraft.diff({}, net())

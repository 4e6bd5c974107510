"""`regraft.diff`: what differs between two models, and nothing else."""

import json

import pytest
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

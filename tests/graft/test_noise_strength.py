"""What a graft does to the strength of a site's noise is in its report."""

import json

import pytest
import torch
from torch import nn

import regraft


class GaussianDropout(nn.Module):
    """A law of its own, whose strength before is not known."""

    def forward(self, x):
        return x * (1 + 0.5 * torch.randn_like(x)) if self.training else x


@pytest.mark.parametrize("noise", [GaussianDropout, lambda: nn.AlphaDropout(0.1)], ids=["own", "alpha"])
def test_nothing_is_said_of_a_noise_whose_strength_is_not_known(noise):
    model = nn.Sequential(nn.Linear(4, 4), noise())
    name = type(model[1]).__name__
    report = regraft.apply(model, {name: "dropout(p=0.3)"}, torch.ones(2, 4))
    assert [edit.strength for edit in report.grafted] == [None]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"Dropout": "multisample"}, "noise 0.111 -> 0.0139, 8x weaker"),
        ({"Dropout": "multisample(match='variance')"}, None),
        ({"Dropout": "gaussian"}, None),
        ({"Dropout": "dropout(p='x3')"}, "noise 0.111 -> 0.429, 3.9x stronger"),
        ({"Dropout": "off"}, "noise 0.111 -> 0, none is left"),
        ({"Dropout": "standout"}, None),
        ({"Linear": "dropconnect(p=0.3)"}, None),
        ({"after:Linear": "gaussian(p=0.2)"}, "noise 0 -> 0.25, new"),
    ],
)
def test_each_edit_says_how_strong_its_noise_becomes(rules, told):
    report = regraft.apply(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), rules)
    (edit,) = json.loads(report.to_json())["grafted"]
    assert edit["strength"] == told
    assert (told or "noise") in str(report) or told is None
    assert ("strength: noise" in str(report)) == (told is not None)

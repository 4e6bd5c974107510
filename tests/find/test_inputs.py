"""Inputs for the probe: which the user may give, and what is said of those that do not fit."""

from __future__ import annotations

import pytest
import tiny
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft
from regraft.errors import InputsError


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x, y, *, scale=1.0):
        return self.drop(x + y * scale)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Dropout(0.1), X),
        (Two(), (X, X)),
        (Two(), [X, X]),
        (Two(), {"x": X, "y": X, "scale": 2.0}),
        (tiny.bert(), tiny.tokens()),
        (tiny.vit(), tiny.images()),
    ],
    ids=["tensor", "tuple", "list", "dict", "a batch", "images"],
)
def test_a_tensor_a_tuple_or_a_dict(model, inputs):
    inspection = regraft.inspect(model, inputs)
    assert inspection.probe.ran
    assert any(site.calls == 1 for site in inspection.sites)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (X, r"the inputs do not fit: missing a required argument: 'y'\n  --> Two.forward\(x, y, \*, scale=1.0\)\n  help: tried \(float32\[2, 3\]\)"),
        ((X, X, X), "too many positional arguments"),
        ({"x": X, "z": X}, r"missing a required argument: 'y'[\s\S]*tried \(x=float32\[2, 3\], z=float32\[2, 3\]\)"),
        ({"x": X, "y": X, "z": 1}, "unexpected keyword argument 'z'"),
        (3, r"inputs is a int\n  --> Two.forward\(x, y, \*, scale=1.0\)\n  help: a tensor, a tuple of arguments or a dict"),
        ("text", "inputs is a str"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_name_the_signature_and_what_was_tried(inputs, message):
    model = Two()
    before = snapshot(model)
    for verb in (
        lambda: regraft.inspect(model, inputs),
        lambda: regraft.apply(model, {"Dropout": "off"}, inputs),
    ):
        with pytest.raises(InputsError, match=message) as caught:
            verb()
        assert isinstance(caught.value, ValueError)
    assert_same(before, model)


def test_a_model_of_unknown_inputs_is_not_probed_and_says_what_to_give():
    inspection = regraft.inspect(tiny.mlp())
    assert inspection.probe.to_dict() == {
        "ran": False,
        "how": None,
        "reason": "regraft does not know this model's inputs; give inputs=",
        "seconds": None,
    }
    assert {site.calls for site in inspection.sites} == {None}


def test_a_config_from_which_no_inputs_can_be_made_is_no_error():
    model = tiny.bert()
    vars(model.config)["vocab_size"] = "many"
    inspection = regraft.inspect(model)
    assert not inspection.probe.ran
    assert "no inputs could be made from the model's config" in inspection.probe.reason


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (48, 1)])
def test_timm_inputs_are_of_the_size_the_model_was_built_for(size, channels):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, in_chans=channels, depth=1, embed_dim=12, num_heads=2
    )
    assert regraft.inspect(model).probe.how == "fake tensors"


def test_inputs_are_not_changed():
    batch = tiny.tokens()
    kept = {name: value.clone() for name, value in batch.items()}
    versions = {name: value._version for name, value in batch.items()}
    regraft.inspect(tiny.bert(), batch)
    assert all(torch.equal(value, kept[name]) for name, value in batch.items())
    assert {name: value._version for name, value in batch.items()} == versions

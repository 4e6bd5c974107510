"""Options out of range are refused in the option's own words, by rule and by module alike."""

from __future__ import annotations

import pytest
import torch

import regraft
from regraft import nn
from regraft.errors import OptionError, RateError

REFUSED = [
    ("gaussian", nn.GaussianDropout, {"sigma": 0}, RateError, "sigma=0 is out of range(?s:.*)above 0"),
    ("gaussian", nn.GaussianDropout, {"sigma": "a"}, OptionError, "sigma='a' is not a number"),
    ("gaussian", nn.GaussianDropout, {"sigma": float("inf")}, RateError, "sigma=inf is out of range"),
    ("gaussian", nn.GaussianDropout, {"sigma": float("nan")}, RateError, "sigma=nan is out of range"),
    (
        "multisample",
        nn.MultiSampleDropout,
        {"num_samples": 0},
        RateError,
        "num_samples=0 (?s:.*)from 1 to 255",
    ),
    (
        "multisample",
        nn.MultiSampleDropout,
        {"num_samples": 256},
        RateError,
        "num_samples=256 is out of range",
    ),
    ("multisample", nn.MultiSampleDropout, {"num_samples": 2.0}, OptionError, "2.0 is not a whole number"),
    ("multisample", nn.MultiSampleDropout, {"exact": 1}, OptionError, "exact=1 is not True or False"),
    (
        "multisample",
        nn.MultiSampleDropout,
        {"match": "mean"},
        OptionError,
        "match=.mean. is not .rate. or .variance.",
    ),
    ("standout", nn.StandoutDropout, {"alpha": True}, OptionError, "alpha=True is not a number"),
    ("standout", nn.StandoutDropout, {"min_keep": 0}, RateError, "min_keep=0 (?s:.*)above 0 and at most 1"),
    (
        "standout",
        nn.StandoutDropout,
        {"gate": "tide"},
        OptionError,
        "gate='tide' is (?s:.*)did you mean 'tied'",
    ),
    ("dropblock", nn.DropBlock, {"block_size": 0}, RateError, "block_size=0 (?s:.*)of at least 1"),
    ("spatial", nn.SpatialDropout, {"channel_axis": 1.0}, OptionError, "channel_axis=1.0 is not a whole"),
    ("token", nn.TokenDropout, {"channel_axis": "last"}, OptionError, "channel_axis='last' is not a whole"),
    ("concrete", nn.ConcreteDropout, {"temperature": 0}, RateError, "temperature=0 is out of range"),
    ("dropconnect", None, {"mask": "row"}, OptionError, "mask='row' is not 'batch' or 'example'"),
    ("neftune", None, {"alpha": -1}, RateError, "alpha=-1 is out of range"),
    ("mixout", None, {"exact": None}, OptionError, "exact=None is not True or False"),
]


@pytest.mark.parametrize(("name", "module", "options", "error", "message"), REFUSED, ids=str)
def test_bad_options_are_refused(name, module, options, error, message):
    with pytest.raises(error, match=message) as caught:
        regraft.variant(name, **options)
    assert f"variant '{name}'" in str(caught.value)
    assert isinstance(caught.value, (TypeError, ValueError))
    if module is not None:
        with pytest.raises(error, match=message):
            module(0.1, **options)


def test_a_rate_that_plays_no_part_is_refused():
    for rule in ("gaussian(p=0.1, sigma=0.2)", "standout(p=0.1, beta=1.0)"):
        with pytest.raises(regraft.errors.OptionError, match="p plays no part beside"):
            regraft.apply(torch.nn.Sequential(torch.nn.Dropout(0.1)), {"Dropout": rule})
    with pytest.raises(regraft.errors.OptionError, match="p plays no part beside sigma"):
        nn.GaussianDropout(0.1, sigma=0.2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.GaussianDropout(0.1), "GaussianDropout(p=0.1)"),
        (lambda: nn.GaussianDropout(sigma=0.2), "GaussianDropout(sigma=0.2)"),
        (lambda: nn.MultiSampleDropout(0.1), "MultiSampleDropout(p=0.1, num_samples=8)"),
        (
            lambda: nn.MultiSampleDropout(0.1, exact=True),
            "MultiSampleDropout(p=0.1, num_samples=8, exact=True)",
        ),
        (lambda: nn.DropBlock(0.1), "DropBlock(p=0.1, block_size=7)"),
        (nn.Off, "Off()"),
        (lambda: nn.NEFTuneEmbedding(3, 2), "NEFTuneEmbedding(3, 2, alpha=5.0)"),
    ],
)
def test_modules_show_what_they_are(make, text):
    assert repr(make()) == text


def test_every_variant_has_its_module_in_regraft_nn():
    from regraft.variants import registry

    registry.names()
    for name in registry._builtin:
        found = registry.spec(name)
        for family in found.families:
            assert found.module_for(family).__name__ in nn.__all__
    assert sorted(nn.__all__) == nn.__all__

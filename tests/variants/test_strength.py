"""The strength of noise: what the formulas say is the variance that is drawn."""

import pytest
import torch

from regraft.variants.registry import complete_options, names, spec
from regraft.variants.strength import Strength, noise_variance, strength

KNOWN = [
    ("dropout", 0.3, {}),
    ("mc", 0.3, {}),
    ("consistent", 0.3, {}),
    ("gaussian", 0.3, {}),
    ("gaussian", 0.3, {"sigma": 0.5}),
    ("uniform", 0.2, {}),
    ("spatial", 0.3, {}),
    ("token", 0.3, {}),
    ("droppath", 0.3, {}),
    ("dropblock", 0.3, {"block_size": 3}),
    ("multisample", 0.3, {}),
    ("multisample", 0.3, {"num_samples": 2}),
    ("multisample", 0.2, {"match": "variance"}),
    ("off", 0.0, {}),
]


@pytest.mark.parametrize(("name", "p", "options"), KNOWN)
def test_it_is_the_variance_of_the_factor_that_is_drawn(name, p, options):
    """Many independent draws, also of the variants that draw once for an example or a channel."""
    torch.manual_seed(0)
    found = spec(name)
    x = torch.ones(20_000, 4, 6, 6, dtype=torch.float64)
    factors = found.function_for("Dropout")(x, p, True, **complete_options(found, options))
    first = factors[:, 0, 0, 0]  # one element of each example, independent in all of them
    expected = noise_variance(name, p, options)
    # 6 standard errors of a variance, whose own is at most that of two points 0 and 1 / (1 - p).
    error = 6 * float((first - 1).square().std()) / len(first) ** 0.5
    assert float(first.mean()) == pytest.approx(1, abs=6 * max(expected, 1e-12) ** 0.5 / len(first) ** 0.5)
    assert float(first.var()) == pytest.approx(expected, abs=error + 1e-12)


def test_every_variant_of_dropouts_is_known_or_said_to_be_unknown():
    unknown = {
        name for name in names() if noise_variance(name, 0.2) is None and "Dropout" in spec(name).families
    }
    assert unknown & {name for name, _, _ in KNOWN} == set()
    assert {"alpha", "concrete", "standout"} <= unknown


@pytest.mark.parametrize("name", ["alpha", "standout"])
def test_where_it_is_unknown_it_does_depend_on_the_activation(name):
    found = spec(name)
    function, options = found.function_for("Dropout"), complete_options(found, {})
    spread = []
    for value in (0.2, 2.0):
        torch.manual_seed(0)
        spread.append(float((function(torch.full((20_000, 8), value), 0.3, True, **options) / value).var()))
    assert abs(spread[0] - spread[1]) > 0.1 * max(spread)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (1 / 9, 1 / 72, "noise 0.111 -> 0.0139, 8x weaker"),
        (1 / 9, 3 / 7, "noise 0.111 -> 0.429, 3.9x stronger"),
        (1 / 9, 1 / 9, "noise 0.111, as before"),
        (1 / 9, 0.0, "noise 0.111 -> 0, none is left"),
        (0.0, 0.25, "noise 0 -> 0.25, new"),
        (0.0, 0.0, "noise 0, as before"),
    ],
)
def test_what_a_report_says(before, after, text):
    assert str(Strength(before, after)) == text


def test_a_graft_is_compared_with_plain_dropout_at_the_sites_rate():
    assert strength(0.1, "multisample", 0.2) == Strength(
        pytest.approx(0.1 / 0.9), pytest.approx(0.2 / 0.8 / 8)
    )
    assert strength(None, "gaussian", 0.2) == Strength(0.0, pytest.approx(0.25))
    assert strength(0.1, "standout", 0.1) is None
    assert strength(0.1, "multisample", 0.1, {"match": "variance"}).after == pytest.approx(0.1 / 0.9)

"""Standout: slopes, eval, and the learned gate."""

from __future__ import annotations

import pytest
import torch

from regraft import nn
from regraft.errors import OptionError
from regraft.variants.standout import standout, standout_linear


@pytest.mark.parametrize("rescale", [True, False])
def test_a_tied_probability_is_a_constant_to_the_slope(rescale):
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y = standout(x, 0.3, rescale=rescale)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope * x, y)  # y = x * m, so the slope is m
    keep = torch.sigmoid(x + torch.tensor(0.7 / 0.3).log()).clamp(min=0.05)
    kept = 1 / keep if rescale else torch.ones_like(keep)
    torch.testing.assert_close(slope, torch.where(y == 0, 0.0, kept.detach()), rtol=1e-6, atol=1e-6)


def test_the_slope_is_right_on_average():
    """Dividing by pi makes the mean output x, so its slope is 1."""
    x = torch.full((1 << 16,), 0.7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (slope,) = torch.autograd.grad(standout(x, 0.3).sum(), x)
    assert abs(slope.mean() - 1) < 5 * slope.std() / (1 << 8)


def test_without_rescaling_eval_multiplies_by_the_probability():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = standout(x, 0.3, False, rescale=False)
    torch.testing.assert_close(y, x * torch.sigmoid(x + torch.tensor(0.7 / 0.3).log()).clamp(min=0.05))
    assert torch.autograd.gradcheck(lambda x: standout(x, 0.3, False, rescale=False), x)


def test_a_linear_layer_is_masked_by_its_own_output():
    x, weight, bias = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)
    torch.manual_seed(0)
    y = standout_linear(x, weight, bias, 0.4)
    torch.manual_seed(0)
    assert torch.equal(y, standout(torch.nn.functional.linear(x, weight, bias), 0.4))


def test_a_learned_gate_starts_as_dropout_and_gets_a_slope():
    module = nn.StandoutLinear(4, 3, p=0.4, gate="learned")
    assert {"gate_weight", "gate_bias"} < dict(module.named_parameters()).keys()
    x = torch.randn(64, 4)
    y = module(x)
    full = torch.nn.functional.linear(x, module.weight, module.bias)
    kept = y != 0
    torch.testing.assert_close(y[kept], full[kept] / 0.6)
    y.square().sum().backward()
    assert module.gate_weight.grad.abs().sum() > 0
    assert module.gate_bias.grad.abs().sum() > 0


def test_a_learned_gate_learns_what_to_keep():
    """Straight through: where keeping a unit lowers the loss, its probability rises."""
    torch.manual_seed(0)
    module = nn.StandoutDropout(0.5, gate="learned", features=2, rescale=False)
    optimizer = torch.optim.Adam([module.gate_weight, module.gate_bias], lr=0.05)
    x = torch.ones(256, 2)
    for _ in range(60):
        loss = ((module(x) - torch.tensor([1.0, 0.0])) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keep = module.eval()(x)[0]
    assert keep[0] > 0.9
    assert keep[1] < 0.1


def test_a_learned_gate_at_a_dropout_asks_for_the_number_of_features():
    with pytest.raises(OptionError, match="needs the number of features"):
        nn.StandoutDropout(0.1, gate="learned")
    nn.StandoutDropout(0.1, gate="learned", features=3)


def test_beta_given_the_rate_plays_no_part():
    x = torch.randn(40)
    torch.manual_seed(0)
    y = standout(x, 0.0, beta=0.5)
    torch.manual_seed(0)
    assert torch.equal(y, standout(x, 0.7, beta=0.5))
    assert not torch.equal(y, x)

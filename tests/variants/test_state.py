"""Variants that keep something: consistent's run, mixout's weights, concrete's rate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import regraft
from regraft import nn
from regraft.errors import ModelError
from regraft.training.penalty import penalty


def test_an_evaluation_run_has_one_mask():
    drop = nn.ConsistentDropout(0.5).eval()
    x = torch.ones(4, 7, 33)
    first = drop(x)
    assert torch.equal(drop(x), first)
    assert torch.equal(first[0], first[3])
    assert torch.equal(drop(x[:2, :5]), first[:2, :5])
    assert set(first.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    "again", [lambda m: m.eval(), lambda m: m.train().eval()], ids=["eval", "train, eval"]
)
def test_a_new_run_has_a_new_mask(again):
    drop, x = nn.ConsistentDropout(0.5).eval(), torch.ones(1, 200)
    first = drop(x)
    assert not torch.equal(again(drop)(x), first)


def test_a_run_can_be_repeated_by_its_seed_and_copied():
    drop, x = nn.ConsistentDropout(0.5), torch.ones(1, 200)
    torch.manual_seed(5)
    first = drop.eval()(x)
    assert torch.equal(copy.deepcopy(drop)(x), first)
    torch.manual_seed(5)
    assert torch.equal(drop.eval()(x), first)
    assert drop.state_dict() == {}


def test_training_draws_anew_each_time():
    drop, x = nn.ConsistentDropout(0.5), torch.ones(1, 200)
    assert not torch.equal(drop(x), drop(x))


def test_mixout_falls_back_to_the_weight_it_remembers():
    layer = nn.MixoutLinear(300, 200, p=0.4)
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.remember()
        layer.weight.fill_(5.0)
    mixed = layer(torch.eye(300)).sub(layer.bias).T
    u, w, p = 3.0, 5.0, 0.4
    expected = torch.tensor([((1 * u) - p * u) / (1 - p), (w - p * u) / (1 - p)])
    values = mixed.detach().flatten()
    nearest = (values[:, None] - expected).abs().min(dim=1)
    assert nearest.values.max() < 1e-4
    assert abs(values.mean() - w) < 0.05


def test_mixout_keeps_its_weight_in_the_state_dict():
    layer = nn.MixoutLinear(3, 2)
    assert set(layer.state_dict()) == {"weight", "bias", "mixout_weight"}
    assert "mixout_weight" not in dict(layer.named_parameters())


def trained_rate(noise: float, entropy: float) -> float:
    """The rate after fitting y = x + noise through a scalar with concrete dropout before it."""
    torch.manual_seed(0)
    drop = nn.ConcreteDropout(0.3, entropy=entropy)
    layer = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*drop.parameters(), *layer.parameters()], lr=0.05)
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True) + noise * torch.randn(256, 1)
    for _ in range(150):
        loss = ((layer(drop(x)) - y) ** 2).mean() + penalty(drop)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.sigmoid(drop.concrete_logit).item()


def test_the_rate_is_learned():
    assert trained_rate(0.1, entropy=1e-5) < 0.15
    assert trained_rate(0.1, entropy=10.0) > 0.35


def test_the_penalty_is_the_entropy_times_the_features():
    drop = nn.ConcreteDropout(0.2, entropy=0.5)
    assert penalty(drop) == 0  # nothing has run: the number of features is not known
    drop(torch.ones(3, 7))
    p = torch.tensor(0.2, dtype=torch.float64)
    expected = 0.5 * 7 * (p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(penalty(drop).double(), expected)
    drop(torch.ones(3, 11, 2, 2))
    torch.testing.assert_close(penalty(drop).double(), expected / 7 * 11)
    (slope,) = torch.autograd.grad(penalty(drop), drop.concrete_logit)
    logit = drop.concrete_logit.detach().double()
    torch.testing.assert_close(slope.double(), 0.5 * 11 * logit * p * (1 - p))


def test_the_penalty_counts_a_shared_module_once_and_ignores_the_rest():
    drop = nn.ConcreteDropout(0.2, weight=0.0)
    drop(torch.ones(2, 5))
    alone = penalty(drop)
    net = torch.nn.ModuleDict({"a": drop, "b": drop, "c": nn.GaussianDropout(0.1)})
    assert torch.equal(penalty(net), alone)
    assert penalty(torch.nn.Linear(2, 2)) == 0
    with pytest.raises(ModelError, match="is not a module"):
        penalty("model")


def test_the_penalty_is_finite_at_rates_of_almost_0_and_1():
    drop = nn.ConcreteDropout(0.2)
    drop(torch.ones(2, 5))
    for logit in (-200.0, 200.0):
        torch.nn.init.constant_(drop.concrete_logit, logit)
        (slope,) = torch.autograd.grad(penalty(drop), drop.concrete_logit)
        assert slope.isfinite().all()


def test_the_penalty_has_the_weights_of_the_layer_that_follows_in_a_sequential():
    drop, layer = nn.ConcreteDropout(0.2, entropy=0.0, weight=0.5), torch.nn.Linear(5, 3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), drop, layer, torch.nn.Linear(3, 3))
    net(torch.ones(2, 5))
    torch.testing.assert_close(penalty(net), 0.5 * layer.weight.square().sum() / 0.8)
    slopes = torch.autograd.grad(penalty(net), [drop.concrete_logit, layer.weight])
    torch.testing.assert_close(slopes[1], layer.weight / 0.8)
    # d/dl of 1 / (1 - p) is p / (1 - p).
    torch.testing.assert_close(slopes[0], (0.5 * layer.weight.square().sum() * 0.25).reshape(1))


class Reads(torch.nn.Module):
    """Two layers read what the dropout makes, one reads what went in."""

    def __init__(self):
        super().__init__()
        self.other, self.one, self.two = (torch.nn.Linear(4, 4) for _ in range(3))
        self.drop = torch.nn.Dropout(0.2)

    def forward(self, x, twice=True):
        y = self.drop(x)
        return self.one(y) + self.other(x) + (self.two(y) if twice else 0)


def test_the_penalty_finds_the_layers_that_read_the_output_from_one_batch():
    model = Reads()
    regraft.apply(model, {"Dropout@drop": "concrete(entropy=0.0, weight=1.0)"})
    with pytest.raises(ModelError, match=r"penalty\(model, inputs=batch\)"):
        penalty(model)
    state = torch.get_rng_state()
    expected = (model.one.weight.square().sum() + model.two.weight.square().sum()) / 0.8
    torch.testing.assert_close(penalty(model, torch.ones(2, 4)), expected)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(penalty(model), expected)  # remembered
    again = copy.deepcopy(model)
    torch.testing.assert_close(penalty(again), expected)
    torch.nn.init.zeros_(again.one.weight)  # the copy's own layers
    torch.testing.assert_close(penalty(again), model.two.weight.square().sum() / 0.8)
    torch.testing.assert_close(penalty(pickle.loads(pickle.dumps(model))), expected)
    torch.testing.assert_close(penalty(copy.deepcopy(model), {"x": torch.ones(2, 4)}), expected)
    rebuilt = Reads()
    rebuilt.load_state_dict(model.state_dict(), strict=False)
    regraft.apply(rebuilt, {"Dropout@drop": "concrete(entropy=0.0, weight=1.0)"})
    with pytest.raises(ModelError, match="not known"):  # and no other number
        penalty(rebuilt)
    torch.testing.assert_close(penalty(rebuilt, torch.ones(2, 4)), expected)
    regraft.revert(model)
    assert penalty(model) == 0


def test_the_weights_hold_the_rate_down():
    """The entropy draws the rate towards a half, the weights towards 0."""
    rates = []
    for weight in (0.0, 10.0):
        drop = nn.ConcreteDropout(0.3, entropy=1.0, weight=weight)
        net = torch.nn.Sequential(drop, torch.nn.Linear(8, 8))
        net(torch.ones(1, 8))
        optimizer = torch.optim.Adam(drop.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            penalty(net).backward()
            optimizer.step()
        rates.append(torch.sigmoid(drop.concrete_logit).item())
    assert rates[0] == pytest.approx(0.5, abs=0.02)
    assert rates[1] < 0.1


def test_an_optimizer_built_before_the_graft_learns_the_rate_once_it_is_given_it():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(model.parameters())
    regraft.apply(model, {"Dropout": "concrete(entropy=0.1)"})
    added = [one for one in model.parameters() if one not in before]
    assert [name for name, one in model.named_parameters() if one not in before] == ["1.concrete_logit"]
    optimizer.add_param_group({"params": added, "weight_decay": 0.0})
    start = added[0].detach().clone()
    (model(torch.ones(8, 4)).square().mean() + penalty(model)).backward()
    optimizer.step()
    assert not torch.equal(added[0], start)

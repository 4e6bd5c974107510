"""Each technique of the source article, grafted onto its own networks and trained; and where it was wrong."""

from __future__ import annotations

import pytest
import torch
from networks import (
    DropConnectAsWritten,
    ExampleNet,
    Net,
    RDropoutNN,
    StandoutAsWritten,
    digits,
    rdrop_as_written,
)
from snapshots import same_in_eval
from torch import nn
from torch.nn import functional as F

import regraft

IMAGES, LABELS = digits()
NETWORKS = [Net, RDropoutNN, ExampleNet]
TECHNIQUES = {
    "dropout": {"Dropout": "dropout(p=0.3)"},
    "gaussian": {"Dropout": "gaussian(sigma=0.1)"},
    "multisample": {"Dropout": "multisample(num_samples=4)"},
    "dropconnect": {"Linear@fc1": "dropconnect(p=0.3)"},
    "dropconnect, each example": {"Linear@fc1": "dropconnect(p=0.3, mask='example')"},
    "standout": {"Linear@fc1": "standout(p=0.3)"},
    "standout, learned gate": {"Linear@fc1": "standout(p=0.3, gate='learned')"},
    "standout, at dropout": {"Dropout": "standout(p=0.3)"},
}


def train(model, loss, steps=30, rate=0.05):
    """Losses of some steps of plain gradient descent with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def accuracy(model):
    with torch.no_grad():
        return (model.eval()(IMAGES).argmax(-1) == LABELS).float().mean().item()


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("rules", TECHNIQUES.values(), ids=TECHNIQUES)
def test_each_technique_trains_each_network_and_leaves_a_plain_one(build, rules):
    torch.manual_seed(0)
    model = build()
    classes = [type(module) for module in model.modules()]
    report = regraft.apply(model, rules, IMAGES)
    assert report.grafted
    assert report.skipped == []
    losses = train(model, lambda model: F.cross_entropy(model(IMAGES), LABELS))
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(model) > 0.9
    regraft.revert(model)
    assert [type(module) for module in model.modules()] == classes
    plain = build()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert same_in_eval(plain, model, IMAGES)


@pytest.mark.parametrize("build", NETWORKS)
def test_r_dropout_trains_each_network(build):
    torch.manual_seed(0)
    model = build()

    def loss(model):
        logits = regraft.stochastic_passes(model, 2, IMAGES)
        return regraft.rdrop_loss(logits, LABELS, alpha=1.0)

    # The KL holds the two passes together, so the loss falls more slowly than that of one pass.
    losses = train(model, loss, steps=90)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(model) > 0.9


def test_dropout_of_channels_is_a_kind_of_its_own():
    model = Net()
    regraft.apply(model, {"Dropout2d": "spatial(p=0.4)"}, IMAGES)
    assert type(model.drop2) is nn.Dropout
    maps = model.drop1(torch.ones(50, 8, 4, 4)).flatten(2)
    assert ((maps == 0).all(-1) | (maps > 0).all(-1)).all()
    assert (maps == 0).any()


# Where the article's code is wrong.


def test_its_dropconnect_is_transposed_and_runs_for_square_weights_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size of tensor"):
        DropConnectAsWritten(64, 32)(torch.ones(2, 64))
    torch.manual_seed(0)
    square = DropConnectAsWritten(8, 8).eval()
    x = torch.randn(5, 8)
    assert not torch.allclose(square(x), F.linear(x, square.weight * 0.5, square.bias), atol=0.01)
    layer, x = nn.Linear(64, 32), torch.randn(5, 64)
    regraft.apply(layer, {"Linear": "dropconnect(p=0.5)"})
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, F.linear(x, layer.weight, layer.bias), atol=0.1, rtol=0.1)


def test_its_dropconnect_scales_at_eval_which_changes_a_pretrained_model():
    torch.manual_seed(0)
    square, x = DropConnectAsWritten(8, 8), torch.randn(5, 8)
    with torch.no_grad():
        square.weight.copy_((square.weight + square.weight.T) / 2)  # so that the transposition plays no part
    plain = F.linear(x, square.weight, square.bias)
    assert not torch.allclose(square.eval()(x), plain, atol=0.01)
    layer = nn.Linear(8, 8)
    layer.load_state_dict(square.state_dict())
    regraft.apply(layer, {"Linear": "dropconnect(p=0.5)"})
    assert torch.equal(layer.eval()(x), plain)


def test_its_standout_leaves_eval_unscaled():
    """What eval gives is not what training gives on average: each unit is larger by 1 / pi."""
    torch.manual_seed(0)
    written, x = StandoutAsWritten(16, 6), torch.randn(4, 16)
    a = F.linear(x, written.weight, written.bias).detach()
    mean = torch.stack([written(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, F.relu(a) * torch.sigmoid(a), atol=0.05, rtol=0.1)
    active = a > 0.1
    assert (written.eval()(x)[active] > 1.2 * mean[active]).all()

    layer = nn.Linear(16, 6)
    layer.load_state_dict(written.state_dict())
    regraft.apply(layer, {"Linear": "standout(beta=0.0)"})
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert torch.equal(layer.eval()(x), a)
    torch.testing.assert_close(mean, a, atol=0.1, rtol=0.1)
    layer.train()
    regraft.apply(layer, {"Linear": "standout(beta=0.0, rescale=False)"})
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(layer.eval()(x), a * torch.sigmoid(a))
    torch.testing.assert_close(mean, layer(x), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("times", [2, 8])
def test_its_kl_is_summed_so_that_alpha_means_something_else_at_each_batch_size(times):
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    larger = [first.repeat(times, 1), second.repeat(times, 1), labels.repeat(times)]

    def written(*batch):
        return rdrop_as_written(*batch, alpha=1.0) - rdrop_as_written(*batch, alpha=0.0)

    def ours(one, other, labels):
        both = torch.stack([one, other])
        return regraft.rdrop_loss(both, labels, 1.0) - regraft.rdrop_loss(both, labels, 0.0)

    assert written(*larger).item() == pytest.approx(times * written(first, second, labels).item())
    assert ours(*larger).item() == pytest.approx(ours(first, second, labels).item())
    for batch in ([first, second, labels], larger):
        both = torch.stack(batch[:2])
        loss = regraft.rdrop_loss(both, batch[2], 0.7, ce="mean", reduction="sum")
        assert loss.item() == pytest.approx(rdrop_as_written(*batch, alpha=0.7).item())


def test_its_cross_entropies_are_averaged_where_the_paper_adds_them():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    paper = sum(F.cross_entropy(one, labels) for one in logits)
    assert regraft.rdrop_loss(logits, labels, 0.0, ce="sum").item() == pytest.approx(paper.item())
    assert rdrop_as_written(*logits, labels, 0.0).item() == pytest.approx(paper.item() / 2)

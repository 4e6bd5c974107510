"""The dropout between the layers of an LSTM, a GRU or an RNN, with any variant in its place."""

from __future__ import annotations

import itertools

import pytest
import torch
from snapshots import assert_same, same_in_eval, snapshot
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import regraft
from regraft.graft.recurrent import layer_by_layer, read_recurrence

CELLS = {
    "lstm": lambda **options: nn.LSTM(5, 6, **options),
    "lstm, projected": lambda **options: nn.LSTM(5, 6, proj_size=3, **options),
    "gru": lambda **options: nn.GRU(5, 6, **options),
    "rnn, tanh": lambda **options: nn.RNN(5, 6, **options),
    "rnn, relu": lambda **options: nn.RNN(5, 6, nonlinearity="relu", **options),
}
FORMS = [
    {"bidirectional": two, "batch_first": first, "bias": bias}
    for two, first, bias in itertools.product([False, True], repeat=3)
]
cells = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
X = torch.randn(4, 7, 5)


def tensors(output):
    found = []
    for one in output:
        found += tensors(one) if isinstance(one, tuple) and not isinstance(one, torch.Tensor) else [one]
    return [one for one in found if one is not None]


class Seen(torch.overrides.TorchFunctionMode):
    """Puts the layer-by-layer form in the place of the kernel."""

    def __init__(self, drop):
        super().__init__()
        self.drop, self.dropped = drop, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            return layer_by_layer(read_recurrence(func, args), self._count)
        return func(*args, **(kwargs or {}))

    def _count(self, x):
        self.dropped += 1
        return self.drop(x)


@cells
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_layer_by_layer_is_what_the_kernel_computes(make, packed):
    for form in FORMS:
        torch.manual_seed(0)
        net = make(num_layers=3, **form).double()
        x = (
            pack_padded_sequence(X.double(), [7, 5, 4, 2], batch_first=True)
            if packed and form["batch_first"]
            else X.double()
        )
        expected = net(x)
        with Seen(lambda x: None) as seen:
            made = net(x)
        assert seen.dropped == 2
        for one, other in zip(tensors(made), tensors(expected), strict=True):
            torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-12)


@cells
@pytest.mark.parametrize("variant", ["gaussian", "multisample", "mc", "token", "uniform(p=0.4)"])
def test_a_variant_between_the_layers(make, variant):
    net = make(num_layers=2, dropout=0.3, batch_first=True)
    plain = make(num_layers=2, dropout=0.3, batch_first=True)
    plain.load_state_dict(net.state_dict())
    before = snapshot(net)
    report = regraft.apply(net, {"Dropout": variant})
    (edit,) = report.grafted
    assert report.skipped == []
    assert "one after the other" in edit.cost
    first, second = net(X)[0], net(X)[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(one.grad is not None for one in net.parameters())
    net.zero_grad(set_to_none=True)
    assert torch.equal(net.eval()(X)[0], plain.eval()(X)[0]) == (variant != "mc")
    net.train()
    regraft.revert(net)
    assert_same(before, net)


def test_the_noise_is_between_the_layers_and_nowhere_else():
    """The first layer's last states are not touched, the second layer's are."""
    net = nn.GRU(5, 6, 2, dropout=0.5)
    regraft.apply(net, {"Dropout": "gaussian"})
    (_, one), (_, other) = net(X), net(X)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_the_rate_is_the_modules_own():
    """Over many rows, what the second layer sees has the variance of the noise."""
    net = nn.RNN(5, 4000, 2, nonlinearity="relu", dropout=0.2, bias=False)
    with torch.no_grad():
        net.weight_ih_l0.zero_()[:, 0] = 1.0
        net.weight_hh_l0.zero_()
        net.weight_hh_l1.zero_()
        net.weight_ih_l1.copy_(torch.eye(4000))
    regraft.apply(net, {"Dropout": "gaussian"})
    x = torch.zeros(1, 1, 5)
    x[..., 0] = 10.0
    seen = net(x)[0] / 10
    assert seen.mean().item() == pytest.approx(1.0, abs=0.05)
    assert seen.std().item() == pytest.approx(0.5, abs=0.05)  # sqrt(0.2 / 0.8)


def test_setting_the_rate_and_writing_it_out_take_each_others_place():
    net, plain = nn.LSTM(5, 6, 2, dropout=0.3), nn.LSTM(5, 6, 2, dropout=0.3)
    plain.load_state_dict(net.state_dict())
    regraft.apply(net, {"Dropout": "gaussian"})
    regraft.apply(net, {"Dropout": "dropout(p=0.6)"})
    assert net.dropout == 0.6
    regraft.apply(net, {"Dropout": "gaussian(p=0.1)"})
    assert net.dropout == 0.3
    regraft.apply(net, {"Dropout": "off"})
    assert torch.equal(net(X)[0], net(X)[0])
    regraft.revert(net)
    assert same_in_eval(net, plain, X)


def test_a_learned_rate_has_no_place_in_a_kernel():
    (skip,) = regraft.apply(nn.LSTM(5, 6, 2, dropout=0.3), {"Dropout": "concrete"}).skipped
    assert "state of its own" in skip.reason

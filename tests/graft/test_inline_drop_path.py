"""A DropPath that is no module: its draw in a forward, or in a function that the forward calls."""

from __future__ import annotations

import pytest
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft

X = torch.ones(2000, 3, 4)


class ByRand(nn.Module):
    def __init__(self, rate=0.25):
        super().__init__()
        self.inner, self.drop_rate = nn.Identity(), rate

    def forward(self, x):
        if not self.training:
            return x + self.inner(x)
        mask = torch.rand(x.size(0), 1, 1, device=x.device).ge_(self.drop_rate).div(1 - self.drop_rate)
        return x + self.inner(x) * mask


def drop_path(x, drop_prob, training):
    if drop_prob == 0.0 or not training:
        return x
    keep = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * mask.div_(keep)


class ByFunction(nn.Module):
    def __init__(self, rate=0.25):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x + drop_path(x, self.rate, self.training)


both = pytest.mark.parametrize("build", [ByRand, ByFunction])


@both
def test_it_is_found_with_its_rate_and_line(build):
    (site,) = regraft.inspect(nn.Sequential(build()), X[:4]).sites
    assert (site.path, site.kind, site.op, site.p, site.calls) == ("0", "call", "DropPath", 0.25, 1)
    assert site.source.startswith("graft/test_inline_drop_path.py:")


@both
def test_droppath_takes_the_draw_over(build):
    net = nn.Sequential(build())
    before = snapshot(net)
    report = regraft.apply(net, {"DropPath": "droppath"}, X[:4])
    assert report.skipped == []
    kept = (net(X) != 1).float().mean().item()
    assert kept == pytest.approx(0.75, abs=0.04)
    rows = net(X).flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows.unique().tolist() == pytest.approx([1.0, 1 + 1 / 0.75])
    assert torch.equal(net.eval()(X), X + X)
    net.train()
    regraft.revert(net)
    assert_same(before, net)


@both
@pytest.mark.parametrize("rule", ["gaussian", "droppath(p=0.5)", "off"])
def test_another_variant_or_rate_is_told_to_be_out_of_reach(build, rule):
    if rule == "gaussian":
        with pytest.raises(TypeError, match="cannot replace DropPath"):
            regraft.apply(nn.Sequential(build()), {"DropPath": rule}, X[:4])
        return
    (skip,) = regraft.apply(nn.Sequential(build()), {"DropPath": rule}, X[:4]).skipped
    assert "written out in the forward" in skip.reason
    assert "attribute" in skip.remedy


def test_a_draw_of_rows_that_is_no_mask_is_no_drop_path():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand(x.shape[0], 1, 1)

    inspection = regraft.inspect(nn.Sequential(Noise()), X[:4])
    assert [(site.kind, site.op, site.p) for site in inspection.sites] == [("module", "Noise", None)]
    assert inspection.balance == {"draws": 1, "sites": 0, "other": 0, "unrecognized": 1}

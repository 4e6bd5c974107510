"""DropKey and DropHead where models attend: in fused attention, nn.MultiheadAttention, Hugging Face and timm."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.graft.attention import attend, with_dropped_keys

B, H, L, S, E = 6, 4, 5, 7, 8


def masks() -> dict[str, dict]:
    padding = torch.ones(B, 1, 1, S, dtype=torch.bool)
    padding[:, :, :, 5:] = False
    by_query = torch.rand(B, 1, L, S) > 0.3
    by_query[:, :, 0] = False  # a query that may attend to nothing
    lowest = torch.finfo(torch.float64).min
    return {
        "none": {},
        "padding": {"attn_mask": padding},
        "by query": {"attn_mask": by_query},
        "-inf": {"attn_mask": torch.zeros(B, 1, 1, S).double().masked_fill(~padding, -math.inf)},
        "lowest": {"attn_mask": torch.zeros(B, 1, 1, S).double().masked_fill(~padding, lowest)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("p", [0.3, 0.9])
@pytest.mark.parametrize("options", masks().values(), ids=masks())
def test_keys_masked_for_the_kernel_are_those_dropped_from_the_weights(options, p):
    """The same draw in two ways: as a mask for the fused kernel, and as `dropkey` on the weights."""
    torch.manual_seed(0)
    query = torch.randn(B, H, L, E, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(B, H, S, E, dtype=torch.float64) for _ in range(2))
    call = {"query": query, "key": key, "value": value, **options}
    torch.manual_seed(1)
    fused = F.scaled_dot_product_attention(**with_dropped_keys(call, p))
    torch.manual_seed(1)
    keep = with_dropped_keys({"query": query, "key": key}, p)["attn_mask"]

    def drop(weights):
        kept = weights * keep
        total = kept.sum(-1, keepdim=True)
        return torch.where(total > 0, kept / total.clamp(min=1e-300), weights)

    bare = (~keep).all(-1).any()
    assert not bare, "a head without any key keeps them all"
    written = attend(**call, drop=drop)
    torch.testing.assert_close(fused, written)
    assert torch.autograd.grad(fused.sum(), query)[0].isfinite().all()


def test_a_mask_of_columns_is_a_row_for_each_head():
    query, key = torch.randn(2, 3, 50, 4), torch.randn(2, 3, 60, 4)
    mask = with_dropped_keys({"query": query, "key": key}, 0.5)["attn_mask"]
    assert mask.shape == (2, 3, 1, 60)
    assert mask.dtype == torch.bool


class Kernels(torch.overrides.TorchFunctionMode):
    """Counts calls of fused attention, and softmaxes written out."""

    def __init__(self):
        super().__init__()
        self.fused, self.written = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.fused += func is F.scaled_dot_product_attention
        self.written += func in (torch.softmax, torch.Tensor.softmax, F.softmax)
        return func(*args, **(kwargs or {}))


def vit(fused=True):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, attn_drop_rate=0.2
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model, torch.randn(4, 3, 32, 32)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 16)


MODELS = {
    "bert": lambda: (tiny.bert(), tiny.tokens()),
    "bert, eager": lambda: (tiny.bert(attention="eager"), tiny.tokens()),
    "vit": vit,
    "vit, not fused": lambda: vit(fused=False),
    "encoder": encoder,
}
ATTEND = (
    "scaled_dot_product_attention",
    "MultiheadAttention",
    "attention.self",
    "attn.attn_drop",
    "self.dropout",
)
"""Operations that attend, and ends of the paths of what drops attention weights written out."""


@pytest.mark.parametrize("rule", ["dropkey(p=0.3)", "dropkey(p=0.3, keys='element')", "drophead(p=0.3)"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_in_models_they_act_at_attention_alone_and_say_so_elsewhere(build, rule):
    model, inputs = build()
    given = None if isinstance(inputs, dict) else inputs

    def run():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return tiny.logits(out)

    model.eval()
    plain = run()
    report = regraft.apply(model, {"Dropout": "off"}, given)
    report = regraft.apply(model, {"Dropout": rule}, given)
    assert all(edit.op in ATTEND or edit.path.endswith(ATTEND) for edit in report.grafted)
    assert len(report.grafted) == 2
    assert any("acts on attention weights" in skip.reason for skip in report.skipped)
    assert torch.equal(run(), plain)
    model.train()
    assert not torch.equal(run(), run())
    run().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_columns_keep_fused_attention_and_the_report_says_what_others_cost():
    counts = {}
    for rule in ("dropkey(p=0.3)", "dropkey(p=0.3, keys='element')", "gaussian(p=0.3)"):
        model, x = vit()
        report = regraft.apply(model.train(), {"scaled_dot_product_attention": rule}, x)
        with Kernels() as seen:
            model(x)
        counts[rule] = (seen.fused > 0, seen.written > 0)
        cost = report.grafted[0].cost
        assert ("stays fused" in cost) == (rule == "dropkey(p=0.3)")
        assert ("a call as probed" in cost) == (rule != "dropkey(p=0.3)")
    assert list(counts.values()) == [(True, False), (False, True), (False, True)]


def test_the_kernel_can_be_kept():
    model, x = vit()
    report = regraft.apply(model, {"Dropout": "dropkey(p=0.3)"}, x, fused="keep")
    assert len(report.grafted) == 2
    model, x = vit()
    report = regraft.apply(model, {"scaled_dot_product_attention": "drophead(p=0.3)"}, x, fused="keep")
    assert report.grafted == []
    assert "the fused attention kernel is kept" in report.skipped[0].reason


class Written(nn.Module):
    """Attention written out, of values that are all 1: it gives the sum of each query's weights."""

    def __init__(self, keys=-1, blocks=(), multiplied=True):
        super().__init__()
        self.keys, self.blocks, self.multiplied = keys, blocks, multiplied
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        scores = (x @ x.transpose(-2, -1)).view(*x.shape[:2], *self.blocks, x.shape[2], x.shape[2])
        weights = self.drop(scores.softmax(self.keys))
        return weights @ torch.ones_like(x).view_as(weights[..., :4]) if self.multiplied else weights.sum(-1)


def test_written_out_dropkey_shares_the_attention_among_the_keys_and_drophead_drops_heads():
    x = torch.randn(64, 4, 4, 4)
    model = Written()
    regraft.apply(model, {"Dropout": "dropkey(p=0.5)"}, x)
    torch.testing.assert_close(model(x), torch.ones_like(x))
    regraft.apply(model, {"Dropout": "drophead(p=0.5)"}, x)
    y = model(x)
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y))
    assert set(y.detach().round(decimals=4).unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    "options", [{"keys": -2}, {"blocks": (1,)}, {"multiplied": False}], ids=["queries", "blocks", "no values"]
)
@pytest.mark.parametrize("rule", ["dropkey(p=0.5)", "drophead(p=0.5)"])
def test_what_is_not_seen_to_attend_is_refused(options, rule):
    x, model = torch.randn(3, 4, 4, 4), Written(**options)
    plan = regraft.plan(model, {"Dropout": rule}, x)
    assert plan.grafted == []
    (skip,) = plan.skipped
    assert "acts on attention weights" in skip.reason
    assert "attn_implementation='sdpa'" in skip.remedy


def test_without_a_probe_nothing_is_known_to_attend():
    (skip,) = regraft.plan(Written(), {"Dropout": "dropkey(p=0.5)"}).skipped
    assert "acts on attention weights" in skip.reason

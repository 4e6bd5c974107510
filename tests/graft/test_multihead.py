"""`nn.MultiheadAttention`: opaque to a walk. Its rate is set, or its attention is written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft

B, L, S, E = 3, 4, 5, 8
BUILDS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "kdim, vdim": {"kdim": 6, "vdim": 10},
    "bias_kv, zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}
builds = pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
PADDING = torch.zeros(B, S, dtype=torch.bool)
PADDING[0, 3:] = True
BOOL = torch.zeros(L, S, dtype=torch.bool)
BOOL[1, 2:] = True
CALLS = {
    "weights": {"need_weights": True},
    "no weights": {"need_weights": False},
    "each head's weights": {"need_weights": True, "average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "bool mask": {"attn_mask": BOOL, "need_weights": False},
    "float mask": {"attn_mask": torch.randn(L, S)},
    "both masks": {"attn_mask": BOOL, "key_padding_mask": PADDING},
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def build(options, p=0.3):
    torch.manual_seed(0)
    return nn.MultiheadAttention(E, 2, dropout=p, **options)


def inputs(module):
    generator = torch.Generator().manual_seed(1)
    shapes = [(L, B, E), (S, B, module.kdim), (S, B, module.vdim)]
    made = [torch.randn(shape, generator=generator).to(next(module.parameters())) for shape in shapes]
    return [one.transpose(0, 1) for one in made] if module.batch_first else made


@builds
@calls
def test_written_out_at_p_0_it_is_the_module_and_its_eval_is_the_originals(options, call):
    module, plain = build(options).double(), build(options, p=0.0).double()
    report = regraft.apply(module, {"Dropout": "gaussian(p=0.0)"})
    assert report.grafted[0].cost
    if call.get("attn_mask") is not None and call["attn_mask"].is_floating_point():
        call = {**call, "attn_mask": call["attn_mask"].double()}
    for one, other in zip(module(*inputs(module), **call), plain(*inputs(plain), **call), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-12)
    regraft.apply(module, {"Dropout": "gaussian(p=0.5)"})
    module.eval()
    plain.eval()
    with torch.no_grad():
        for one, other in zip(module(*inputs(module), **call), plain(*inputs(plain), **call), strict=True):
            assert one is None or torch.equal(one, other)


@builds
@calls
def test_its_noise_is_the_variants(options, call):
    module = build(options)
    regraft.apply(module, {"Dropout": "multisample"})
    first, second = (module(*inputs(module), **call)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_the_noise_falls_on_the_weights_that_are_returned():
    module = build({})
    regraft.apply(module, {"Dropout": "gaussian(p=0.5)"})
    weights = module(*inputs(module), average_attn_weights=False)[1]
    plain = build({}).eval()(*inputs(module), average_attn_weights=False)[1]
    ratio = weights / plain
    assert ratio.unique().numel() == ratio.numel()


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a layer"])
def test_its_rate_is_set_and_reverted(nested):
    module = nn.TransformerDecoderLayer(E, 2, 16, 0.1) if nested else build({}, 0.1)
    before = snapshot(module)
    x = (torch.ones(L, B, E),) * (2 if nested else 3)
    report = regraft.apply(module, {"MultiheadAttention": "dropout(p=0.4)"}, x)
    assert {edit.after for edit in report.grafted} == {"MultiheadAttention(p=0.4)"}
    found = [one.dropout for one in module.modules() if isinstance(one, nn.MultiheadAttention)]
    assert found == [0.4] * (2 if nested else 1)
    assert all(
        type(one) is nn.MultiheadAttention for one in module.modules() if hasattr(one, "in_proj_weight")
    )
    regraft.apply(module, {"MultiheadAttention": "off"}, x)
    assert {one.dropout for one in module.modules() if isinstance(one, nn.MultiheadAttention)} == {0.0}
    regraft.revert(module)
    assert_same(before, module)


def test_trap_6_in_training_every_part_of_torchs_layers_is_reached():
    for layer in (nn.TransformerEncoderLayer(E, 2, 16, 0.3), nn.TransformerDecoderLayer(E, 2, 16, 0.3)):
        x = torch.ones(L, B, E)
        args = (x,) if isinstance(layer, nn.TransformerEncoderLayer) else (x, x)
        report = regraft.apply(layer, {"Dropout": "off"}, args)
        assert report.skipped == []
        assert torch.equal(layer(*args), layer(*args))


@pytest.mark.parametrize(("need", "training"), list(itertools.product([True, False], [True, False])))
def test_monte_carlo_in_both_modes(need, training):
    module = build({}).train(training)
    regraft.apply(module, {"Dropout": "mc"})
    with torch.no_grad():
        first, second = (module(*inputs(module), need_weights=need)[0] for _ in range(2))
    assert not torch.equal(first, second)

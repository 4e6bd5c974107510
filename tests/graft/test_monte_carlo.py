"""MC dropout that is really on: in eval, functional, fused, and where torch has a fast path."""

from __future__ import annotations

import pytest
import tiny
import torch
from snapshots import assert_same, same_in_eval, snapshot
from torch import nn

import regraft

X = torch.randn(2, 6, 16)
MODELS = {
    "mlp": (tiny.mlp, torch.randn(4, 6)),
    "calls": (lambda: tiny.Calls(nn.Linear(16, 16)), X),
    "attention": (tiny.Attention, X),
    "encoder": (tiny.encoder, X),
    "layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.3, batch_first=True), X),
    "bert": (tiny.bert, tiny.tokens()),
    "bert-eager": (lambda: tiny.bert(attention="eager"), tiny.tokens()),
    "llama": (tiny.llama, tiny.tokens()),
    "bart": (tiny.bart, {**tiny.tokens(), "decoder_input_ids": tiny.tokens()["input_ids"]}),
    "vit": (tiny.vit, tiny.images()),
    "densenet": (tiny.densenet, tiny.images()),
}
models = pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)


def run(model, inputs):
    return tiny.logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))


@models
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_it_draws_in_eval_and_only_while_it_is_grafted(build, inputs, grad):
    model = build().eval()
    before = snapshot(model)
    with torch.set_grad_enabled(grad):
        # Under no_grad torch's encoder layers take a fused path, whose result differs in the last bits.
        expected = run(model, inputs)
        with regraft.grafted(model, {"Dropout": "mc"}, inputs) as report:
            assert {skip.reason for skip in report.skipped} <= {"its rate is 0"}
            first, second = run(model, inputs), run(model, inputs)
            assert not torch.equal(first, second)
        assert torch.equal(run(model, inputs), expected)
    assert_same(before, model)


@models
def test_every_site_draws_in_eval_with_the_rate_it_has_in_training(build, inputs):
    """Hugging Face and timm pass a rate of 0 in eval: the graft carries the probed one."""
    model = build()
    sites = {(site.path, site.op): site for site in regraft.inspect(model, inputs).sites}
    report = regraft.apply(model, {"Dropout": "mc"}, inputs)
    for edit in report.grafted:
        assert edit.options["p"] == pytest.approx(sites[edit.path, edit.op].p), edit.path
        assert edit.options["p"] > 0


@pytest.mark.parametrize("only", ["layers.0.dropout1", "layers.1.self_attn", "layers.1.dropout"])
def test_trap_6_the_fused_fast_path_does_not_bypass_one_grafted_child(only):
    model = tiny.encoder(p=0.3).eval()
    regraft.apply(model, {f"Dropout@{only}": "mc"}, X)
    with torch.no_grad():
        assert not torch.equal(model(X), model(X))
    regraft.revert(model, f"*@{only}")
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_a_variant_that_is_the_identity_in_eval_leaves_the_fast_path_on(monkeypatch):
    model, original = tiny.encoder(), tiny.encoder()
    original.load_state_dict(model.state_dict())
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a, **k: calls.append(1) or fast(*a, **k)
    )
    assert same_in_eval(model, original, X)
    assert len(calls) == 4


def test_beside_mc_other_sites_are_the_identity_in_eval():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).eval()
    regraft.apply(model, {"Dropout@0": "mc", "Dropout@1": "gaussian"})
    values = model(torch.ones(1000)).unique()
    assert values.tolist() == [0.0, 2.0]


def test_consistent_dropout_is_one_mask_for_an_evaluation_run():
    model = tiny.mlp(p=0.5)
    regraft.apply(model, {"Dropout": "consistent"})
    x = torch.randn(4, 6)
    model.eval()
    first = model(x)
    assert torch.equal(model(x), first)
    assert torch.equal(model(x[:2]), first[:2])
    found = {tuple(model.eval()(x).flatten().tolist()) for _ in range(8)}
    assert len(found) > 1


def test_standout_as_its_paper_has_it_scales_in_eval_and_draws_nothing():
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    regraft.apply(model, {"Dropout": "standout(rescale=False)"})
    x = torch.randn(50)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), x * torch.sigmoid(x).clamp(min=0.05))

"""Fused attention: written out it is the kernel's equal; only its rate is set; or it is left alone."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import OptionError
from regraft.graft.attention import attend

B, H, L, S, E = 2, 4, 5, 7, 8


def bool_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    return mask


MASKS = {
    "none": None,
    "bool (L, S)": bool_mask(L, S),
    "bool (B, 1, L, S)": bool_mask(B, 1, L, S),
    "bool (B, 1, 1, S)": bool_mask(B, 1, 1, S),
    "bool (B, H, L, S)": bool_mask(B, H, L, S),
    "float": torch.randn(L, S),
    "float with -inf": torch.zeros(B, 1, L, S).masked_fill(~bool_mask(B, 1, L, S), -math.inf),
    "float, finfo.min": torch.zeros(B, 1, L, S).masked_fill(
        ~bool_mask(B, 1, L, S), torch.finfo(torch.float32).min
    ),
}


def qkv(dtype=torch.float32, heads=H):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, L, E, generator=generator)
    k, v = (torch.randn(B, heads, S, E, generator=generator) for _ in range(2))
    return [one.to(dtype).requires_grad_() for one in (q, k, v)]


def in_double(mask):
    """The same mask for float64; float32's lowest value would not do there what it does in float32."""
    if mask is None or not mask.is_floating_point():
        return mask
    lowest = mask == torch.finfo(torch.float32).min
    return mask.double().masked_fill(lowest, torch.finfo(torch.float64).min)


def both(options, dtype=torch.float32, heads=H):
    """Output and gradients of the kernel and of attention written out."""
    found = []
    for function in (
        F.scaled_dot_product_attention,
        lambda *a, **k: attend(*a, **k, drop=lambda scores: None),
    ):
        inputs = qkv(dtype, heads)
        output = function(*inputs, **options)
        output.square().sum().backward()
        found.append([output, *(one.grad for one in inputs)])
    return found


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_written_out_it_equals_the_fused_kernel(mask, scale):
    exact, written = both({"attn_mask": in_double(mask), "scale": scale}, torch.float64)
    for a, b in zip(exact, written, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)
    # In single precision no two orders of summation agree to the last bits: each is held to the exact values.
    fused, written = both({"attn_mask": mask, "scale": scale})
    for true, kernel, own in zip(exact, fused, written, strict=True):
        bound = 4 * (kernel - true).abs().max() + 16 * torch.finfo(torch.float32).eps * true.abs().max()
        assert own.dtype == torch.float32
        assert (own - true).abs().max() <= bound


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries_and_causal_masks(heads, causal):
    fused, written = both({"enable_gqa": True, "is_causal": causal}, torch.float64, heads)
    for a, b in zip(fused, written, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_good_as_the_kernel(dtype):
    exact = both({"attn_mask": MASKS["bool (L, S)"]}, torch.float64)[0][0]
    fused, written = both({"attn_mask": MASKS["bool (L, S)"]}, dtype)
    assert written[0].dtype == dtype
    error = [(one.double() - exact).abs().max().item() for one in (fused[0], written[0])]
    assert error[1] <= 2 * error[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_may_attend_to_nothing_gives_0_and_finite_gradients(kind):
    mask = bool_mask(B, 1, L, S)
    mask[0, 0, 2] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    q, k, v = qkv()
    output = attend(q, k, v, mask, drop=lambda scores: None)
    assert not output[0, :, 2].any()
    output.square().sum().backward()
    for one in (q, k, v):
        assert one.grad.isfinite().all()
    assert not q.grad[0, :, 2].any()
    torch.testing.assert_close(output[1], F.scaled_dot_product_attention(q, k, v, mask)[1])


def test_what_is_dropped_is_the_normalized_weights():
    q, k, v = qkv()
    seen = []
    attend(q, k, v, drop=lambda scores: seen.append(scores))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(B, H, L))


@pytest.mark.parametrize("variant", ["gaussian(p=0.0)", "multisample(p=0.0)"])
@pytest.mark.parametrize("build", [tiny.Attention, tiny.bert, tiny.llama, tiny.vit, tiny.encoder])
def test_a_model_grafted_at_p_0_is_the_model_without_dropout(build, variant):
    torch.manual_seed(0)
    model = build().double()
    inputs = (
        torch.randn(2, 6, 16).double()
        if not hasattr(model, "config") and not hasattr(model, "pretrained_cfg")
        else None
    )
    args, kwargs = ((inputs,), {}) if inputs is not None else ((), tiny.tokens())
    if hasattr(model, "pretrained_cfg"):
        args, kwargs = (tiny.images().double(),), {}
    regraft.apply(model, {"Dropout": "off"}, inputs)
    expected = tiny.logits(model(*args, **kwargs))
    report = regraft.apply(model, {"Dropout": variant}, inputs)
    assert any(edit.cost for edit in report.grafted)
    torch.testing.assert_close(tiny.logits(model(*args, **kwargs)), expected, atol=1e-12, rtol=1e-10)


class Rate(torch.overrides.TorchFunctionMode):
    """Sees the rate each fused attention is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((kwargs or {}).get("dropout_p", args[4] if len(args) > 4 else 0.0))
        return func(*args, **(kwargs or {}))


X = torch.randn(2, 6, 16)


@pytest.mark.parametrize(
    ("variant", "fused", "rates", "grafted"),
    [
        ("dropout(p=0.2)", "auto", [0.2], 1),
        ("dropout(p='x0.5')", "keep", [0.15], 1),
        ("off", "auto", [0.0], 1),
        ("gaussian", "auto", [], 1),
        ("gaussian", "write", [], 1),
        ("gaussian", "keep", [0.3], 0),
        ("gaussian(fused='keep')", "auto", [0.3], 0),
        ("gaussian(fused='write')", "keep", [], 1),
    ],
)
def test_the_kernel_stays_unless_the_noise_needs_it_written_out(variant, fused, rates, grafted):
    model = tiny.Attention(p=0.3)
    report = regraft.apply(model, {"Dropout": variant}, X, fused=fused)
    with Rate() as mode:
        model(X)
    assert mode.seen == pytest.approx(rates)
    assert len(report.grafted) == grafted
    if not grafted:
        assert "the fused attention kernel is kept" in report.skipped[0].reason
        assert "dropout(p=...)" in report.skipped[0].remedy
    elif not rates:
        assert "written out" in report.grafted[0].cost
        assert "written out" in str(report)
    with Rate() as mode:
        model.eval()(X)
    assert mode.seen == [0.0]


def test_auto_skips_scores_of_more_than_a_gibibyte_with_the_reason():
    class Huge(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)

    long = torch.empty(1, 8, 8192, 4, device="meta")  # 8 x 8192 x 8192 scores of 4 bytes: 2 GiB
    plan = regraft.plan(Huge(), {"Dropout": "gaussian"}, long)
    assert "would take 2.0 GiB" in plan.skipped[0].reason
    assert "fused='write'" in plan.skipped[0].remedy
    assert len(regraft.plan(Huge(), {"Dropout": "gaussian"}, long, fused="write").grafted) == 1
    assert len(regraft.plan(Huge(), {"Dropout": "dropout(p=0.1)"}, long).grafted) == 1


def test_an_unknown_choice_is_an_error():
    for verb in (
        lambda: regraft.apply(tiny.Attention(), {"Dropout": "gaussian"}, X, fused="never"),
        lambda: regraft.apply(tiny.Attention(), {"Dropout": "gaussian(fused='never')"}, X),
    ):
        with pytest.raises(OptionError):
            verb()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_trap_9_masks_reach_hugging_faces_attention(attention, padded):
    """Padding must change nothing for the tokens that are there."""
    model = tiny.bert(attention=attention)
    regraft.apply(model, {"Dropout": "gaussian(p=0.0)"})
    batch = tiny.tokens(length=8)
    short = {name: value[:, :5] for name, value in batch.items()}
    if padded:
        batch["attention_mask"][:, 5:] = 0
    same = torch.allclose(model(**batch).logits, model(**short).logits, atol=1e-6)
    assert same == padded

"""DropConnect: the mask's shape, where the noise is 0, and half precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from regraft import nn
from regraft.variants.dropconnect import dropconnect


def test_one_weight_mask_for_the_whole_batch():
    module = nn.DropConnectLinear(16, 4, p=0.5)
    x = torch.randn(1, 16).expand(5, 16)
    y = module(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))


def test_noise_of_its_own_for_each_example_and_position():
    module = nn.DropConnectLinear(16, 4, p=0.5, mask="example")
    y = module(torch.ones(3, 5, 16)).flatten(0, 1)
    assert len(y.unique(dim=0)) == 15


def test_the_bias_is_never_dropped():
    bias = torch.arange(4.0)
    assert torch.equal(dropconnect(torch.zeros(2, 3), torch.ones(4, 3), bias, 0.5), bias.expand(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", ["x", "weight", "one feature"])
def test_where_there_is_no_variance_there_is_no_noise_and_the_slope_is_finite(dtype, zero):
    x, weight = torch.randn(2, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    if zero == "x":
        x.zero_()
    elif zero == "weight":
        weight.zero_()
    else:
        x[:, 0] = 0
    x.requires_grad_()
    weight.requires_grad_()
    y = dropconnect(x, weight, None, 0.5, mask="example")
    if zero != "one feature":
        assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_the_smallest_numbers_have_finite_slopes_too():
    x = torch.tensor([[1e-30, 1e-19, 1e-10, 0.0]], requires_grad=True)
    dropconnect(x, torch.full((2, 4), 1e-4), None, 0.9, mask="example").sum().backward()
    assert x.grad.isfinite().all()


def test_slopes_of_the_noise_are_those_of_its_deviation():
    """Against the formula, written out in float64 with the same normal draw."""
    p = 0.3
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y = dropconnect(x, weight, None, p, mask="example")
    torch.manual_seed(0)
    noise = torch.randn(5, 4, dtype=torch.float64)
    expected = x @ weight.T + ((p / (1 - p)) * (x**2) @ (weight**2).T).sqrt() * noise
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("autocast", [False, True])
def test_squares_do_not_overflow_in_float16(autocast):
    dtype = torch.float32 if autocast else torch.float16
    x = torch.full((2, 8), 300.0, dtype=dtype)
    weight = torch.full((4, 8), 0.5, dtype=dtype)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = dropconnect(x, weight, None, 0.5, mask="example")
    assert y.dtype is torch.float16
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_runs_forward_and_backward(dtype, own, compiled):
    module = nn.DropConnectLinear(6, 4, p=0.5, mask="example").to(own)
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x = torch.randn(3, 5, 6, dtype=own, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, plain = run(x), linear(x, module.weight, module.bias)
    assert y.dtype is plain.dtype
    y.float().sum().backward()
    assert x.grad.dtype is module.weight.grad.dtype is own
    assert module.weight.grad.isfinite().all()


def test_a_schedule_to_0_ends_in_the_plain_layer():
    module = nn.DropConnectLinear(3, 2, p=0.3)
    module.p = 0.0
    x = torch.randn(4, 3)
    assert torch.equal(module(x), linear(x, module.weight, module.bias))

"""Under torch.compile: one graph, no break, and the draw inside the kernel that uses it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from regraft import nn
from regraft.variants import registry

MODULES = {
    "dropout": lambda: nn.Dropout(0.1),
    "mc": lambda: nn.MCDropout(0.1).eval(),
    "gaussian": lambda: nn.GaussianDropout(0.1),
    "multisample": lambda: nn.MultiSampleDropout(0.1),
    "multisample-exact": lambda: nn.MultiSampleDropout(0.1, exact=True),
    "uniform": lambda: nn.UniformDropout(0.1),
    "alpha": lambda: nn.AlphaDropout(0.1),
    "concrete": lambda: nn.ConcreteDropout(0.1),
    "consistent": lambda: nn.ConsistentDropout(0.1).eval(),
    "spatial": lambda: nn.SpatialDropout(0.1),
    "token": lambda: nn.TokenDropout(0.1),
    "droppath": lambda: nn.DropPath(0.1),
    "dropblock": lambda: nn.DropBlock(0.1),
    "standout": lambda: nn.StandoutDropout(0.1),
    "standout-learned": lambda: nn.StandoutDropout(0.1, gate="learned", features=32),
    "standout-linear": lambda: nn.StandoutLinear(32, 48, p=0.1),
    "dropconnect": lambda: nn.DropConnectLinear(32, 48, p=0.1),
    "dropconnect-example": lambda: nn.DropConnectLinear(32, 48, p=0.1, mask="example"),
    "mixout": lambda: nn.MixoutLinear(32, 48, p=0.1),
    "weightdrop": lambda: nn.WeightDropLinear(32, 48, p=0.1),
    "neftune": lambda: nn.NEFTuneEmbedding(10, 32),
    "elementwise": lambda: nn.ElementwiseDropout(0.1),
    "noise": lambda: nn.GaussianNoise(0.1),
    "shaped": lambda: nn.ShapedDropout(0.1, noise_shape=[None, 1, None]),
    "dropkey": lambda: nn.DropKey(0.1),
    "drophead": lambda: nn.DropHead(0.1),
}
QUICK = ("multisample", "standout")
AROUND_A_PRODUCT = {"dropconnect-example": 2}
"""Kernels of the forward pass where it takes more than one: a matrix product stands between them."""
NOT_DRAWN = ("consistent",)
"""Its mask is computed from the run's seed: there is no draw."""

IN_KERNEL = re.compile(r"\b(normalized_rand_cpu|randn_cpu|randint64_cpu|tl\.rand|tl\.randn|tl\.randint)\b")
APART = re.compile(
    r"aten\.(bernoulli|native_dropout|rand|randn|rand_like|randn_like|normal|uniform|random)\b"
)


def slow_but(quick):
    marks = [() if name in quick else (pytest.mark.slow,) for name in MODULES]
    return [pytest.param(name, marks=mark, id=name) for name, mark in zip(MODULES, marks, strict=True)]


def test_every_variant_is_here():
    registry.names()
    assert {name.split("-")[0] for name in MODULES} | {"off"} == registry._builtin


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", slow_but(QUICK))
def test_one_graph_that_draws_inside_its_kernels(name):
    module = MODULES[name]()
    x = torch.randint(10, (4, 16)) if name == "neftune" else torch.randn(4, 16, 32, requires_grad=True)
    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    compiled = torch.compile(module, fullgraph=True)
    if name == "mixout":
        module.mixout_weight.zero_()  # as after some steps: until then nothing shows
    y, code = run_and_get_code(compiled, x)
    # Of the forward pass, without comments; the backward pass is compiled along with it or later.
    code = [one for one in code if "_backward'" not in one[:200]]
    source = re.sub(r"(?m)^\s*(#(?!include)|//).*$", "", "\n".join(code))
    draws = len(IN_KERNEL.findall(source))
    kernels = source.count("cpp_pybinding(") + source.count("@triton.jit")
    print(f"{name}: kernels {kernels}, draws in them {draws}, graph breaks {len(counters['graph_break'])}")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert not APART.search(source)
    assert (draws > 0) == (name not in NOT_DRAWN)
    assert kernels == AROUND_A_PRODUCT.get(name, 1)
    torch.manual_seed(1)
    again = compiled(x)
    assert torch.equal(again, y) == (name in NOT_DRAWN)
    again.square().mean().backward()
    gradients = [one.grad for one in (x, *module.parameters()) if one.grad is not None]
    assert gradients
    assert all(grad.isfinite().all() for grad in gradients)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_the_backward_pass_has_the_mask_of_the_forward_pass():
    compiled = torch.compile(nn.MultiSampleDropout(0.5), fullgraph=True)
    x = torch.ones(64, 64, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    assert len(y.unique()) == 9

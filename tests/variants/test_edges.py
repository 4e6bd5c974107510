"""Empty tensors, dtypes and layouts that `nn.Dropout` takes: every registered variant takes them, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.variants.registry import complete_options, names, spec

EMPTY = [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 3), (2, 0), (0,), ()]
OTHER_DTYPES = [torch.int64, torch.int32, torch.bool, torch.complex64]
DROPOUTS = [name for name in names() if "Dropout" in spec(name).families]
LINEARS = [name for name in names() if "Linear" in spec(name).families and name != "off"]


def run(name: str, x: Tensor, training: bool = True, p: float = 0.3) -> Tensor:
    found = spec(name)
    return found.function(x, p, training, **complete_options(found, {}))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", [*DROPOUTS, "neftune"])
def test_a_tensor_without_elements_or_axes(name, shape, requires_grad):
    x = torch.zeros(shape, requires_grad=requires_grad)
    y = run(name, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if requires_grad:
        y.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_layer_on_an_empty_batch(name, shape):
    found = spec(name)
    module = found.module_for("Linear")(4, 5, p=0.3).train()
    y = module(torch.zeros(shape, requires_grad=True))
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert torch.equal(module.weight.grad, torch.zeros(5, 4))


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("name", DROPOUTS)
def test_integers_and_complex_numbers_pass_where_dropout_lets_them(name, dtype):
    """`nn.Dropout` hands them through in eval and at rate 0, and refuses them in training."""
    x = torch.ones(2, 3, 4, 4).to(dtype)
    found = spec(name)
    if found.changes_eval is None or not found.changes_eval(complete_options(found, {})):
        assert torch.equal(run(name, x, training=False), x)
    if found.rated:
        assert torch.equal(run(name, x, p=0.0), x)


@pytest.mark.parametrize("name", ["gaussian", "uniform", "multisample"])
def test_noise_on_complex_numbers_is_real(name):
    torch.manual_seed(0)
    y = run(name, torch.full((1000,), 1 + 2j))
    torch.testing.assert_close(y.real, y.imag / 2)
    assert y.real.std() > 0.05


@pytest.mark.parametrize("name", DROPOUTS)
def test_where_only_deterministic_operators_are_allowed(name):
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.rand(2, 3, 4, 4, requires_grad=True)
        outputs = []
        for _ in range(2):
            torch.manual_seed(0)
            outputs.append(run(name, x))
        assert torch.equal(*outputs)
        outputs[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(4, 6, 5, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_layouts_give_a_law_that_does_not_depend_on_them(name, layout):
    """Gradients flow to each element, and the dense ones keep their strides."""
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.rand(4, 6, 5, 3) + 0.5).detach().requires_grad_()
    y = run(name, x)
    assert y.shape == x.shape
    if layout in ("channels_last", "transposed"):
        assert y.stride() == x.stride()
    y.sum().backward()
    assert x.grad.isfinite().all()

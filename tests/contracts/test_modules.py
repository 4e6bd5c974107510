"""Every registered variant as a plain module x everything a variant promises."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regraft.errors import RateError
from regraft.variants.registry import complete_options, names, spec

SHAPES = {"BC": (5, 6), "BTC": (3, 5, 6), "BCHW": (2, 6, 5, 4)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NEEDED = {
    "standout": [{}, {"rescale": False}, {"gate": "learned", "features": 6}],
    "dropconnect": [{}, {"mask": "example"}, {"exact": True}],
    "multisample": [{}, {"exact": True}, {"num_samples": 3}],
    "gaussian": [{}, {"sigma": 0.5}],
}
"""Options with which a variant is tested; without an entry, its defaults."""
UNRATED = tuple(name for name in names() if not spec(name).rated)

CASES = [
    pytest.param(
        name, family, options, id="-".join([name, family, *(f"{k}={v}" for k, v in options.items())])
    )
    for name in names()
    for family in spec(name).families
    for options in NEEDED.get(name, [{}])
]
NOISY = [case for case in CASES if case.values[0] != "off"]
cases = pytest.mark.parametrize(("name", "family", "options"), CASES)
noisy = pytest.mark.parametrize(("name", "family", "options"), NOISY)


def build(name: str, family: str, options: dict, p: float = 0.3) -> nn.Module:
    """The variant's module, in training; linear ones are 6 -> 6, embeddings of 10 x 6."""
    made = spec(name).module_for(family)
    rate = {} if name in UNRATED else {"p": p}
    if issubclass(made, nn.Linear):
        module = made(6, 6, **rate, **options)
        if name == "mixout":
            module.mixout_weight.mul_(0.5)  # as after some steps: until then w is u, and nothing shows
        return module
    if issubclass(made, nn.Embedding):
        return made(10, 6, **options)
    return made(**rate, **options)


def sample(
    module: nn.Module, shape: tuple[int, ...] = (3, 5, 6), dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, nn.Embedding):
        return torch.randint(10, shape[:-1], generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def last_axis_is_features(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Shape for `module`: linear layers and learned gates read the last axis, so they get 6 there."""
    reads_last = (
        isinstance(module, (nn.Linear, nn.Embedding)) or getattr(module, "gate_weight", None) is not None
    )
    return (*shape[:1], *shape[2:], shape[1]) if reads_last and len(shape) == 4 else shape


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """What the module computes without its regularizer."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, module.weight, module.bias)
    if isinstance(module, nn.Embedding):
        return nn.functional.embedding(x, module.weight)
    return x


def seeded(module: nn.Module, x: Tensor, seed: int = 0, training: bool | None = None) -> Tensor:
    torch.manual_seed(seed)
    return (module if training is None else module.train(training))(x)


def draws(run) -> bool:
    before = torch.get_rng_state()
    run()
    return not torch.equal(before, torch.get_rng_state())


def changes_eval(name: str, options: dict) -> bool:
    found = spec(name)
    return found.changes_eval is not None and found.changes_eval(complete_options(found, options))


def needs_rate(name: str, options: dict) -> bool:
    found = spec(name)
    return found.needs_rate is None or found.needs_rate(complete_options(found, options))


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eval_is_bit_for_bit_the_original(name, family, options, shape, dtype):
    module = build(name, family, options).eval().to(dtype)
    x = sample(module, last_axis_is_features(module, shape), dtype)
    if changes_eval(name, options):
        assert not torch.equal(module(x), plain(module, x))
    else:
        assert not draws(lambda: module(x))
        assert torch.equal(module(x), plain(module, x))


@cases
@pytest.mark.parametrize("training", [True, False])
def test_a_rate_of_0_is_the_identity_and_draws_nothing(name, family, options, training):
    if not needs_rate(name, options):
        return
    module = build(name, family, options, p=0.0).train(training)
    x = sample(module)
    assert not draws(lambda: module(x))
    assert torch.equal(module(x), plain(module, x))


@noisy
@pytest.mark.parametrize("p", [1, 1.0, 1.5, -0.1, float("nan"), True, "0.5", None], ids=repr)
def test_rates_outside_0_to_1_are_refused(name, family, options, p):
    if name in UNRATED or family == "Embedding":
        return
    with pytest.raises(RateError, match=r"p=1 drops everything|not in \[0, 1\)|a rate is a number"):
        build(name, family, options, p=p)
    module = build(name, family, options)
    module.p = p
    with pytest.raises(ValueError):
        module(sample(module))


@noisy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_training_changes_the_values_and_nothing_else(name, family, options, shape, dtype, p):
    module = build(name, family, options, p=p).to(dtype)
    x = sample(module, last_axis_is_features(module, shape), dtype)
    before = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    outputs = [seeded(module, x, seed) for seed in range(4)]
    without = plain(module, x)
    assert all(y.shape == without.shape and y.dtype == dtype and y.isfinite().all() for y in outputs)
    assert any(not torch.equal(y, without) for y in outputs)
    assert torch.equal(outputs[0], seeded(module, x, 0))
    assert not all(torch.equal(y, outputs[0]) for y in outputs)
    outputs[0].sum().backward()
    gradients = [x.grad] if x.is_floating_point() else [module.weight.grad]
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in gradients)
    assert torch.equal(x.detach(), before)


@noisy
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_layouts_in_memory_are_kept_and_harmless(name, family, options, layout):
    module = build(name, family, options)
    if family in ("Linear", "Embedding") or getattr(module, "gate_weight", None) is not None:
        return
    whole = torch.randn(4, 6, 5, 3)
    x = {
        "channels_last": whole.contiguous(memory_format=torch.channels_last),
        "transposed": whole.transpose(1, 3),
        "expanded": whole[:, :1].expand(4, 6, 5, 3),
        "sliced": whole[:, ::2, 1:],
    }[layout]
    y = seeded(module, x)
    assert y.shape == x.shape
    assert not torch.equal(y, x)
    if layout in ("channels_last", "transposed"):
        assert y.stride() == x.stride()
    rows = torch.stack([seeded(module, x, seed) for seed in range(3)])
    assert rows.isfinite().all()


@noisy
def test_meta_tensors_stay_meta(name, family, options):
    with torch.device("meta"):
        module = build(name, family, options)
    x = sample(build(name, family, options)).to("meta")
    assert module(x).is_meta
    assert module(x).shape == plain(module, x).shape


@cases
def test_compiles_whole_forward_and_backward(name, family, options):
    module = build(name, family, options)
    x = sample(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        module.train(training)
        y = compiled(x.requires_grad_() if x.is_floating_point() else x)
        assert y.isfinite().all()
        if not training and not changes_eval(name, options):
            assert torch.equal(y, plain(module, x))
        if training:
            y.sum().backward()
    compiled_draws = [seeded(compiled, x, seed) for seed in range(4)]
    if name != "off":
        assert not all(torch.equal(y, compiled_draws[0]) for y in compiled_draws)


@noisy
def test_compiled_rates_may_change_without_end(name, family, options):
    if not needs_rate(name, options) or name in UNRATED:
        return
    module = build(name, family, options)
    x = sample(module)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for step in range(1, 16):
            module.p = step / 20
            assert compiled(x).isfinite().all()


@noisy
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_over_passes(name, family, options, randomness):
    module = build(name, family, options, p=0.5)
    x = sample(module)
    torch.manual_seed(0)
    passes = torch.func.vmap(lambda _: module(x), randomness=randomness)(torch.arange(6))
    assert passes.shape == (6, *plain(module, x).shape)
    assert all(torch.equal(one, passes[0]) for one in passes) == (randomness == "same")


@noisy
def test_gradients_are_right_for_a_fixed_draw(name, family, options):
    """The slopes autograd gives are those of the function with its draw held fixed."""
    if name in ("standout",):
        return  # its probabilities are constants to the gradient: tests/variants/test_standout.py
    module = build(name, family, options).double()
    parameters = list(module.parameters())
    x = sample(module, (2, 2, 6), dtype=torch.float64)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    held = [*inputs, *parameters]
    assert torch.autograd.gradcheck(lambda *_: seeded(module, x), held)
    assert torch.autograd.gradgradcheck(lambda *_: seeded(module, x), held)


@noisy
def test_half_precision_gradients_follow_float64(name, family, options):
    """y and its gradient in bfloat16 are those in float64 wherever the two draw the same mask."""
    if name != "multisample" and name != "dropconnect":
        return
    module = build(name, family, options | ({"exact": True} if "exact" in options else {}))
    if options.get("mask") == "example":
        return
    x = sample(module).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        one = copy.deepcopy(module).bfloat16().to(dtype)
        given = x.to(dtype).requires_grad_()
        y = seeded(one, given)
        (slope,) = torch.autograd.grad(y.sum(), given)
        results.append((y.double(), slope.double()))
    (y, slope), (y64, slope64) = results
    torch.testing.assert_close(y, y64, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(slope, slope64, rtol=2e-2, atol=2e-2)


@cases
def test_copies_and_pickles_behave_alike(name, family, options):
    module = build(name, family, options)
    x = sample(module)
    expected = seeded(module, x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(seeded(twin, x), expected)
        assert torch.equal(seeded(twin, x, training=False), seeded(module, x, training=False))
        module.train()


@noisy
def test_eval_and_training_take_turns(name, family, options):
    module = build(name, family, options, p=0.5)
    x = sample(module)
    first = module.eval()(x) if not changes_eval(name, options) else None
    noise = seeded(module.train(), x)
    if first is not None:
        assert torch.equal(module.eval()(x), first)
        assert not torch.equal(noise, first)
    assert torch.equal(seeded(module.train(), x), noise)


@noisy
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_mask(name, family, options, reentrant):
    module = build(name, family, options)
    x = sample(module)
    leaf = x.requires_grad_() if x.is_floating_point() else module.weight

    def slope(run) -> Tensor:
        torch.manual_seed(3)
        return torch.autograd.grad((run() ** 2).sum(), leaf)[0] if not reentrant else _backward(run, leaf)

    # An embedding has no input that requires a gradient, so the reentrant kind cannot hold it.
    if reentrant and not x.is_floating_point():
        return
    expected = slope(lambda: module(x))
    assert torch.equal(slope(lambda: checkpoint(module, x, use_reentrant=reentrant)), expected)


def _backward(run, leaf: Tensor) -> Tensor:
    leaf.grad = None
    (run() ** 2).sum().backward()
    return leaf.grad


@cases
def test_the_docstring_says_what_it_is(name, family, options):
    found = spec(name)
    for function in filter(None, (found.function, found.linear_function)):
        text = function.__doc__
        assert all(f"{section}:" in text for section in ("Shape", "Source", "Differs", "Example"))
    assert found.summary.endswith((".", ").", ":"))

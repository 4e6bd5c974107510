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
from regraft.variants.spec import DEFAULT_RATE

SHAPES = {"BC": (5, 6), "BTC": (3, 5, 6), "BCHW": (2, 6, 5, 4)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {
    "standout": [{}, {"rescale": False}, {"gate": "learned", "features": 6}],
    "dropconnect": [{}, {"mask": "example"}, {"exact": True}],
    "multisample": [{}, {"exact": True, "match": "variance"}, {"num_samples": 3}],
    "gaussian": [{}, {"sigma": 0.5}],
    "spatial": [{}, {"channel_axis": -1}],
}
"""Options with which a variant is tested; without an entry, its defaults."""
UNRATED = tuple(name for name in names() if not spec(name).rated)


def changes_eval(name: str, options: dict) -> bool:
    found = spec(name)
    return found.changes_eval is not None and found.changes_eval(complete_options(found, options))


def needs_rate(name: str, options: dict) -> bool:
    found = spec(name)
    return found.needs_rate is None or found.needs_rate(complete_options(found, options))


def reads_last_axis(family: str, options: dict) -> bool:
    """Does the last axis hold the features: is it a linear layer, or has it a learned gate?"""
    return family in ("Linear", "Embedding") or options.get("gate") == "learned"


def over(holds=lambda name, family, options: True):
    """A test over every variant, family and set of options for which `holds`."""
    found = [
        pytest.param(name, family, options, id="-".join([name, family, *map(str, options.items())]))
        for name in names()
        for family in spec(name).families
        for options in OPTIONS.get(name, [{}])
        if holds(name, family, options)
    ]
    return pytest.mark.parametrize(("name", "family", "options"), found)


every = over()
noisy = over(lambda name, family, options: name != "off")


def build(name: str, family: str, options: dict, p: float = 0.3) -> nn.Module:
    """The variant's module, in training; linear ones are 6 -> 6, embeddings of 10 x 6."""
    made = spec(name).module_for(family)
    rate = {} if name in UNRATED or "sigma" in options else {"p": p}
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


def fitting(family: str, options: dict, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its 6 features on the last axis, where that is what the variant reads."""
    return (
        (*shape[:1], *shape[2:], shape[1]) if reads_last_axis(family, options) and len(shape) == 4 else shape
    )


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


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eval_is_bit_for_bit_the_original(name, family, options, shape, dtype):
    module = build(name, family, options).eval().to(dtype)
    x = sample(module, fitting(family, options, shape), dtype)
    if changes_eval(name, options):
        assert not torch.equal(module(x), plain(module, x))
    else:
        assert not draws(lambda: module(x))
        assert torch.equal(module(x), plain(module, x))


@over(lambda name, family, options: needs_rate(name, options))
@pytest.mark.parametrize("training", [True, False])
def test_a_rate_of_0_is_the_identity_and_draws_nothing(name, family, options, training):
    module = build(name, family, options, p=0.0).train(training)
    x = sample(module)
    assert not draws(lambda: module(x))
    assert torch.equal(module(x), plain(module, x))


@over(lambda name, family, options: spec(name).rated and "sigma" not in options)
@pytest.mark.parametrize("p", [1, 1.0, 1.5, -0.1, float("nan"), True, "0.5", None], ids=repr)
def test_rates_outside_0_to_1_are_refused(name, family, options, p):
    if name == "gaussian" and p is None:
        assert (
            build(name, family, options, p=p).p == DEFAULT_RATE
        )  # the default, which sigma takes the place of
        return
    known = {1: "p=1 drops everything", 1.5: "p=1.5 is not in", -0.1: "p=-0.1 is not in"}
    message = "a rate is a number" if isinstance(p, bool) else known.get(p, "not in|a rate is a number")
    with pytest.raises(RateError, match=message):
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
    x = sample(module, fitting(family, options, shape), dtype)
    before = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    outputs = [seeded(module, x, 0)]
    while torch.equal(outputs[-1], outputs[0]) and len(outputs) < 100:  # few draws, at a low rate: one in two
        outputs.append(seeded(module, x, len(outputs)))
    without = plain(module, x)
    assert all(y.shape == without.shape and y.dtype == dtype and y.isfinite().all() for y in outputs)
    assert any(not torch.equal(y, without) for y in outputs)
    assert torch.equal(outputs[0], seeded(module, x, 0))
    assert not torch.equal(outputs[-1], outputs[0])
    outputs[0].sum().backward()
    gradients = [x.grad] if x.is_floating_point() else [module.weight.grad]
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in gradients)
    assert torch.equal(x.detach(), before)


@over(lambda name, family, options: name != "off" and not reads_last_axis(family, options))
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_layouts_in_memory_are_kept_and_harmless(name, family, options, layout):
    module = build(name, family, options)
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


@every
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


@over(lambda name, family, options: spec(name).rated and needs_rate(name, options))
def test_a_rate_that_changes_at_every_step_is_compiled_once_or_twice(name, family, options):
    module = build(name, family, options)
    x = sample(module)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(1, 16):
        module.p = step / 20
        assert compiled(x).isfinite().all()
    assert counter.frame_count <= 3


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


@over(lambda name, family, options: name not in ("off", "standout"))
def test_gradients_are_right_for_a_fixed_draw(name, family, options):
    """The slopes autograd gives are those of the function with its draw held fixed.

    Not so standout: its probabilities are constants to the slope (tests/variants/test_standout.py).
    """
    module = build(name, family, options).double()
    parameters = list(module.parameters())
    x = sample(module, (2, 2, 6), dtype=torch.float64)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    held = [*inputs, *parameters]
    assert torch.autograd.gradcheck(lambda *_: seeded(module, x), held)
    assert torch.autograd.gradgradcheck(lambda *_: seeded(module, x), held)


SAME_DRAW = ("dropout", "multisample", "dropconnect", "mixout", "spatial", "token", "droppath", "dropblock")
"""Variants whose mask is drawn alike in every dtype."""


@over(lambda name, family, options: name in SAME_DRAW and options.get("mask") != "example")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_those_of_float64_to_rounding(name, family, options, dtype):
    module = build(name, family, options).to(dtype)
    x = sample(module, dtype=dtype)
    results = []
    for one, kind in ((module, dtype), (copy.deepcopy(module).double(), torch.float64)):
        given = x.to(kind).requires_grad_()
        y = seeded(one, given)
        (slope,) = torch.autograd.grad(y.sum(), given)
        results.append((y.double(), slope.double()))
    digits = 8 * torch.finfo(dtype).eps
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=digits, atol=digits)


@every
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
def test_checkpointing_replays_the_mask(name, family, options):
    module = build(name, family, options)
    x = sample(module)
    leaf = x.requires_grad_() if x.is_floating_point() else module.weight
    expected = _backward(lambda: module(x), leaf)
    # A reentrant checkpoint wants an input that requires a gradient, which tokens cannot.
    for reentrant in (True, False) if x.is_floating_point() else (False,):
        again = _backward(lambda kind=reentrant: checkpoint(module, x, use_reentrant=kind), leaf)
        assert torch.equal(again, expected)


def _backward(run, leaf: Tensor) -> Tensor:
    leaf.grad = None
    torch.manual_seed(3)
    (run() ** 2).sum().backward()
    return leaf.grad


@every
def test_the_docstring_says_what_it_is(name, family, options):
    found = spec(name)
    assert all(f"{part}:" in found.function.__doc__ for part in ("Shape", "Source", "Differs", "Example"))
    assert "Shape:" in found.function_for(family).__doc__
    assert found.summary.endswith((".", ").", ":"))


@pytest.mark.slow
@every
def test_inductor_draws_inside_the_fused_kernel(name, family, options):
    from torch._inductor import metrics

    module = build(name, family, options)
    x = sample(module)
    x = x.requires_grad_() if x.is_floating_point() else x
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(module, fullgraph=True)
    seeded(compiled, x).sum().backward()
    first = seeded(compiled, x)
    assert any(not torch.equal(seeded(compiled, x, seed), first) for seed in range(1, 9)) == (name != "off")
    if family == "Dropout":
        # Forward, backward, and what a seed or a sum needs; `dropkey` normalizes over the keys in both.
        assert metrics.generated_kernel_count <= (8 if name == "dropkey" else 6)

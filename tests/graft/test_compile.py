"""Promise 7: torch.compile, torch.export, autocast, vmap and threads."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from torch import nn

import regraft

X = torch.randn(2, 4, 16)
CASES = {
    "mlp": (tiny.mlp, torch.randn(2, 6), {"Dropout": "multisample", "Linear": "dropconnect(p=0.2)"}),
    "calls": (
        lambda: tiny.Calls(tiny.Calls(nn.Linear(16, 16)), p=0.3),
        X,
        {"Dropout": "gaussian", "*@child": None},
    ),
    "attention": (tiny.Attention, X, {"Dropout": "gaussian"}),
    "rate": (tiny.Attention, X, {"Dropout": "dropout(p=0.2)"}),
    "encoder": (tiny.encoder, X, {"Dropout": "gaussian"}),
    "bert": (lambda: tiny.bert(layers=1), tiny.tokens(), {"Dropout": "gaussian"}),
    "vit": (tiny.vit, tiny.images(), {"Dropout": "multisample"}),
}
cases = pytest.mark.parametrize(("build", "inputs", "rules"), CASES.values(), ids=CASES)


def run(model, inputs):
    return tiny.logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cases
def test_one_graph_in_training_and_the_originals_eval(build, inputs, rules):
    model = build()
    with torch.no_grad():
        expected = run(model.eval(), inputs)
    model.train()
    regraft.apply(model, rules, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = run(compiled, inputs), run(compiled, inputs)
    assert first.shape == expected.shape
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(run(model.eval(), inputs), expected)
        torch.testing.assert_close(run(compiled.eval(), inputs), expected)


def test_five_steps_are_one_graph_and_a_graft_compiles_anew():
    counter = torch._dynamo.testing.CompileCounter()
    model = tiny.mlp()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.ones(64, 6)
    compiled(x)
    assert counter.frame_count == 1
    regraft.apply(compiled, {"Dropout": "gaussian(p=0.5)"})
    for _ in range(5):
        output = compiled(x)
    assert counter.frame_count == 2
    assert output.unique(dim=0).shape[0] == 64
    regraft.apply(compiled, {"Dropout": "off"})
    assert compiled(x).unique(dim=0).shape[0] == 1
    regraft.revert(compiled)
    assert 1 < compiled(x).unique(dim=0).shape[0]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.drop = tiny.Calls(p=0.5), nn.Dropout(0.5)

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training), self.calls(x), self.drop(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("only", ["", "calls", "drop"])
def test_a_mode_stays_in_its_own_module_compiled_or_not(compiled, only):
    model = Inner()
    x = torch.ones(1000)
    regraft.apply(model, [("Dropout", "gaussian"), ("re:(calls|drop|)", None), (f"re:{only}", "gaussian")], x)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    many = [output.unique().numel() > 100 for output in forward(x)]
    assert many == [only == "", only == "calls", only == "drop"]
    assert [output.unique().numel() == 1 for output in forward(x)] == [False] * 3


@cases
def test_export_in_eval_gives_the_original(build, inputs, rules):
    model = build()
    with torch.no_grad():
        expected = run(model.eval(), inputs)
    model.train()
    regraft.apply(model, rules, inputs)
    model.eval()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    exported = torch.export.export(model, args, kwargs).module()
    with torch.no_grad():
        made = exported(*args, **kwargs)
    torch.testing.assert_close(tiny.logits(made), expected)


@cases
def test_autocast(build, inputs, rules):
    model = build()
    regraft.apply(model, rules, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, inputs)
    assert output.isfinite().all()
    output.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first = run(model.eval(), inputs)
        regraft.revert(model)
        assert torch.equal(run(model, inputs), first)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_precision(build, inputs, rules, dtype):
    model = build().to(dtype)
    inputs = inputs.to(dtype) if isinstance(inputs, torch.Tensor) else inputs
    regraft.apply(model, rules, inputs)
    output = run(model, inputs)
    assert output.dtype == dtype
    assert output.isfinite().all()
    output.sum().backward()
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["mlp", "calls", "attention", "encoder"])
def test_vmap_over_passes(name):
    build, inputs, rules = CASES[name]
    model = build()
    regraft.apply(model, rules, inputs)
    passes = torch.func.vmap(lambda _: run(model, inputs), randomness="different")(torch.zeros(3))
    assert passes.shape[0] == 3
    assert not torch.equal(passes[0], passes[1])
    same = torch.func.vmap(lambda _: run(model, inputs), randomness="same")(torch.zeros(3))
    torch.testing.assert_close(same[0], same[1])


def test_vmap_over_examples_and_per_sample_gradients():
    model = tiny.mlp(p=0.5)
    regraft.apply(model, {"Dropout": "gaussian"})
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(
        parameters, torch.ones(5, 6)
    )
    assert gradients["3.weight"].shape == (5, 3, 8)
    assert not torch.equal(gradients["3.weight"][0], gradients["3.weight"][1])


def test_threads_do_not_switch_each_others_modes_off():
    """A mode is active in its own thread only, as torch's are."""
    model = tiny.Calls(Waits(), p=0.5)
    x = torch.ones(2000)
    regraft.apply(model, {"Dropout": "gaussian"}, x)
    outputs = []
    model.child.gate = threading.Barrier(2)
    threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.unique().numel() > 1000 for output in outputs] == [True, True]


class Waits(nn.Module):
    """Its forward runs in both threads at once."""

    gate: threading.Barrier | None = None

    def forward(self, x):
        if self.gate is not None:
            self.gate.wait(timeout=30)
        return nn.functional.dropout(x, 0.0, self.training)

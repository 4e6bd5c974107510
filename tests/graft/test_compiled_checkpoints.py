"""torch.compile(fullgraph=True) of models whose layers Hugging Face checkpoints, with their calls grafted."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.graft.compiled import rebind_calls

MODELS = {
    "bert": lambda: tiny.bert(layers=2),
    "bert, eager attention": lambda: tiny.bert(layers=2, attention="eager"),
    "llama": tiny.llama,
    "bart": tiny.bart,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, batch, seed=3):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = tiny.logits(model(**batch))
    output.sum().backward()
    return output.detach(), [p.grad for p in model.parameters() if p.grad is not None]


DEFAULT = (("bert", "gaussian"), ("bart", "dropout(p=0.3)"), ("llama", "mc"))
CASES = [
    pytest.param(
        build, variant, id=f"{name}-{variant}", marks=() if (name, variant) in DEFAULT else pytest.mark.slow
    )
    for name, build in MODELS.items()
    for variant in ("gaussian", "dropout(p=0.3)", "mc")
]


@pytest.mark.parametrize(("build", "variant"), CASES)
def test_one_graph_with_the_same_mask_in_the_recomputation(build, variant):
    model = build()
    model.config.use_cache = False
    batch = tiny.tokens()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    plain = copy.deepcopy(model)
    report = regraft.apply(model, {"Dropout": variant})
    assert any(edit.kind == "call" for edit in report.grafted)
    kept = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, expected = gradients(kept, batch)
    torch._dynamo.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, made = gradients(compiled, batch)
    assert not torch.equal(again, gradients(compiled, batch, seed=4)[0])
    torch.testing.assert_close(again, output)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    if variant != "mc":
        with torch.no_grad():
            torch.testing.assert_close(
                tiny.logits(compiled.eval()(**batch)), tiny.logits(plain.eval()(**batch))
            )


def test_copies_have_their_rates_compiled_too():
    """A version of a method is shared by modules with the same settings, and by no others."""
    first = nn.Sequential(tiny.Calls(p=0.5))
    x = torch.ones(4000)
    regraft.apply(first, {"Dropout": "gaussian(p=0.5)"}, x)
    second = copy.deepcopy(first)
    regraft.apply(second, {"Dropout": "gaussian(p=0.1)"}, x)
    third = pickle.loads(pickle.dumps(second))
    for model, spread in ((first, 1.0), (second, 1 / 3), (third, 1 / 3)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert compiled(x).std().item() == pytest.approx(spread, rel=0.1)
        assert torch.equal(compiled.eval()(x), x)


def _helper(x, training):
    return torch.nn.functional.dropout(x, 0.5, training)


def _decorated(function):
    def wrapper(self, x):
        return function(self, x)

    return wrapper


class Ways(nn.Module):
    def direct(self, x):
        return F.dropout(x, 0.5, self.training)

    def by_a_function(self, x):
        return _helper(x, self.training)

    @_decorated
    def by_a_decorated_method(self, x):
        return nn.functional.dropout(x, p=0.5, training=self.training)

    def by_a_registry(self, x):
        return REGISTRY["one"](x, self.training)

    def in_a_comprehension(self, x):
        return next(torch.dropout(x, 0.5, self.training) for _ in range(1))

    def by_another_method(self, x):
        return self.direct(x)

    def nothing(self, x):
        return torch.relu(x)


REGISTRY = {"one": _helper, "name": "not a function"}
TAKES = {F.dropout: lambda *_, **__: "taken", torch.dropout: lambda *_, **__: "taken"}


@pytest.mark.parametrize(
    "name", ["direct", "by_a_function", "by_a_decorated_method", "by_a_registry", "in_a_comprehension"]
)
def test_a_method_made_anew_calls_what_takes_the_place(name):
    made = rebind_calls(getattr(Ways, name), TAKES)
    assert made(Ways(), torch.ones(2)) == "taken"
    assert isinstance(getattr(Ways(), name)(torch.ones(2)), torch.Tensor)  # the original is as it was


@pytest.mark.parametrize("name", ["by_another_method", "nothing"])
def test_a_method_that_names_no_such_call_is_left(name):
    assert rebind_calls(getattr(Ways, name), TAKES) is None

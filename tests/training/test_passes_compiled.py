"""Passes of compiled models: they share a forward where vmap alone can run it, and else repeat the batch."""

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import ModelError
from tests.training.models import DropPath, headed_bert, images, tokens, vit


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=99, pad_token_id=0, **sizes))
    regraft.apply(model, {"before:Linear@score": "dropout(p=0.3)"})
    return model


MODELS = {
    "bert": (headed_bert, {"input_ids": tokens()}),
    "vit": (lambda: vit(drop_rate=0.3), {"x": images()}),
    "llama": (llama, {"input_ids": tokens()}),
}
GRAFTS = {
    "plain": None,
    "module": {"Dropout": "gaussian"},
    "weights": {"Linear@**.{classifier,head,score}": "dropconnect(p=0.2)"},
    "inserted": {"before:Linear@**.{classifier,head,score}": "dropout(p=0.3)"},
}
SLOW = [("vit", "module"), ("vit", "weights"), ("llama", "module"), ("bert", "weights"), ("llama", "weights")]
SLOW += [("vit", "inserted"), ("llama", "inserted"), ("bert", "inserted"), ("llama", "plain")]


@pytest.mark.parametrize(
    ("name", "graft"),
    [
        pytest.param(name, graft, marks=pytest.mark.slow) if (name, graft) in SLOW else (name, graft)
        for name in MODELS
        for graft in GRAFTS
    ],
)
def test_compiled_passes_share(name, graft):
    build, inputs = MODELS[name]
    model = build().train()
    if GRAFTS[graft]:
        regraft.apply(model, GRAFTS[graft], inputs=inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = regraft.stochastic_passes(compiled, 3, strategy="shared", **inputs)
    passes = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    assert type(outputs) is type(regraft.stochastic_passes(model, 3, **inputs))
    assert len({tuple(one.flatten().tolist()) for one in passes}) == 3
    passes.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        n = 300
        one = regraft.stochastic_passes(compiled, n, strategy="shared", **inputs)
        other = regraft.stochastic_passes(model, n, strategy="shared", **inputs)
        one, other = (x if isinstance(x, torch.Tensor) else x.logits for x in (one, other))
        error = (one.var(0) / n + other.var(0) / n).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-6).all()


def test_gradients_of_compiled_passes_at_rate_0():
    model, ids = headed_bert(p=0.0).train(), tokens()
    model.dropout.p = 0.0
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for each in (model, compiled):
        model.zero_grad()
        regraft.stochastic_passes(each, 2, input_ids=ids, strategy="shared").logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_vmap_alone_cannot_run_is_repeated():
    model, x = nn.Sequential(nn.Linear(6, 4), DropPath(), nn.Linear(4, 3)).train(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ModelError, match="a compiler cannot follow"):
        regraft.stochastic_passes(compiled, 2, x, strategy="shared")
    assert regraft.stochastic_passes(compiled, 2, x).shape == (2, 4, 3)


def test_a_compiled_model_that_draws_once_for_its_batch_is_looped():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).train(), torch.randn(4, 6)
    regraft.apply(model, {"Linear": "dropconnect(p=0.5)"}, inputs=x)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ModelError, match="draws once for the whole batch"):
        regraft.stochastic_passes(compiled, 2, x, strategy="batch")
    passes = regraft.stochastic_passes(compiled, 2, x)
    assert not torch.equal(passes[0], passes[1])


def test_a_fork_does_not_part_what_is_compiled_whole():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train(), torch.randn(4, 6)
    for strategy in ("auto", "shared", "loop"):
        with pytest.raises(ModelError, match="compiled whole"):
            regraft.stochastic_passes(torch.compile(model), 2, x, strategy=strategy, fork="1")
    model[1].compile(backend="aot_eager")
    with pytest.raises(ModelError, match="lies in a compiled part"):
        regraft.stochastic_passes(model, 2, x, fork="1")


@pytest.mark.parametrize("strategy", ["auto", "shared", "loop"])
def test_blocks_that_are_compiled_in_place(strategy):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)]).train()
    for block in model:
        block.compile(backend="aot_eager")
    passes = regraft.stochastic_passes(model, 2, torch.randn(4, 6), strategy=strategy)
    assert not torch.equal(passes[0], passes[1])
    passes.sum().backward()
    assert model[0][0].weight.grad.isfinite().all()

"""Promise 7: gradient checkpointing of both kinds. The recomputed mask is the first one's."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import ModelError

KINDS = {"reentrant": True, "not reentrant": False}
kinds = pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
RULES = [
    {"Dropout": "gaussian"},
    {"Dropout": "multisample", "Linear": "dropconnect(p=0.2)"},
    {"Dropout": "dropout(p=0.3)"},
]


def gradients(run, model, seed=5):
    model.zero_grad()
    torch.manual_seed(seed)
    run().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_equal_gradients(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


BLOCKS = {
    "module": lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16)),
    "calls": lambda: tiny.Calls(nn.Linear(16, 16)),
    "attention": tiny.Attention,
    "torch's layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.3, batch_first=True),
}


@kinds
@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_checkpointed_block_recomputes_the_same_masks(build, rules, reentrant):
    """Trap 11: an outer mode raises under one kind and is silently lost under the other."""
    block = build()
    x = torch.randn(3, 4, 16, requires_grad=True)
    rules = {key: value for key, value in rules.items() if key == "Dropout" or hasattr(block, "0")}
    report = regraft.apply(block, rules, x.detach())
    assert report.grafted
    plain = gradients(lambda: block(x).square().sum(), block)
    kept = gradients(lambda: checkpoint(block, x, use_reentrant=reentrant).square().sum(), block)
    assert_equal_gradients(plain, kept)
    other = gradients(lambda: block(x).square().sum(), block, seed=6)
    assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@kinds
@pytest.mark.parametrize(
    "build",
    [lambda: tiny.bert(), tiny.llama, lambda: tiny.bert(attention="eager")],
    ids=["bert", "llama", "bert-eager"],
)
def test_hugging_faces_checkpointing(build, reentrant):
    model = build()
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)"})
    batch = tiny.tokens()

    def run():
        return model(**batch).logits.square().sum()

    if reentrant:
        model.enable_input_require_grads()
    plain = gradients(run, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_equal_gradients(plain, gradients(run, model))


@kinds
def test_timms_checkpointing(reentrant):
    model = tiny.vit()
    regraft.apply(model, {"Dropout": "multisample(p=0.3)"})

    def run():
        return model(tiny.images()).square().sum()

    plain = gradients(run, model)
    model.set_grad_checkpointing()
    assert_equal_gradients(plain, gradients(run, model))


class OwnMethod(nn.Module):
    """Checkpoints a method of its own, in which it drops: it would recompute without the graft."""

    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(16, 16), reentrant

    def inside(self, x):
        return F.dropout(self.linear(x), 0.5, self.training)

    def forward(self, x):
        if self.training:
            return checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.inside(x)


@kinds
def test_an_owner_that_checkpoints_its_own_method_is_right(reentrant):
    model = OwnMethod(reentrant)
    x = torch.randn(3, 16, requires_grad=True)
    report = regraft.apply(model, {"Dropout": "gaussian"}, x.detach())
    assert "inside" in report.grafted[0].methods
    kept = gradients(lambda: model(x).square().sum(), model)
    assert_equal_gradients(gradients(lambda: model.inside(x).square().sum(), model), kept)


class OwnClosure(OwnMethod):
    def forward(self, x):
        def inside(x):
            return F.dropout(self.linear(x), 0.5, self.training)

        return checkpoint(inside, x, use_reentrant=self.reentrant) if self.training else inside(x)


class OwnPartial(OwnMethod):
    def forward(self, x):
        run = functools.partial(F.dropout, p=0.5, training=self.training)
        return checkpoint(run, self.linear(x), use_reentrant=self.reentrant)


@kinds
@pytest.mark.parametrize("build", [OwnClosure, OwnPartial])
def test_an_owner_that_checkpoints_a_function_raises_and_does_not_give_wrong_gradients(build, reentrant):
    model = build(reentrant)
    x = torch.randn(3, 16, requires_grad=True)
    regraft.apply(model, {"Dropout": "gaussian"}, x.detach())
    with pytest.raises(
        ModelError, match="checkpoints a function of its own that calls dropout[\\s\\S]*help: "
    ):
        model(x).sum().backward()
    model.eval()
    model(x).sum().backward()
    model.train()
    regraft.revert(model)
    model(x).sum().backward()


@pytest.mark.parametrize("build", [OwnClosure, OwnMethod])
def test_without_gradients_nothing_is_recomputed_and_nothing_raises(build):
    model = build(False)
    x = torch.randn(3, 16)
    regraft.apply(model, {"Dropout": "gaussian"}, x)
    with torch.no_grad():
        assert model(x).isfinite().all()

"""`fork=`: what is drawn in front of a module is common to all passes, what is drawn behind it is each pass's own."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import ModelError, NoMatchError, RateError
from regraft.training.passes.fork import fork_path
from tests.training.models import bert, tokens, vit

WAYS = [("shared", None), ("shared", 2), ("loop", None), ("auto", None), ("auto", 1)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Blocks(nn.Module):
    """Keeps what it computes, so that a test can read its masks."""

    def __init__(self, p=0.5):
        super().__init__()
        self.stem, self.p = nn.Linear(6, 6), p
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(p)) for _ in range(3)])
        self.head = nn.Linear(6, 2)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = first = F.dropout(self.stem(x), self.p, self.training)
        states = [first]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        last = F.dropout(x, self.p, self.training)
        return {"states": states, "last": last, "outputs": self.head(last)}


def passes_of(model, x, way, n=4, fork="blocks.2"):
    strategy, chunk = way
    return regraft.stochastic_passes(model, n, x, strategy=strategy, chunk=chunk, fork=fork)


@pytest.mark.parametrize("way", WAYS)
def test_draws_are_common_up_to_the_fork_and_independent_behind_it(way):
    model, x = Blocks().train(), torch.randn(5, 6)
    passes = passes_of(model, x, way)
    for common in passes["states"][:3]:
        assert all(torch.equal(one, common[0]) for one in common)
    for own in (passes["states"][3], passes["last"]):
        assert len({tuple((one != 0).flatten().tolist()) for one in own}) == 4
    again = passes_of(model, x, way)
    assert not torch.equal(again["states"][0], passes["states"][0])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_common_part_are_those_of_all_passes(way):
    model, x = Blocks().double().train(), torch.randn(5, 6, dtype=torch.float64)
    weights = torch.randn(4, 5, 2, dtype=torch.float64)
    passes = passes_of(model, x, way)
    (passes["outputs"] * weights).sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    masks = [2.0 * (one != 0) for one in (*passes["states"], passes["last"])]
    outputs = []
    for i in range(4):
        state = model.stem(x) * masks[0][i]
        for block, mask in zip(model.blocks, masks[1:4], strict=True):
            state = block[0](state) * mask[i]
        outputs.append(model.head(state * (passes["last"][i] != 0) * 2))
    torch.testing.assert_close(passes["outputs"], torch.stack(outputs))
    (torch.stack(outputs) * weights).sum().backward()
    for one, expected in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("strategy", ["shared", "loop", "auto"])
def test_noise_behind_the_fork_is_distributed_as_ever(strategy):
    model, x = Blocks().train(), torch.randn(1, 6)
    n = 2000
    kept = (passes_of(model, x, (strategy, None), n)["last"] != 0).double().mean(0)
    # Two dropouts at a half: 4 standard errors of a mean of n.
    alive = kept[kept > 0]
    assert ((alive - 0.25).abs() < 4 * (0.25 * 0.75 / n) ** 0.5).all()


@pytest.mark.parametrize("strategy", ["shared", "loop", "auto"])
def test_real_models(strategy):
    model = bert().train()
    hidden = regraft.stochastic_passes(
        model,
        3,
        input_ids=tokens(),
        output_hidden_states=True,
        strategy=strategy,
        fork="bert.encoder.layer.1",
    ).hidden_states
    assert torch.equal(hidden[1][0], hidden[1][1])
    assert not torch.equal(hidden[2][0], hidden[2][1])
    model = vit(proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3).train()
    passes = regraft.stochastic_passes(model, 2, torch.randn(3, 3, 32, 32), strategy=strategy, fork=0.5)
    assert not torch.equal(passes[0], passes[1])


class InFront(nn.Module):
    """Checkpoints its blocks, those in front of `until`, with dropout in them."""

    def __init__(self, until, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)])
        self.until, self.reentrant = until, reentrant

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i < self.until and self.reentrant is not None:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x


def _gradients(model, x, strategy):
    torch.manual_seed(5)
    model.zero_grad()
    passes = regraft.stochastic_passes(model, 3, x, strategy=strategy, fork="blocks.2")
    passes.square().sum().backward()
    return [passes.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("strategy", ["shared", "loop", "auto"])
def test_what_is_checkpointed_in_front_of_the_fork(strategy, reentrant):
    model, x = InFront(2).train(), torch.randn(4, 6, requires_grad=True)
    expected = _gradients(model, x, strategy)
    model.reentrant = reentrant
    for found, wanted in zip(_gradients(model, x, strategy), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("strategy", ["shared", "loop", "auto"])
def test_a_fork_that_is_recomputed_is_refused(strategy, reentrant):
    model = InFront(3, reentrant).train()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        _gradients(model, torch.randn(4, 6, requires_grad=True), strategy)


def test_generators_of_python_are_replayed_too():
    class Choosing(Blocks):
        def forward(self, x):
            return {**super().forward(x * random.random()), "x": x}

    model = Choosing().train()
    states = passes_of(model, torch.randn(2, 6), ("auto", None))["states"]
    assert torch.equal(states[0][0], states[0][1])
    assert not torch.equal(states[3][0], states[3][1])


def test_grafts_around_the_fork_and_in_front_of_it_act():
    model, x = Blocks().train(), torch.randn(5, 6)
    regraft.apply(model, {"Dropout": "gaussian"}, inputs=x)
    passes = passes_of(model, x, ("shared", None))
    assert passes["last"].ne(0).all()
    assert torch.equal(passes["states"][2][0], passes["states"][2][3])
    assert not torch.equal(passes["states"][3][0], passes["states"][3][3])
    assert not torch.equal(passes["last"][0], passes["last"][1])


@pytest.mark.parametrize(("fraction", "block"), [(0.34, 1), (0.67, 2), (0.99, 2), (0.01, 1)])
def test_a_fraction_is_of_the_blocks(fraction, block):
    assert fork_path(Blocks(), fraction) == f"blocks.{block}"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.layer(self.drop(self.layer(x))))


@pytest.mark.parametrize(
    ("model", "fork", "error", "message"),
    [
        (Blocks(), "block.2", NoMatchError, "names no module of Blocks(?s:.*)blocks.2"),
        (Blocks(), "unused", ModelError, "is not called by the forward"),
        (Blocks(), 1.5, RateError, "is not a fraction of the blocks"),
        (Twice(), 0.5, NoMatchError, "has no single list of them"),
        (Twice(), "layer", ModelError, "is called 2 times"),
        (
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)),
            "2",
            ModelError,
            "no draw behind it",
        ),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "shared", "loop"])
def test_forks_that_cannot_be(model, fork, error, message, strategy):
    with pytest.raises(error, match=message):
        regraft.stochastic_passes(model.train(), 2, torch.randn(4, 6), strategy=strategy, fork=fork)


def test_the_repeated_batch_is_refused():
    with pytest.raises(ModelError, match="its passes part at the inputs"):
        regraft.stochastic_passes(Blocks(), 2, torch.randn(4, 6), strategy="batch", fork="blocks.1")

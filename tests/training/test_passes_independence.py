"""The batch is repeated only where its rows were shown not to see one another."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import ModelError
from regraft.training.passes.analyze import Inputs, analysis_of
from tests.training.models import bert, images, tokens, vit

BATCH = 12


def why_no_batch(model, *args, **kwargs):
    options = {name: kwargs.pop(name) for name in ("unbatched",) if name in kwargs}
    inputs = Inputs((args, kwargs), **options)
    return analysis_of(model, inputs).why_no_batch(model, model, inputs)


class Sequence(nn.Module):
    """Word language models and their like, whose first axis is time."""

    def __init__(self, layer):
        super().__init__()
        self.embedding, self.layer, self.drop = nn.Embedding(50, 16), layer, nn.Dropout(0.2)

    def forward(self, ids):
        x = self.drop(self.embedding(ids))
        return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]


class CausalAttention(Sequence):
    def __init__(self):
        super().__init__(nn.MultiheadAttention(16, 2, dropout=0.1))

    def forward(self, ids):
        x, mask = self.embedding(ids), torch.ones(len(ids), len(ids)).triu(1).bool()
        return self.layer(x, x, x, attn_mask=mask)[0]


class Contrast(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.linear, self.mix = nn.Linear(8, 8), mix

    def forward(self, x):
        return self.mix(F.dropout(self.linear(x), 0.1))


class Graph(nn.Module):
    """A layer of message passing: `edges` (2, E) says who is whose neighbour."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, edges):
        messages = F.dropout(self.linear(x), 0.1)[edges[0]]
        return torch.zeros_like(x).index_add(0, edges[1], messages)


IDS, ROWS = torch.randint(0, 50, (20, 8)), torch.randn(BATCH, 8)
MIXING = {
    "time-first LSTM": (Sequence(nn.LSTM(16, 16)), IDS),
    "time-first GRU of two layers": (Sequence(nn.GRU(16, 16, 2, dropout=0.5)), IDS),
    "time-first bidirectional LSTM": (Sequence(nn.LSTM(16, 16, bidirectional=True)), IDS),
    "attention over axis 0": (Sequence(nn.MultiheadAttention(16, 2)), IDS),
    "causal attention over axis 0": (CausalAttention(), IDS),
    "contrastive softmax": (Contrast(lambda x: (x @ x.T).softmax(-1) @ x), ROWS),
    "mean over the batch": (Contrast(lambda x: x - x.mean(0)), ROWS),
    "BatchNorm in training": (nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(8)), ROWS),
}


@pytest.mark.parametrize("name", MIXING)
def test_axes_whose_entries_see_one_another_are_looped(name):
    model, x = MIXING[name]
    # Attention over the axis draws its square, which is noticed first.
    with pytest.raises(ModelError, match="see one another|draws once for the whole batch"):
        regraft.stochastic_passes(model.train(), 2, x, strategy="batch")
    torch.manual_seed(0)
    passes = regraft.stochastic_passes(model, 2, x)
    assert not torch.equal(passes[0], passes[1])


def test_nodes_of_a_graph_are_looped():
    model, edges = Graph(), torch.randint(0, BATCH, (2, 40))
    for kwargs in ({"edges": edges}, {"edges": edges, "unbatched": ("edges",)}):
        with pytest.raises(ModelError, match="see one another|some of its rows alone fail"):
            regraft.stochastic_passes(model, 2, ROWS, strategy="batch", **kwargs)


class Scored(nn.Module):
    """Compares each row with its own `seen`, over again where there are more."""

    def forward(self, x, seen):
        return F.dropout(x, 0.5) - seen[torch.arange(len(x)) % len(seen)]


def test_a_wrong_unbatched_is_refused():
    class Weighted(nn.Module):
        def forward(self, x, weights):
            return F.dropout(x, 0.5) * weights[: len(x), None]

    model, weights = Weighted(), torch.arange(1.0, BATCH + 1)
    assert why_no_batch(model, ROWS, weights=weights) is None
    assert "broadcast" in why_no_batch(model, ROWS, weights=weights, unbatched=("weights",))
    model = Scored()
    assert why_no_batch(model, ROWS, seen=ROWS) is None
    assert "see one another" in why_no_batch(
        model, ROWS.repeat(2, 1), seen=ROWS.repeat(2, 1), unbatched=("seen",)
    )


INDEPENDENT = {
    "linear": (nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)), (ROWS,), {}),
    "BatchNorm in eval": (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8).eval()), (ROWS,), {}),
    "bert": (bert(), (), {"input_ids": tokens(), "attention_mask": tokens() > 20}),
    "vit": (vit(proj_drop_rate=0.2, drop_path_rate=0.2), (images(),), {}),
    "position ids": (bert(), (), {"input_ids": tokens(), "position_ids": torch.arange(8)[None]}),
    "encoder": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (torch.randn(4, 5, 16),), {}),
    "half": (nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)).bfloat16(), (ROWS.bfloat16(),), {}),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_rows_are_shown_to_be(name):
    model, args, kwargs = INDEPENDENT[name]
    assert why_no_batch(model.train() if "eval" not in name else model, *args, **kwargs) is None


@pytest.mark.parametrize("variant", ["gaussian", "multisample", "spatial"])
def test_grafts_are_held_still(variant):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    regraft.apply(model, {"Dropout": variant})
    assert why_no_batch(model, torch.randn(4, 3, 8)) is None


@pytest.mark.parametrize("x", [ROWS[:1], ROWS[:1].expand(5, 8)], ids=["a batch of one", "equal rows"])
def test_what_cannot_be_shown_is_looped_until_it_can(x):
    model = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)).train()
    with pytest.raises(ModelError, match="cannot be shown"):
        regraft.stochastic_passes(model, 2, x, strategy="batch")
    assert regraft.stochastic_passes(model, 2, ROWS, strategy="batch").shape == (2, BATCH, 3)
    assert regraft.stochastic_passes(model, 2, x).shape == (2, len(x), 3)


def test_the_proof_leaves_no_trace_and_is_made_once():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Dropout(0.5)).train()
    model[0].eval()
    model.register_forward_pre_hook(lambda *call: rows.append(len(call[1][0])))
    rows = []
    torch.manual_seed(3)
    state = torch.get_rng_state()
    inputs = Inputs(((ROWS,), {}))
    analysis_of(model, inputs)
    rows.clear()
    assert analysis_of(model, inputs).why_no_batch(model, model, inputs) is None
    assert rows == [BATCH, 2 * BATCH, 2, 6]  # the first two on fake tensors
    assert torch.equal(torch.get_rng_state(), state)
    rows.clear()
    assert analysis_of(model, inputs).why_no_batch(model, model, inputs) is None
    assert not rows
    assert model[0].num_batches_tracked == 0


def test_compiled_models_are_not_compiled_for_it():
    model = torch.compile(nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)), backend="aot_eager")
    passes = regraft.stochastic_passes(model, 2, ROWS, strategy="batch")
    assert passes.shape == (2, BATCH, 3)
    assert not torch.equal(passes[0], passes[1])

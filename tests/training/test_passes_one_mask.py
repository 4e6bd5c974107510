"""`one_mask=True`: within a pass every row of the batch has the noise that one of them would draw alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import ModelError
from tests.training.models import bert, images, tokens, vit
from tests.training.test_passes_apart import Experts


class Grid(nn.Module):
    """Attention, channels and weights that drop."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.rnn = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = F.dropout2d(self.conv(x), 0.4, self.training).flatten(2).mT
        return self.head(self.rnn(self.layer(x))[0].mean(1))


def routed():
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), Experts(0.5))


MODELS = {
    "bert": (bert, "input_ids", tokens()),
    "vit": (lambda: vit(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3), "x", images()),
    "grid": (Grid, "x", images(3, 8)),
    "rows that vmap cannot run": (routed, "input", torch.randn(5, 6)),
}


def by_hand(model, name, x, n):
    """Each row alone, all rows of a pass from one random state."""
    passes = []
    for _ in range(n):
        state, rows = torch.get_rng_state(), []
        for row in x.split(1):
            torch.set_rng_state(state)
            outputs = model(**{name: row})
            rows.append(outputs if isinstance(outputs, torch.Tensor) else outputs.logits)
        passes.append(torch.cat(rows))
    return torch.stack(passes)


@pytest.mark.parametrize("graft", [None, {"Dropout": "gaussian"}], ids=["plain", "grafted"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_a_loop_over_rows_by_hand(name, graft):
    build, key, x = MODELS[name]
    torch.manual_seed(0)
    model = build().train()
    if graft:
        regraft.apply(model, graft, inputs={key: x})
    torch.manual_seed(3)
    expected = by_hand(model, key, x, 3)
    expected.square().sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    passes = regraft.stochastic_passes(model, 3, one_mask=True, **{key: x})
    passes = passes if isinstance(passes, torch.Tensor) else passes.logits
    torch.testing.assert_close(passes, expected, rtol=1e-4, atol=1e-5)
    passes.square().sum().backward()
    for found, one in zip((p.grad for p in model.parameters()), wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-4)
    assert not torch.equal(passes[0], passes[1])


def test_masks_of_rows_are_equal_and_of_passes_are_not():
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity()).eval()
    x = torch.rand(6, 40) + 1
    kept = regraft.mc_predict(model, 200, x, task="regression", one_mask=True, samples=True).samples != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert len({tuple(one.flatten().tolist()) for one in kept[:, 0]}) == 200
    assert abs(kept[:, 0].double().mean() - 0.5) < 4 * (0.25 / 8000) ** 0.5
    alone = regraft.mc_predict(model, 2, x[:1], task="regression", one_mask=True)
    assert alone.mean.shape == (1, 40)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5)), {}, "see one another"),
        (nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), {"fork": "1"}, "not from a fork"),
        (nn.Dropout(0.5), {"strategy": "shared"}, "one after the other"),
        (nn.Dropout(0.5), {"strategy": "batch"}, "one after the other"),
    ],
)
def test_what_it_refuses(model, options, message):
    x = torch.randn(7, 5, 6)
    with pytest.raises(ModelError, match=message):
        regraft.stochastic_passes(model, 2, x, one_mask=True, **options)

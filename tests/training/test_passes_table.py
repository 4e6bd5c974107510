"""Models of programs that others wrote, under every strategy and every kind of checkpointing.

Each combination gives the loop's numbers or refuses: at rate 0 the plain forward and its gradients, exactly; with
noise the same means, spreads and mean gradients, and passes that do not depend on one another.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import RegraftError
from tests.training.models import bert, images, tokens, vit

ROWS, WIDTH, RATE = 6, 8, 0.3
KINDS = {"off": None, "reentrant": True, "not reentrant": False}


class Program(nn.Module):
    """Its block is checkpointed where `kind` says so."""

    def __init__(self, rate, kind):
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.drop, self.kind = nn.Dropout(rate), kind

    def run(self, function, *args):
        return function(*args) if self.kind is None else checkpoint(function, *args, use_reentrant=self.kind)

    def middle(self, x):
        return self.drop(self.block(x).tanh())

    def forward(self, x):
        return self.last(self.run(self.middle, self.drop(self.first(x))))


class WordModel(Program):
    """As pytorch/examples has it: time is the first axis."""

    def __init__(self, rate, kind):
        super().__init__(rate, kind)
        self.embedding, self.block = nn.Embedding(50, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, dropout=rate)

    def middle(self, x):
        return self.drop(self.block(x)[0])

    def forward(self, x):
        return super().forward(self.embedding(x))


class Attending(Program):
    def __init__(self, rate, kind):
        super().__init__(rate, kind)
        self.block = nn.MultiheadAttention(WIDTH, 2, dropout=rate)

    def middle(self, x):
        return self.drop(self.block(x, x, x)[0])


def neighbours(x, edges):
    return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])


class Sage(Program):
    def middle(self, x, edges):
        count = neighbours(torch.ones_like(x), edges).clamp(min=1)
        return self.drop((self.block(x) + neighbours(x, edges) / count).relu())

    def forward(self, x, edges):
        return self.last(self.run(self.middle, self.drop(self.first(x)), edges))


class Gin(Sage):
    def middle(self, x, edges):
        return self.drop(self.block(1.1 * x + neighbours(x, edges)).relu())


class Gat(Sage):
    def middle(self, x, edges):
        x = self.block(x)
        score = F.leaky_relu((x[edges[0]] + x[edges[1]]).sum(1)).exp()
        total = torch.zeros(len(x), dtype=x.dtype).index_add(0, edges[1], score) + 1e-9
        weight = self.drop(score / total[edges[1]])
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * weight[:, None])


class Contrast(Program):
    def middle(self, x):
        return (x @ x.T).softmax(-1) @ super().middle(x)


class Normed(Program):
    def __init__(self, rate, kind):
        super().__init__(rate, kind)
        self.norm = nn.BatchNorm1d(WIDTH)

    def middle(self, x):
        return self.norm(super().middle(x))


class LayerDropped(Program):
    def middle(self, x):
        if self.training and torch.rand([]) < self.drop.p:
            return x
        return super().middle(x)


class Routed(Program):
    def middle(self, x):
        total = torch.zeros_like(x)
        for i in range(2):
            rows = torch.nonzero((x.sum(-1) > 0) == bool(i)).squeeze(-1)
            total = total.index_add(0, rows, self.drop((1 + i) * self.block(x[rows])))
        return total


class Detector(Program):
    """Takes a list of images and gives what it finds in each, as torchvision's do."""

    def forward(self, images):
        return [super(Detector, self).forward(image) for image in images]


class UNet(Program):
    def __init__(self, rate, kind):
        super().__init__(rate, kind)
        self.first, self.block = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.drop = nn.Conv2d(8, 2, 1), nn.Dropout2d(rate)

    def middle(self, x):
        return F.interpolate(self.drop(self.block(F.max_pool2d(x, 2)).tanh()), scale_factor=2)

    def forward(self, x):
        x = self.drop(self.first(x))
        return self.last(torch.cat([x, self.run(self.middle, x)], 1))


def hugging_bert(rate, kind):
    return _checkpointed(bert(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate), kind)


def gpt(rate, kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 1}
    rates = {"resid_pdrop": rate, "embd_pdrop": rate, "attn_pdrop": rate}
    return _checkpointed(GPT2LMHeadModel(GPT2Config(**sizes, **rates)), kind)


def _checkpointed(model, kind):
    if kind is not None:
        model.activation_checkpointing_enable({"use_reentrant": kind})
    return model


def timm_vit(rate, kind):
    model = vit(proj_drop_rate=rate, attn_drop_rate=rate, drop_path_rate=rate)
    if kind is not None:
        model.forward_features = functools.partial(_features, model, kind)
    return model


def _features(model, kind, x, **_):
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=kind)
    return model.norm(x)


def rows(*shape):
    return torch.randn(
        shape or (ROWS, WIDTH), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 5], [1, 2, 3, 4, 5, 0, 3, 5, 1]])
PROGRAMS = {
    "time-first LSTM": (WordModel, {"x": torch.arange(ROWS * 4).view(ROWS, 4) * 7 % 50}),
    "attention over axis 0": (Attending, {"x": rows()}),
    "SAGE": (Sage, {"x": rows(), "edges": EDGES}),
    "GAT": (Gat, {"x": rows(), "edges": EDGES}),
    "GIN": (Gin, {"x": rows(), "edges": EDGES}),
    "contrastive softmax": (Contrast, {"x": rows()}),
    "BatchNorm": (Normed, {"x": rows()}),
    "LayerDrop": (LayerDropped, {"x": rows()}),
    "MoE": (Routed, {"x": rows()}),
    "detection": (Detector, {"images": [rows(4, WIDTH), rows(5, WIDTH)]}),
    "U-Net": (UNet, {"x": rows(4, 3, 8, 8)}),
    "BERT": (hugging_bert, {"input_ids": tokens(3, 5)}),
    "GPT": (gpt, {"input_ids": tokens(3, 5)}),
    "ViT": (timm_vit, {"x": images(3).double()}),
}
QUICK = ("time-first LSTM", "SAGE", "BatchNorm", "MoE", "U-Net", "BERT")


def built(name, rate, kind):
    torch.manual_seed(0)
    return PROGRAMS[name][0](rate, KINDS[kind]).double().train(), PROGRAMS[name][1]


def passes_of(model, inputs, strategy, n):
    """All outputs of n passes as one matrix, a row for each pass."""
    outputs = regraft.stochastic_passes(model, n, strategy=strategy, **inputs)
    outputs = outputs.logits if hasattr(outputs, "logits") else outputs
    tensors = outputs if isinstance(outputs, list) else [outputs]
    return torch.cat([one.flatten(1) for one in tensors], 1)


def gradients(model, passes):
    model.zero_grad()
    weights = torch.linspace(-1, 1, passes.shape[1], dtype=passes.dtype)
    (passes.tanh() * weights).mean(0).sum().backward()
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )


def agree(one, other, bound):
    """Means of two samples, a row for each draw, to `bound` standard errors in every column."""
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return bool(((one.mean(0) - other.mean(0)).abs() <= bound * error + 1e-9).all())


@functools.cache
def of_the_loop(name):
    model, inputs = built(name, RATE, "off")
    with torch.no_grad():
        sample = passes_of(model, inputs, "loop", 400)
    return sample, torch.stack([gradients(model, passes_of(model, inputs, "loop", 4)) for _ in range(24)])


def check(name, strategy, kind):
    """Whether it ran; False where it refused."""
    model, inputs = built(name, 0.0, kind)
    plain, _ = built(name, 0.0, "off")
    expected = passes_of(plain, inputs, "loop", 3)
    try:
        passes = passes_of(model, inputs, strategy, 3)
    except RegraftError:
        assert strategy in ("shared", "batch")
    else:
        torch.testing.assert_close(passes, expected)
        torch.testing.assert_close(gradients(model, passes), gradients(plain, expected))
    model, inputs = built(name, RATE, kind)
    try:
        gradient = torch.stack([gradients(model, passes_of(model, inputs, strategy, 4)) for _ in range(24)])
        with torch.no_grad():
            sample = passes_of(model, inputs, strategy, 400)
    except RegraftError:
        assert strategy in ("shared", "batch")
        return False
    wanted, wanted_gradient = of_the_loop(name)
    assert agree(sample, wanted, 5)
    assert agree((sample - sample.mean(0)).square(), (wanted - wanted.mean(0)).square(), 5)
    assert agree(gradient, wanted_gradient, 7)  # 24 draws: a wider tail
    # Neighbouring passes have nothing to do with one another.
    centred = (sample - sample.mean(0)) / sample.std(0).clamp(min=1e-12)
    assert ((centred[1:] * centred[:-1]).mean(0).abs() < 6 / 400**0.5).all()
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["shared", "batch", "auto"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
def test_every_strategy_gives_the_loop_s_numbers_or_refuses(name, strategy, kind):
    ran = check(name, strategy, kind)
    assert ran or strategy != "auto"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_loop_under_checkpointing(name):
    assert check(name, "loop", "reentrant")
    assert check(name, "loop", "not reentrant")

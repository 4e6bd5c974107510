"""Models of public programs, built by hand in the way that those programs write them.

Each is a factory of a model and its inputs, with what a training forward of it draws: the number of draws at
sites, of named randomness, and unrecognized.
"""

from __future__ import annotations

import math
import random
import types

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class CausalSelfAttention(nn.Module):
    """nanoGPT's: fused attention takes the rate as a float; minGPT's: a module on the scores."""

    def __init__(self, width, heads, dropout, flash):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.dropout, self.flash = heads, dropout, flash
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (a.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for a in (q, k, v))
        if self.flash:
            rate = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=rate, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))


class Block(nn.Module):
    def __init__(self, width, heads, dropout, flash):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, dropout, flash)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width),
                "c_proj": nn.Linear(4 * width, width),
                "dropout": nn.Dropout(dropout),
            }
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        mlp = self.mlp
        return x + mlp["dropout"](mlp["c_proj"](F.gelu(mlp["c_fc"](self.ln_2(x)))))


class GPT(nn.Module):
    """nanoGPT and minGPT: tied embeddings, a module dictionary, a loss where there are targets."""

    def __init__(self, flash, dropout=0.1, layers=2):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(50, WIDTH),
                "wpe": nn.Embedding(64, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(Block(WIDTH, 2, dropout, flash) for _ in range(layers)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, 50, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in t.h:
            x = block(x)
        logits = self.lm_head(t.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, 50), targets.view(-1))
        return logits, loss


class LockedDropout(nn.Module):
    """AWD-LSTM's: one mask for all steps; the rate comes with the call."""

    def forward(self, x, dropout=0.5):
        if not self.training or not dropout:
            return x
        m = x.data.new(1, x.size(1), x.size(2)).bernoulli_(1 - dropout)
        mask = m / (1 - dropout)
        return mask.expand_as(x) * x


def embedded_dropout(embed, words, dropout=0.1, scale=None):
    """AWD-LSTM's: whole words are dropped from the embedding's weight."""
    if dropout:
        mask = embed.weight.data.new().resize_((embed.weight.size(0), 1)).bernoulli_(1 - dropout)
        masked = mask.expand_as(embed.weight) / (1 - dropout) * embed.weight
    else:
        masked = embed.weight
    return F.embedding(words, masked, -1 if embed.padding_idx is None else embed.padding_idx)


class AWDLSTM(nn.Module):
    def __init__(self, dropout=0.4, dropouth=0.3, dropouti=0.65, dropoute=0.1):
        super().__init__()
        self.lockdrop, self.drop = LockedDropout(), nn.Dropout(dropout)
        self.encoder = nn.Embedding(50, WIDTH)
        self.rnns = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, 1, dropout=0) for _ in range(3))
        self.decoder = nn.Linear(WIDTH, 50)
        self.dropout, self.dropouth, self.dropouti, self.dropoute = dropout, dropouth, dropouti, dropoute

    def forward(self, tokens):
        x = embedded_dropout(self.encoder, tokens, dropout=self.dropoute if self.training else 0)
        x = self.lockdrop(x, self.dropouti)
        for layer, rnn in enumerate(self.rnns):
            x, _ = rnn(x)
            if layer != len(self.rnns) - 1:
                x = self.lockdrop(x, self.dropouth)
        x = self.lockdrop(x, self.dropout)
        return self.decoder(x.view(-1, WIDTH))


class WordLanguageModel(nn.Module):
    """pytorch/examples: time first, dropout between layers, one dropout module called twice."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(50, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, 2, dropout=dropout)
        self.decoder = nn.Linear(WIDTH, 50)

    def forward(self, tokens, hidden=None):
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, 50)
        return F.log_softmax(decoded, dim=1), hidden


class GCNConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin, self.bias = nn.Linear(inputs, outputs, bias=False), nn.Parameter(torch.zeros(outputs))

    def forward(self, x, edge_index):
        row, col = edge_index
        degree = torch.zeros(len(x)).scatter_add_(0, col, torch.ones(len(col))).clamp(min=1)
        x = self.lin(x)
        return torch.zeros_like(x).index_add_(0, col, x[row] / degree[col, None].sqrt()) + self.bias


class GCN(nn.Module):
    """The way of PyTorch Geometric's examples: F.dropout with the module's own flag."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = GCNConv(WIDTH, 8), GCNConv(8, 3)

    def forward(self, x, edge_index):
        x = F.dropout(x, p=0.5, training=self.training)
        x = F.relu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.5, training=self.training)
        return F.log_softmax(self.conv2(x, edge_index), dim=1)


def dropout_edge(edge_index, p, training):
    """PyTorch Geometric's: edges are left out, not numbers."""
    if not training or p == 0:
        return edge_index
    return edge_index[:, torch.rand(edge_index.size(1)) >= p]


class SAGE(nn.Module):
    """GraphSAGE with dropped edges: a data-dependent shape, so the probe runs it for real."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.dropout = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), 0.5

    def forward(self, x, edge_index):
        row, col = dropout_edge(edge_index, 0.2, self.training)
        mean = torch.zeros_like(x).index_add_(0, col, x[row])
        x = F.relu(self.left(x) + self.right(mean))
        return F.dropout(x, self.dropout, self.training)


class UNet(nn.Module):
    """Channel dropout in the bottleneck, in place on the way down."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout2d(0.1))
        self.bottom = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3))
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.bottom(F.max_pool2d(skip, 2))
        return self.head(torch.cat([self.up(F.dropout2d(x, 0.2, self.training)), skip], 1))


class Pooling(nn.Module):
    """Sentence Transformers: modules that hand on a dictionary of features."""

    def forward(self, features):
        mask = features["attention_mask"][..., None].float()
        features["sentence_embedding"] = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
        return features


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1)

    def forward(self, features):
        features["token_embeddings"] = self.layers(self.table(features["input_ids"]))
        return features


class FeatureDropout(nn.Module):
    """Sentence Transformers' `Dropout`: on one entry of the dictionary."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.dropout_layer = nn.Dropout(dropout)

    def forward(self, features):
        features["sentence_embedding"] = self.dropout_layer(features["sentence_embedding"])
        return features


class SentenceTransformer(nn.Sequential):
    def forward(self, input_ids, attention_mask):
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        return super().forward(features)["sentence_embedding"]


def patched():
    """TRL's way: a method put on the instance, above a value head with a dropout of its own."""
    model = GPT(flash=True)
    model.v_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(50, 1))
    inner = model.forward

    def forward(self, idx):
        logits, _ = inner(idx)
        return logits, self.v_head(logits)

    model.forward = types.MethodType(forward, model)
    return model


class MultiSampleDropout(nn.Module):
    """The source article's: the mean of several masks."""

    def __init__(self, dropout_rate, num_samples):
        super().__init__()
        self.dropout_rate, self.num_samples = dropout_rate, num_samples

    def forward(self, x):
        return torch.stack(
            [F.dropout(x, self.dropout_rate, training=self.training) for _ in range(self.num_samples)]
        ).mean(0)


class GaussianDropout(nn.Module):
    """The source article's: noise of a given spread, with no rate."""

    def __init__(self, sigma=0.1):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        return x + torch.randn_like(x) * self.sigma if self.training else x


class DropConnect(nn.Module):
    """The source article's: a mask on the weight, drawn in the forward."""

    def __init__(self, inputs, outputs, p=0.5):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(outputs, inputs)),
            nn.Parameter(torch.zeros(outputs)),
        )
        self.p = p

    def forward(self, x):
        if not self.training:
            return F.linear(x, self.weight * (1 - self.p), self.bias)
        mask = torch.bernoulli(torch.full_like(self.weight, 1 - self.p))
        return F.linear(x, self.weight * mask, self.bias)


class Standout(nn.Module):
    """The source article's: a gate decides how likely each unit is kept."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x):
        p = torch.sigmoid(self.gate(x))
        return x * torch.bernoulli(p) if self.training else x * p


class Article(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.noise = DropConnect(WIDTH, WIDTH), GaussianDropout(0.1)
        self.standout, self.drop = Standout(WIDTH), MultiSampleDropout(0.5, 5)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.drop(self.standout(self.noise(F.relu(self.first(x))))))


class LayerDrop(nn.Module):
    """fairseq's and wav2vec 2.0's: whole layers skipped by a number, spans masked by numpy."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop, self.layerdrop = nn.Dropout(0.1), 0.1
        self.config = types.SimpleNamespace(apply_spec_augment=True, mask_time_prob=0.05)

    def forward(self, x):
        if self.training:
            start = numpy.random.randint(0, x.size(1) - 1)
            x = torch.cat([x[:, :start], torch.zeros_like(x[:, start : start + 1]), x[:, start + 1 :]], 1)
        for layer in self.layers:
            if not self.training or torch.rand([]) > self.layerdrop:
                x = self.drop(layer(x))
        return x


class MadeByHand(nn.Module):
    """Everything at once that functions miss: native and aten calls, a helper method, parts in a list."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.parts = [nn.Dropout(0.1)]

    def _ff(self, x):
        return F.dropout(self.inner(x), 0.2, self.training)

    def forward(self, x):
        x = torch.native_dropout(x, 0.3, self.training)[0]
        x = torch.ops.aten.dropout(x, 0.4, self.training)
        x = self.parts[0](self._ff(x))
        return nn.Dropout(0.25)(x) if self.training else x


class Switch(nn.Module):
    """A mixture of experts whose router's input is jittered, and a coin of Python's own."""

    def __init__(self):
        super().__init__()
        self.router, self.jitter_noise = nn.Linear(WIDTH, 2), 0.01
        self.experts, self.drop = nn.Parameter(torch.randn(2, WIDTH, WIDTH)), nn.Dropout(0.1)

    def forward(self, x):
        routed = x
        if self.training:
            routed = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            random.random()
        weight = self.router(routed).softmax(-1)
        return self.drop(torch.einsum("btd,edf,bte->btf", x, self.experts, weight))


def _tokens(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).remainder(50).view(shape)


def _graph() -> tuple[Tensor, Tensor]:
    return torch.randn(6, WIDTH), torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])


def _sentences():
    return SentenceTransformer(Encoder(), Pooling(), FeatureDropout())


PROGRAMS = {
    # name: (model, inputs, draws at sites, named draws, unrecognized draws)
    "nanoGPT": (lambda: GPT(flash=True), lambda: (_tokens(2, 8),), 1 + 2 * 3, 0, 0),
    "minGPT": (lambda: GPT(flash=False), lambda: (_tokens(2, 8),), 1 + 2 * 3, 0, 0),
    "AWD-LSTM": (AWDLSTM, lambda: (_tokens(7, 2),), 0, 0, 1 + 4),
    "word language model": (WordLanguageModel, lambda: (_tokens(7, 2),), 3, 0, 0),
    "GCN": (GCN, _graph, 2, 0, 0),
    "GraphSAGE": (SAGE, _graph, 1, 0, 1),
    "U-Net": (UNet, lambda: (torch.randn(2, 1, 8, 8),), 3, 0, 0),
    "Sentence Transformers": (_sentences, lambda: (_tokens(2, 6), torch.ones(2, 6)), 4 + 1, 0, 0),
    "TRL": (patched, lambda: (_tokens(2, 8),), 1 + 2 * 3 + 1, 0, 0),
    "the article": (Article, lambda: (torch.randn(4, WIDTH),), 5, 0, 3),
    "LayerDrop": (LayerDrop, lambda: (torch.randn(2, 6, WIDTH),), 3, 4, 0),
    "made by hand": (MadeByHand, lambda: (torch.randn(2, WIDTH),), 5, 0, 0),
    "Switch": (Switch, lambda: (torch.randn(2, 4, WIDTH),), 1, 1, 1),
}

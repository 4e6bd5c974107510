"""What torch itself brings, and forms of dropout that no library model has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import RATE, Entry, Inputs

WIDTH = 16


def entries() -> Iterator[Entry]:
    """Every maker of this file."""
    for name, made in _MAKERS.items():
        yield Entry("torch", name, made)


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape)


class Attends(nn.Module):
    """`nn.MultiheadAttention` as people call it."""

    def __init__(
        self, attention: nn.MultiheadAttention, weights: bool, key: int = WIDTH, masked: bool = False
    ) -> None:
        super().__init__()
        self.attention, self.weights, self.key, self.masked = attention, weights, key, masked
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.key]
        batch = x.shape[0] if self.attention.batch_first else x.shape[1]
        length = x.shape[1] if self.attention.batch_first else x.shape[0]
        mask = torch.zeros(batch, length, dtype=torch.bool, device=x.device) if self.masked else None
        if mask is not None:
            mask[:, -1] = True
        found, _ = self.attention(x, other, other, key_padding_mask=mask, need_weights=self.weights)
        return self.head(found)


def _attention(
    weights: bool, masked: bool = False, key: int = WIDTH, first: bool = True
) -> tuple[nn.Module, Inputs]:
    made = nn.MultiheadAttention(WIDTH, 2, dropout=RATE, batch_first=first, kdim=key, vdim=key)
    return Attends(made, weights, key, masked), (_rows(2, 5, WIDTH),)


class Recurrent(nn.Module):
    """A recurrent network with dropout between its layers and a head."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, dropout=RATE, batch_first=True, **options)
        self.drop = nn.Dropout(RATE)
        found = self.rnn.proj_size or WIDTH
        self.head = nn.Linear(found * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(x)[0]))


class Packed(Recurrent):
    """The same on packed sequences."""

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
        found, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(self.drop(found))


class Functional(nn.Module):
    """Every functional form, in one forward, with rates in every place they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.rate = RATE

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.rate, self.training)
        x = F.dropout(self.inner(x), p=self.rate, training=self.training, inplace=True)
        x = torch.dropout(x, self.rate, self.training)
        x = torch.dropout_(x * 1.0, self.rate, self.training)
        x = nn.functional.dropout(x, training=self.training)
        return self.head(_scaled(x, self.rate if self.training else 0.0))


def _scaled(x: Tensor, rate: float) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, None, rate, True)


class Channels(nn.Module):
    """Dropout of whole channels, called and made as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.drop1, self.drop2, self.drop3 = nn.Dropout1d(RATE), nn.Dropout2d(RATE), nn.Dropout3d(RATE)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.drop2(self.conv(x)), RATE, self.training)
        x = self.drop1(x.flatten(2)).view_as(x)
        x = F.dropout3d(self.drop3(x[..., None]), RATE, self.training)
        return self.head(F.dropout1d(x.flatten(2), RATE, self.training).mean(-1))


class SelfNormalizing(nn.Module):
    """A SELU network with alpha dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.alpha, self.feature = nn.AlphaDropout(RATE), nn.FeatureAlphaDropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.feature(self.alpha(F.selu(self.one(x))))
        x = F.alpha_dropout(F.selu(self.two(x)), RATE, self.training)
        return self.head(F.feature_alpha_dropout(x, RATE, self.training))


class Aliased(nn.Module):
    """One dropout under two names, one called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Dropout(RATE)
        self.unused = nn.Dropout(RATE)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)] * 3)
        self.head = nn.Sequential(self.first, nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.second(layer(self.first(x)))
        return self.head(x)


class DeadTwin(nn.Module):
    """An `nn.Dropout` that only lends its rate, as in BERT's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.qkv, self.head = nn.Dropout(RATE), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        rate = self.dropout.p if self.training else 0.0
        return self.head(F.scaled_dot_product_attention(q, k, v, dropout_p=rate))


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(1 - p) / (1 - p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class StableDropout(nn.Module):
    """A private dropout behind an autograd function, as in DeBERTa."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return _Mask.apply(x, self.drop_prob) if self.training and self.drop_prob > 0 else x


class DropPath(nn.Module):
    """A private copy of stochastic depth."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand(x.shape[0], *[1] * (x.dim() - 1))).floor_()


class Private(nn.Module):
    """Private kinds, and stochastic depth written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.drop, self.drop_path, self.drop_rate = StableDropout(RATE), DropPath(RATE), RATE

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.drop(self.inner(x)))
        if self.training:
            keep = torch.rand(x.shape[0], 1, 1).ge_(self.drop_rate).div(1 - self.drop_rate)
            x = x + self.inner(x) * keep
        return self.head(x)


def _encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, RATE, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (_rows(2, 5, WIDTH),)


def _decoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, RATE, batch_first=True)
    return nn.TransformerDecoder(layer, 2), (_rows(2, 5, WIDTH), _rows(2, 4, WIDTH))


def _transformer() -> tuple[nn.Module, Inputs]:
    return nn.Transformer(WIDTH, 2, 2, 2, 32, RATE, batch_first=True), (
        _rows(2, 5, WIDTH),
        _rows(2, 4, WIDTH),
    )


def _one_layer(**options: object) -> tuple[nn.Module, Inputs]:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, RATE, **options), (_rows(2, 5, WIDTH),)


def _sequential() -> tuple[nn.Module, Inputs]:
    layers = (
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Dropout(RATE),
        nn.Dropout(RATE, inplace=True),
        nn.Linear(WIDTH, 2),
    )
    return nn.Sequential(*layers), (_rows(3, WIDTH),)


_MAKERS = {
    "Sequential": _sequential,
    "Transformer": _transformer,
    "TransformerEncoder": _encoder,
    "TransformerDecoder": _decoder,
    "TransformerEncoderLayer": lambda: _one_layer(batch_first=True),
    "TransformerEncoderLayer-norm_first": lambda: _one_layer(norm_first=True, activation="gelu"),
    "MultiheadAttention": lambda: _attention(False),
    "MultiheadAttention-weights": lambda: _attention(True),
    "MultiheadAttention-masked": lambda: _attention(False, masked=True),
    "MultiheadAttention-kdim": lambda: _attention(True, key=8),
    "MultiheadAttention-sequence-first": lambda: _attention(False, first=False),
    "LSTM": lambda: (Recurrent(nn.LSTM), (_rows(2, 5, WIDTH),)),
    "LSTM-bidirectional": lambda: (Recurrent(nn.LSTM, bidirectional=True), (_rows(2, 5, WIDTH),)),
    "LSTM-projected": lambda: (Recurrent(nn.LSTM, proj_size=WIDTH // 2), (_rows(2, 5, WIDTH),)),
    "GRU": lambda: (Recurrent(nn.GRU), (_rows(2, 5, WIDTH),)),
    "RNN": lambda: (Recurrent(nn.RNN), (_rows(2, 5, WIDTH),)),
    "GRU-packed": lambda: (Packed(nn.GRU), (_rows(2, 5, WIDTH),)),
    "functional": lambda: (Functional(), (_rows(2, 5, WIDTH),)),
    "channels": lambda: (Channels(), (_rows(2, 3, 6, 6),)),
    "alpha": lambda: (SelfNormalizing(), (_rows(3, WIDTH),)),
    "aliased": lambda: (Aliased(), (_rows(3, WIDTH),)),
    "dead-twin": lambda: (DeadTwin(), (_rows(2, 5, WIDTH),)),
    "private": lambda: (Private(), (_rows(2, 5, WIDTH),)),
}

"""Models that multiply by weights in every way that is not an `nn.Linear`'s own forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm


class ParentReads(nn.Module):
    """The parent multiplies by a child's weight, as BEiT, Swin and Mamba do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.step = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, -1)
        return (self.step.weight @ (q * k + v).transpose(-1, -2)).transpose(-1, -2)


class OwnForward(nn.Linear):
    """A subclass of Linear with a forward of its own, as FalconLinear and timm.layers.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Raw(nn.Module):
    """Parameters of two and three axes, as XLNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(6, 2, 3) / 3)
        self.o = nn.Parameter(torch.randn(6, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,dhe->bthe", x, self.q).flatten(2) @ self.o


class Experts(nn.Module):
    """A router, and experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 6, 5) / 3)
        self.down = nn.Parameter(torch.randn(4, 6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        share, chosen = self.gate(rows).softmax(-1).topk(2)
        hidden = torch.bmm(rows.expand(4, *rows.shape), self.up)
        out = torch.stack([F.linear(hidden[index], self.down[index]) for index in range(4)], 1)
        weight = torch.zeros(len(rows), 4).scatter(1, chosen, share)
        return (out * weight.unsqueeze(-1)).sum(1).view(x.shape)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.flip(-1))


class TiedAutoencoder(nn.Module):
    """Called and read: one draw must serve both."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).relu(), self.encode.weight.T)


class TiedWords(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.head = OwnForward(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.abs().long().sum(-1) % 7))


class ReadsTable(nn.Module):
    """The model itself multiplies by an embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embed(x.abs().long().sum(-1) % 7)
        return words @ self.embed.weight.T


class Attends(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurs(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: int) -> None:
        super().__init__()
        self.rnn = kind(6, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Learned(nn.Module):
    """A layer's input is itself learned: latents are no weight, and neither is a table that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, 6))
        self.table = nn.Parameter(torch.randn(9, 6))
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table[torch.arange(x.shape[-2])]
        return (x + places) @ self.out(self.latents).T


class Convolves(nn.Module):
    """A convolution of each kind, one of them read by its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(5, 4, 3, padding=1), nn.ConvTranspose1d(4, 5, 3, padding=1)
        self.image, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.down(x))
        return self.head(F.conv2d(x.unsqueeze(1), self.image.weight, padding=1).sum(1))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(OwnForward(6, 4)), nn.Linear(4, 4))


def hooked() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(weight_norm(OwnForward(6, 4)))


def pruned() -> nn.Module:
    layer = OwnForward(6, 4)
    prune.random_unstructured(layer, "weight", amount=0.3)
    return nn.Sequential(layer)


CASES = {
    # Builder -> the kind of each weight; "direct" where a linear layer's own forward multiplies.
    "parent": (ParentReads, {"qkv.weight": "Linear", "step.weight": "Linear"}),
    "subclass": (lambda: nn.Sequential(OwnForward(6, 4)), {"0.weight": "Linear"}),
    "raw": (Raw, {"q": "Linear", "o": "Linear"}),
    "experts": (Experts, {"gate.weight": "router direct", "up": "experts", "down": "experts"}),
    "bilinear": (Bilinear, {"pair.weight": "Bilinear"}),
    "tied autoencoder": (TiedAutoencoder, {"encode.weight": "Linear"}),
    "tied words": (TiedWords, {"embed.weight": "Linear"}),
    "attention": (
        Attends,
        {"attention.in_proj_weight": "in_proj", "attention.out_proj.weight": "out_proj"},
    ),
    "attention, other widths": (
        lambda: Attends(kdim=6, vdim=6),
        {"attention.in_proj_weight": "in_proj", "attention.out_proj.weight": "out_proj"},
    ),
    "lstm": (
        lambda: Recurs(nn.LSTM, num_layers=2, bidirectional=True),
        {
            f"rnn.weight_{side}_l{layer}{back}": "recurrent"
            for side in ("ih", "hh")
            for layer in (0, 1)
            for back in ("", "_reverse")
        },
    ),
    "projected lstm": (
        lambda: Recurs(nn.LSTM, proj_size=3),
        {f"rnn.weight_{side}_l0": "recurrent" for side in ("ih", "hh", "hr")},
    ),
    "convolutions": (
        Convolves,
        {
            "down.weight": "Conv1d",
            "up.weight": "ConvTranspose1d",
            "image.weight": "Conv2d",
            "head.weight": "Linear direct",
        },
    ),
    "gru": (lambda: Recurs(nn.GRU), {f"rnn.weight_{side}_l0": "recurrent" for side in ("ih", "hh")}),
    "parametrized": (parametrized, {"0.weight": "Linear", "1.weight": "Linear direct"}),
    "hooked": (hooked, {"0.weight": "Linear"}),
    "pruned": (pruned, {"0.weight": "Linear"}),
    "learned": (Learned, {"out.weight": "Linear direct"}),
}

"""Programs that hide their randomness, in the style of public code: what no name and no module walk tells."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Dropout(nn.Module):
    """Gaussian noise under the name of dropout, its rate in an attribute of the usual name."""

    def __init__(self, p: float = 0.2):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.randn_like(x) * self.p) if self.training else x


class GaussianNamed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), Dropout(0.2), nn.Linear(WIDTH, 2))


class StochasticDepth(nn.Module):
    """Whole blocks skipped by a number of Python's own, the deeper the likelier."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1)) for _ in range(depth)
        )
        self.survival = [1 - 0.5 * at / depth for at in range(1, depth + 1)]

    def forward(self, x: Tensor) -> Tensor:
        for block, survival in zip(self.blocks, self.survival, strict=True):
            if not self.training or random.random() < survival:
                x = x + block(x)
        return x


class CoinResidual(nn.Module):
    """A block that runs where `torch.rand(1)` is low: the other way round than LayerDrop."""

    def __init__(self, survival: float = 0.8):
        super().__init__()
        self.survival = survival
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() >= self.survival:
            return x
        return x + self.branch(x)


class RandomScale(nn.Module):
    """A scalar draw that decides nothing: it scales."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (0.9 + 0.2 * torch.rand(1, device=x.device))
        return self.drop(self.layer(x))


class NumpyNoise(nn.Module):
    """Noise drawn by numpy and handed to torch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.from_numpy(numpy.random.normal(0, 0.1, size=tuple(x.shape))).to(x)
        return self.layer(x)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.mask, None


class AutogradNoise(nn.Module):
    """A mask drawn inside a function of its own, with its own backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return _Masked.apply(y, 0.3) if self.training else y


class Closure(nn.Module):
    """Dropout in a closure within a closure, at a rate of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def regularized(p: float):
            def apply(y: Tensor) -> Tensor:
                return F.dropout(y, p, training=self.training)

            return apply

        drop = regularized(0.15)
        for layer in self.layers:
            x = drop(layer(x))
        return x


class AlwaysOn(nn.Module):
    """Monte Carlo dropout as it is often written: on in eval too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), p=0.25, training=True)


class GumbelGate(nn.Module):
    """A choice by Gumbel softmax, torch's and one written by hand."""

    def __init__(self):
        super().__init__()
        self.gate, self.values = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if not self.training:
            return logits.softmax(-1) @ self.values
        noise = -torch.log(-torch.log(torch.rand_like(logits) + 1e-9) + 1e-9)
        return F.gumbel_softmax(logits) @ self.values + (logits + noise).softmax(-1) @ self.values


class VAE(nn.Module):
    """The reparameterization trick, in eval too, as pytorch/examples has it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 2 * 3), nn.Linear(3, WIDTH)

    def reparameterize(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(self.reparameterize(mean, log_variance)), mean, log_variance


class Mixup(nn.Module):
    """Manifold mixup: a number by numpy's beta, a permutation by torch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.training:
            share = float(numpy.random.beta(0.2, 0.2))
            x = share * x + (1 - share) * x[torch.randperm(len(x))]
        return self.second(self.drop(x))


class LockedRNN(nn.Module):
    """A recurrent cell in a loop: one mask for all steps (Gal and Ghahramani)."""

    def __init__(self, p: float = 0.25):
        super().__init__()
        self.cell, self.p = nn.LSTMCell(WIDTH, WIDTH), p

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(1), WIDTH)
        if self.training:
            mask = torch.bernoulli(x.new_full((x.size(1), WIDTH), 1 - self.p)) / (1 - self.p)
        steps = []
        for step in x:
            h, c = self.cell(step, (h, c))
            h = h * mask if self.training else h
            steps.append(h)
        return torch.stack(steps)


class TokenDrop(nn.Module):
    """Tokens left out by a permutation, as masked autoencoders do."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.training:
            x = x[:, torch.randperm(x.size(1))[: x.size(1) // 2].sort().values]
        return self.drop(x)


class PrivateGenerator(nn.Module):
    """Noise from a generator of the module's own, so that the global one stands still."""

    def __init__(self):
        super().__init__()
        self.layer, self.generator = nn.Linear(WIDTH, WIDTH), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            y = y * (torch.rand(y.shape, generator=self.generator) > 0.2) / 0.8
        return y


class Distribution(nn.Module):
    """Noise by `torch.distributions`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            y = y * torch.distributions.Bernoulli(probs=torch.tensor(0.8)).sample(y.shape) / 0.8
        return y


def _rows() -> tuple[Tensor]:
    return (torch.randn(6, WIDTH),)


def _steps() -> tuple[Tensor]:
    return (torch.randn(6, 4, WIDTH),)


NOISY = {
    # name: (model, inputs, draws at sites, named draws, unrecognized draws)
    "Gaussian by the name of dropout": (GaussianNamed, _rows, 0, 0, 1),
    "stochastic depth": (StochasticDepth, _rows, 4, 4, 0),
    "a coin": (CoinResidual, _rows, 1, 1, 0),
    "a random scale": (RandomScale, _rows, 1, 0, 1),
    "numpy": (NumpyNoise, _rows, 0, 0, 1),
    "an autograd function": (AutogradNoise, _rows, 0, 0, 1),
    "a closure": (Closure, _rows, 2, 0, 0),
    "always on": (AlwaysOn, _rows, 1, 0, 0),
    "Gumbel": (GumbelGate, _rows, 0, 1, 1),
    "VAE": (VAE, _rows, 0, 0, 1),
    "mixup": (Mixup, _rows, 1, 0, 2),
    "locked RNN": (LockedRNN, _steps, 0, 0, 1),
    "token dropping": (TokenDrop, _steps, 1, 0, 1),
    "a private generator": (PrivateGenerator, _rows, 0, 0, 1),
    "a distribution": (Distribution, _rows, 0, 0, 1),
}

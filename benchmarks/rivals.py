"""What one would write, or install, instead of a variant: the rivals in the table of `variants.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from timing import IMAGES, RATE, SHAPE, Row
from torch import nn
from torch.nn import functional as F

WRITTEN = "written out"


class Written(nn.Module):
    """A rival that is a few lines of code."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class WrittenDropConnect(nn.Linear):
    """A mask for the whole batch, as it is usually written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.bernoulli(torch.full_like(self.weight, 1 - RATE))
        return F.linear(x, self.weight * mask / (1 - RATE), self.bias)


class WrittenDropConnectByExample(nn.Linear):
    """A mask for each example, each drawn: rows x out x in of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = F.dropout(self.weight.expand(len(x), *self.weight.shape), RATE)
        return torch.einsum("boi,bi->bo", weights, x) + self.bias


class WrittenStandout(nn.Module):
    """A linear gate of its own, a Bernoulli draw from its sigmoid."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.sigmoid(self.gate(x)))


class WrittenConcrete(nn.Module):
    """The mask's formula, with the learned logit."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor([RATE]).logit())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, u, tiny = torch.sigmoid(self.logit), torch.rand_like(x), 1e-7
        odds = torch.log(p + tiny) - torch.log(1 - p + tiny) + torch.log(u + tiny) - torch.log(1 - u + tiny)
        return x * (1 - torch.sigmoid(odds / 0.1)) / (1 - p)


def k_masks(x: torch.Tensor, samples: int = 8) -> torch.Tensor:
    """The mean of K dropout masks, each drawn."""
    return torch.stack([F.dropout(x, RATE) for _ in range(samples)]).mean(0)


def channel_mask(x: torch.Tensor) -> torch.Tensor:
    """Whole features of (B, T, C), by way of the layout that torch's own takes."""
    return F.dropout1d(x.transpose(1, 2), RATE).transpose(1, 2)


def written() -> list[Row]:
    def noise(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * torch.randn_like(x))

    def uniform(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * (2 * torch.rand_like(x) - 1))

    return [
        Row("gaussian", lambda: Written(noise), None, WRITTEN),
        Row("uniform", lambda: Written(uniform), None, WRITTEN),
        Row("multisample, K = 8", lambda: Written(k_masks), None, "K masks, written out"),
        Row("standout, learned", lambda: WrittenStandout(SHAPE[-1]), None, WRITTEN),
        Row("concrete", WrittenConcrete, None, WRITTEN),
    ]


def torchs_own() -> list[Row]:
    return [
        Row("spatial", lambda: Written(channel_mask), None, "F.dropout1d, transposed"),
        Row("token", lambda: nn.Dropout1d(RATE), None, "nn.Dropout1d"),
        Row("alpha", lambda: nn.AlphaDropout(RATE), None, "nn.AlphaDropout"),
    ]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def installed() -> list[Row]:
    """Rivals from packages, those that are installed."""
    rows = []
    if has("timm"):
        from timm.layers import DropBlock2d, DropPath

        rows += [
            Row("droppath", lambda: DropPath(RATE), None, "timm"),
            Row("dropblock", lambda: DropBlock2d(RATE, 7, couple_channels=False), None, "timm", IMAGES),
        ]
    if has("torchvision"):
        from torchvision.ops import StochasticDepth

        rows.append(Row("droppath", lambda: StochasticDepth(RATE, "row"), None, "torchvision"))
    if has("dropblock"):
        from dropblock import DropBlock2D

        name = "dropblock (one mask for all channels)"
        rows.append(Row("dropblock", lambda: DropBlock2D(RATE, 7), None, name, IMAGES))
    if has("baal"):
        from baal.bayesian.consistent_dropout import ConsistentDropout
        from baal.bayesian.dropout import Dropout

        rows += [
            Row("mc, in eval", lambda: Dropout(RATE), None, "baal", evaluating=True),
            Row("consistent, in eval", lambda: ConsistentDropout(RATE), None, "baal", evaluating=True),
        ]
    if has("torch_uncertainty"):
        rows.append(Row("mc, in eval", _uncertain, None, "torch-uncertainty", evaluating=True))
    return rows


def _uncertain() -> nn.Module:
    from torch_uncertainty.methods import mc_dropout

    return mc_dropout(nn.Sequential(nn.Dropout(RATE)), num_estimators=1)


def linear_rivals(inside: int, outside: int, mask: str) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Who has DropConnect for a layer of that size, and how it is made."""
    if mask == "example":
        return [(WRITTEN, lambda: WrittenDropConnectByExample(inside, outside))]
    rivals: list[tuple[str, Callable[[], nn.Module]]] = [
        (WRITTEN, lambda: WrittenDropConnect(inside, outside))
    ]
    if has("baal"):
        from baal.bayesian.weight_drop import WeightDropLinear

        rivals.append(("baal", lambda: WeightDropLinear(RATE, in_features=inside, out_features=outside)))
    return rivals

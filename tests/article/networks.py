"""The source article's three networks, rewritten from its description, and its layers with their faults.

The networks are test models. The layers state what the article's code computes, so that the tests can
say where it is wrong; nothing of regraft is made from them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A classifier of small images: two convolutions, dropout of channels, then of features."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop1 = nn.Dropout2d(0.25)
        self.drop2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(8 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.drop1(F.max_pool2d(x, 2)).flatten(1)
        return self.fc2(self.drop2(F.relu(self.fc1(x))))


class RDropoutNN(nn.Module):
    """Two linear layers with dropout between them, meant to be run twice."""

    def __init__(self, inputs: int = 64, hidden: int = 32, classes: int = 4, p: float = 0.3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.dropout = nn.Dropout(p)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


class ExampleNet(nn.Module):
    """Plain linear layers, and a functional dropout of the input: what the article's layers go into."""

    def __init__(self, inputs: int = 64, hidden: int = 48, classes: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.flatten(1), 0.2, self.training)
        return self.fc2(F.relu(self.fc1(x)))


class DropConnectAsWritten(nn.Linear):
    """The article's DropConnect: the weight is multiplied the wrong way round, and eval is scaled."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight.T * (1 - self.p), self.bias)
        mask = torch.bernoulli(torch.full_like(self.weight, 1 - self.p))
        return F.linear(x, (self.weight * mask).T, self.bias)


class StandoutAsWritten(nn.Linear):
    """The article's Standout: the gate keeps, and eval does nothing about what training leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        a = super().forward(x)
        if not self.training:
            return F.relu(a)
        return F.relu(a) * torch.bernoulli(torch.sigmoid(a))


def rdrop_as_written(first: Tensor, second: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """The article's R-Dropout: the two cross entropies are averaged, the KL is summed over the batch."""
    task = (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    one = F.kl_div(p, q, log_target=True, reduction="sum")
    other = F.kl_div(q, p, log_target=True, reduction="sum")
    return task + alpha * (one + other) / 2


def digits(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 with one bright quarter, whose number is the label."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count).remainder(4)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return images, labels

"""The pictures of docs/guides/schedules.md and max-norm.md, from what models really do.

    python benchmarks/pictures.py                  # a few seconds; writes docs/images/*.png

The rates are read off a model while its schedule steps, with the part that really was dropped; the norms
are those of a network that learns handwritten digits (scikit-learn's) by SGD with a high learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import regraft

FOLDER = Path(__file__).parents[1] / "docs" / "images"
STEPS = 400
SHAPES = {
    "linear": {"end": 0.4},
    "cosine": {"end": 0.4},
    "step": {"end": 0.4, "stairs": 4},
    "early": {"start": 0.4},
    "late": {"end": 0.4},
    "curriculum": {"end": 0.4},
}
BOUND, RATE, LEARNING_RATE = 1.5, 0.5, 0.2
INK, FAINT, BLUE, ORANGE = "#2b2b2b", "#d9d9d9", "#1f6f9f", "#c8641b"


def style(axis, x, y, title):
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def rates_of(shape, given):
    """The rate of a dropout at each step, and the part of 4,000 units that it dropped."""
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.1)).train()
    steps = STEPS // 4 if shape in ("early", "late") else STEPS * 3 // 4
    schedule = regraft.schedule(model, {**given, "steps": steps, "shape": shape})
    rates, dropped = [], []
    x = torch.ones(4000)
    for _ in range(STEPS):
        rates.append(model[1].p)
        dropped.append(float((model(x) == 0).float().mean()))
        schedule.step()
    return rates, dropped


def draw_schedules(plt):
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (shape, given) in zip(axes.flat, SHAPES.items(), strict=True):
        rates, dropped = rates_of(shape, given)
        axis.plot(dropped[::4], color=ORANGE, linewidth=0, marker=".", markersize=3, label="really dropped")
        axis.lines[-1].set_xdata(range(0, STEPS, 4))
        axis.plot(rates, color=BLUE, linewidth=2, label="rate")
        below = axis.get_subplotspec().is_last_row()
        left = axis.get_subplotspec().is_first_col()
        style(axis, "step" if below else "", "part of the units" if left else "", f'"{shape}"')
    axes[0, 0].legend(frameon=False, loc="lower right")
    return figure


def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1000]], y[order[:1000]]


def norms_of(bound):
    """Quantiles of the row norms of the first layer after each step."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    regraft.apply(model, {"after:ReLU": f"dropout(p={RATE})"})
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    if bound is not None:
        regraft.max_norm(model, {"Linear": bound}, optimizer)
    points = torch.tensor([0.05, 0.5, 0.95, 1.0])
    quantiles = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        with torch.no_grad():
            quantiles.append(torch.linalg.vector_norm(model[0].weight, dim=1).quantile(points))
    return torch.stack(quantiles).T


def draw_norms(plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, bound in zip(axes, (None, BOUND), strict=True):
        low, middle, high, most = norms_of(bound)
        steps = range(1, STEPS + 1)
        axis.fill_between(
            steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="5 % to 95 % of the rows"
        )
        axis.plot(steps, middle, color=BLUE, linewidth=2, label="median")
        axis.plot(steps, most, color=ORANGE, linewidth=1.5, label="longest row")
        if bound is not None:
            axis.axhline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"bound {bound:g}")
        name = "without a bound" if bound is None else f'max_norm(model, {{"Linear": {bound:g}}})'
        left = axis.get_subplotspec().is_first_col()
        style(axis, "step", "norm of a row, first layer" if left else "", name)
        axis.legend(frameon=False, loc="upper left", fontsize=9)
    axes[0].set_ylim(0)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("schedule", draw_schedules), ("max_norm", draw_norms)):
        draw(plt).savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()

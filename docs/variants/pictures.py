"""The pictures of the cards: what each variant's mask or noise looks like, drawn by the variant itself.

python docs/variants/pictures.py            # all, next to this file
python docs/variants/pictures.py spatial    # or some
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

import regraft
from regraft import nn

HERE = Path(__file__).parent
INK, FAINT, BLUE, ORANGE = "#20242b", "#8a93a0", "#2f6fb2", "#d9792b"
# Dropped is dark, left as it is nearly white, amplified blue.
SHADES = LinearSegmentedColormap.from_list("mask", ["#20242b", "#5b6675", "#eef1f5", "#7fb0de", "#2f6fb2"])
SIGNED = LinearSegmentedColormap.from_list("signed", [ORANGE, "#f7f7f7", BLUE])
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def field(axes: Axes, values: Tensor, title: str, across: str, down: str, *, signed: bool = False) -> None:
    """A map of multipliers, 1 the neutral shade; or of added noise, 0 the neutral one."""
    values = values.detach()
    if signed:
        most = float(values.abs().max())
        axes.imshow(values, cmap=SIGNED, vmin=-most, vmax=most, interpolation="nearest", aspect="auto")
    else:
        axes.imshow(values, cmap=SHADES, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.set(title=title, xlabel=across, ylabel=down, xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def stems(axes: Axes, values: Tensor, title: str, masses: dict[float, float] | None = None) -> None:
    """How often each multiplier was drawn; circles: how often by the formula."""
    found, counts = values.detach().flatten().unique(return_counts=True)
    axes.bar(found, counts / counts.sum(), width=0.06 * (float(found.max()) or 1), color=BLUE, label="drawn")
    if masses:
        axes.plot(list(masses), list(masses.values()), "o", mfc="none", mec=ORANGE, ms=7, label="formula")
    axes.set(title=title, xlabel="multiplier", ylim=(0, 1.08), ylabel="share")
    axes.legend(loc="upper left")


def curve(axes: Axes, values: Tensor, title: str, density: Callable[[Tensor], Tensor], label: str) -> None:
    """The histogram of continuous noise under its density."""
    values = values.detach().flatten()
    axes.hist(values, bins=60, density=True, color=BLUE, alpha=0.55, label="drawn")
    low, high = float(values.min()), float(values.max())
    grid = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 400)
    axes.plot(grid, density(grid), color=ORANGE, lw=1.5, label="formula")
    axes.set(title=title, xlabel=label, yticks=[], ylim=(0, 1.5 * float(density(grid).max())))
    axes.legend(loc="upper right")


def two_values(p: float) -> dict[float, float]:
    return {0.0: p, 1 / (1 - p): 1 - p}


def pair(figure: Figure) -> tuple[Axes, Axes]:
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    return left, right


def elements(figure: Figure, module: torch.nn.Module, p: float) -> None:
    left, right = pair(figure)
    field(left, module(torch.ones(24, 60)), f"mask at p = {p}", "features", "examples")
    stems(right, module(torch.ones(40000)), "what an element is multiplied by", two_values(p))


def dropout(figure: Figure) -> None:
    elements(figure, nn.Dropout(0.3), 0.3)


def mc(figure: Figure) -> None:
    module = nn.MCDropout(0.3).eval()
    for at, axes in enumerate(figure.subplots(1, 3)):
        field(axes, module(torch.ones(24, 30)), f"eval, pass {at + 1}", "features", "examples")


def consistent(figure: Figure) -> None:
    module = nn.ConsistentDropout(0.3).eval()
    panels = figure.subplots(1, 3)
    for at, axes in enumerate(panels[:2]):
        field(axes, module(torch.ones(24, 30)), f"run 1, batch {at + 1}", "features", "examples")
    field(panels[2], module.eval()(torch.ones(24, 30)), "run 2, after eval()", "features", "examples")


def gaussian(figure: Figure) -> None:
    p = 0.2
    spread = (p / (1 - p)) ** 0.5
    left, right = pair(figure)
    module = nn.GaussianDropout(p)
    field(left, module(torch.ones(24, 60)), f"noise at p = {p}", "features", "examples")

    def density(m: Tensor) -> Tensor:
        return torch.exp(-(((m - 1) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))

    curve(right, module(torch.ones(40000)), "N(1, p / (1 - p))", density, "multiplier")


def uniform(figure: Figure) -> None:
    p = 0.1
    width = (3 * p / (1 - p)) ** 0.5
    left, right = pair(figure)
    module = nn.UniformDropout(p)
    field(left, module(torch.ones(24, 60)), f"noise at p = {p}", "features", "examples")

    def density(m: Tensor) -> Tensor:
        return ((m - 1).abs() <= width) / (2 * width)

    curve(right, module(torch.ones(40000)), "uniform on 1 ± √(3p / (1 - p))", density, "multiplier")


def multisample(figure: Figure) -> None:
    p, k = 0.5, 8
    left, right = pair(figure)
    module = nn.MultiSampleDropout(p, num_samples=k)
    field(left, module(torch.ones(24, 60)), f"mean of {k} masks at p = {p}", "features", "examples")
    masses = {i / (k * (1 - p)): math.comb(k, i) * (1 - p) ** i * p ** (k - i) for i in range(k + 1)}
    stems(right, module(torch.ones(40000)), f"Binomial({k}, 1 - p) / ({k}(1 - p))", masses)
    right.set_ylim(0, 0.36)


def spatial(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    y = nn.SpatialDropout(0.3)(torch.ones(2, 24, 40))
    for at, axes in enumerate((left, right)):
        field(axes, y[at], f"example {at + 1} of (B, T, C), p = 0.3", "channels", "positions")


def token(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    mask = torch.ones(2, 24)
    mask[1, 16:] = 0
    y = nn.TokenDropout(0.3)(torch.ones(2, 24, 40), mask)
    field(left, y[0], "example 1 of (B, T, C), p = 0.3", "features", "positions")
    field(right, y[1], "example 2, padding from position 16 on", "features", "positions")
    right.axhline(15.5, color=ORANGE, lw=1.2, ls="--")


def droppath(figure: Figure) -> None:
    y = nn.DropPath(0.3)(torch.ones(10, 12, 10))
    for at, axes in enumerate(figure.subplots(2, 5).flatten()):
        field(axes, y[at], f"example {at + 1}", "", "")
    figure.supylabel("p = 0.3", fontsize=8)


def dropblock(figure: Figure) -> None:
    y = nn.DropBlock(0.2, block_size=5)(torch.ones(1, 3, 32, 32))
    for at, axes in enumerate(figure.subplots(1, 3)):
        field(axes, y[0, at], f"channel {at + 1}, p = 0.2, blocks of 5", "width", "height")
        axes.set_aspect("equal")


def dropconnect(figure: Figure) -> None:
    p = 0.3
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    layer = nn.DropConnectLinear(60, 24, p=p)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    field(left, layer(torch.eye(60)).T, f"mask='batch': the weight's mask, p = {p}", "inputs", "outputs")
    by_example = nn.DropConnectLinear(60, 1, p=p, mask="example")
    by_example.load_state_dict({"weight": torch.ones(1, 60) / 60, "bias": torch.zeros(1)})
    spread = (p / (1 - p) / 60) ** 0.5

    def density(y: Tensor) -> Tensor:
        return torch.exp(-(((y - 1) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))

    y = by_example(torch.ones(40000, 60))
    curve(right, y, "mask='example': an output of mean 1", density, "output over the examples")


class Looks(torch.nn.LSTM):
    """Keeps the weights that multiply in its forward."""

    def forward(self, x: Tensor, hx: object = None) -> object:
        self.__dict__["seen"] = {name: getattr(self, name).detach() for name in self._flat_weights_names}
        return super().forward(x, hx)


def weightdrop(figure: Figure) -> None:
    lstm, x = Looks(6, 12, num_layers=2, bias=False), torch.ones(3, 1, 6)
    for weight in lstm.parameters():
        torch.nn.init.ones_(weight)
    regraft.apply(lstm, {"recurrent": "weightdrop(p=0.5)"}, x)
    lstm(x)
    for axes, (name, mask) in zip(figure.subplots(1, 4), lstm.__dict__["seen"].items(), strict=True):
        field(axes, mask, name, "from", "to")


def mixout(figure: Figure) -> None:
    p = 0.3
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    layer = nn.MixoutLinear(60, 24, p=p)
    ramp = torch.linspace(-1, 1, 60).expand(24, 60)
    layer.mixout_weight.copy_(-ramp)
    layer.load_state_dict({"weight": ramp.clone(), "bias": torch.zeros(24), "mixout_weight": -ramp})
    with torch.no_grad():
        mixed = layer(torch.eye(60)).T
        fallen = ((mixed * (1 - p) + p * -ramp) - -ramp).abs() < 1e-3
    field(
        left,
        ramp.where(~fallen, -ramp),
        f"trained w, or u from before, at p = {p}",
        "inputs",
        "outputs",
        signed=True,
    )
    wide = nn.MixoutLinear(1, 4000, p=p)
    state = {"weight": torch.full((4000, 1), 0.5), "bias": torch.zeros(4000)}
    wide.load_state_dict({**state, "mixout_weight": torch.full((4000, 1), -0.5)})
    drawn = wide(torch.ones(1, 1))
    stems(
        right,
        drawn,
        "what a weight w = 0.5 with u = -0.5 becomes",
        {-0.5: p, (0.5 + p * 0.5) / (1 - p): 1 - p},
    )
    right.axvline(float(drawn.detach().mean()), color=FAINT, lw=1, ls="--")
    right.set(xlabel="weight in one pass (dashed: its mean, w)", xlim=(-0.9, 1.2))


def standout(figure: Figure) -> None:
    left, right = pair(figure)
    module = nn.StandoutDropout(0.5, alpha=2.0)
    levels = torch.linspace(-2, 2, 60).expand(24, 60)
    field(
        left, module(levels) / levels, "mask, the activation growing from -2 to 2", "activation", "examples"
    )
    grid = torch.linspace(-3, 3, 200)
    for alpha, shade in ((0.5, FAINT), (1.0, BLUE), (2.0, ORANGE)):
        right.plot(grid, torch.sigmoid(alpha * grid).clamp(min=0.05), color=shade, label=f"alpha = {alpha}")
    right.set(title="probability to keep, p = 0.5", xlabel="activation", ylim=(0, 1.02))
    right.legend(loc="upper left")


def concrete(figure: Figure) -> None:
    left, right = pair(figure)
    p = 0.3
    field(left, nn.ConcreteDropout(p)(torch.ones(24, 60)), f"smooth mask at p = {p}", "features", "examples")
    u = torch.linspace(0.001, 0.999, 500)
    for temperature, shade in ((0.5, FAINT), (0.1, BLUE), (0.02, ORANGE)):
        odds = (math.log(p / (1 - p)) + u.logit()) / temperature
        right.plot(u, 1 - torch.sigmoid(odds), color=shade, label=f"t = {temperature}")
    right.axvline(1 - p, color=FAINT, lw=0.8, ls=":")
    right.set(title="mask before the division by 1 - p", xlabel="uniform draw u", ylim=(-0.02, 1.05))
    right.legend(loc="lower left")


def alpha(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    x = torch.nn.functional.selu(torch.randn(60000))
    edges = torch.linspace(-3, 4, 90).tolist()
    for axes, values, name in (
        (left, x, "SELU activations"),
        (right, nn.AlphaDropout(0.2)(x), "after p = 0.2"),
    ):
        axes.hist(values, bins=edges, density=True, color=BLUE)
        axes.set(
            title=f"{name}: mean {values.mean():.2f}, variance {values.var():.2f}", yticks=[], ylim=(0, 2.6)
        )
        axes.set_xlabel("value")


def neftune(figure: Figure) -> None:
    left, right = pair(figure)
    layer = nn.NEFTuneEmbedding(10, 60, alpha=5.0)
    torch.nn.init.zeros_(layer.weight)
    noise = layer(torch.zeros(50, 24, dtype=torch.int64)).detach()
    field(left, noise[0], "noise added to 24 tokens", "features", "tokens", signed=True)
    bound = 5 / math.sqrt(24 * 60)

    def density(y: Tensor) -> Tensor:
        return (y.abs() <= bound) / (2 * bound)

    curve(right, noise, "uniform on ± alpha / √(T C)", density, "added")


def off(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    field(left, nn.Dropout(0.3)(torch.ones(24, 40)), "before: dropout", "features", "examples")
    field(right, nn.Off()(torch.ones(24, 40)), "after: the identity", "features", "examples")


def dropkey(figure: Figure) -> None:
    for axes, keys in zip(figure.subplots(1, 2), ("column", "element"), strict=True):
        y = nn.DropKey(0.3, keys=keys)(torch.full((1, 1, 24, 40), 1 / 40))[0, 0]
        field(axes, y * 40, f"keys={keys!r}, p = 0.3", "keys", "queries")


def drophead(figure: Figure) -> None:
    y = nn.DropHead(0.5)(torch.ones(1, 4, 24, 24))[0]
    for at, axes in enumerate(figure.subplots(1, 4)):
        field(axes, y[at], f"head {at + 1}", "keys", "queries")


def elementwise(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    x = torch.ones(1, 24, 4, 10)
    field(left, torch.nn.Dropout2d(0.3)(x)[0].flatten(1), "Dropout2d", "positions", "channels")
    field(right, nn.ElementwiseDropout(0.3)(x)[0].flatten(1), "elementwise", "positions", "channels")


def noise(figure: Figure) -> None:
    left, right = pair(figure)
    module = nn.GaussianNoise(0.1)
    field(left, module(torch.zeros(24, 60)), "noise that is added", "features", "examples", signed=True)

    def density(y: Tensor) -> Tensor:
        return torch.exp(-((y / 0.1) ** 2) / 2) / (0.1 * math.sqrt(2 * math.pi))

    curve(right, module(torch.zeros(40000)), "N(0, 0.1^2)", density, "added")


def shaped(figure: Figure) -> None:
    y = nn.ShapedDropout(0.3, noise_shape=[1, None, 1])(torch.ones(3, 24, 30))
    for at, axes in enumerate(figure.subplots(1, 3)):
        field(axes, y[at], f"example {at + 1}", "features", "positions")


PICTURES = {
    picture.__name__: picture
    for picture in (
        *(alpha, concrete, consistent, dropblock, dropconnect, dropout, droppath, gaussian, mc, mixout),
        *(multisample, neftune, off, spatial, standout, token, uniform, weightdrop),
        *(dropkey, drophead, elementwise, noise, shaped),
    )
}


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        torch.manual_seed(0)
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(7, 2.3), layout="constrained")
            PICTURES[name](figure)
            figure.savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:])

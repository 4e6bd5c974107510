"""Consistent dropout: one mask for a whole evaluation run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regraft.variants.draws import times_mask
from regraft.variants.dropout import dropout
from regraft.variants.module import DropoutVariant, check_rate
from regraft.variants.spec import DEFAULT_RATE, Spec

# The 64-bit mixing constants of splitmix64, as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def consistent_dropout(
    x: Tensor, p: float = DEFAULT_RATE, training: bool = True, *, consistent_seed: Tensor | None = None
) -> Tensor:
    """Dropout in training; in eval one mask for the whole run, the same for every example and batch.

    An evaluation run is then the prediction of *one* thinned network, so the predictions of several
    examples can be compared, and taken together. A run begins with `eval()` or `train()`.

    Shape:
        (B, ...); the output's is the input's. A longer or shorter input sees the same mask as far as
        both go. consistent_seed: (), a whole number that stands for the run; None is 0.

    Source:
        Gal and Ghahramani (2016), "Dropout as a Bayesian approximation"; the users of baal, which has
        a module of this purpose.

    Differs:
        baal draws a mask for each place in a batch, and anew when the shape changes.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 50)
        >>> y = consistent_dropout(x, p=0.5, training=False)
        >>> torch.equal(y[0], y[1]), torch.equal(y, consistent_dropout(x, p=0.5, training=False))
        (True, True)
    """
    p = check_rate(p)
    if training or p == 0:
        return dropout(x, p, training)
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if consistent_seed is None else consistent_seed
    kept = _uniform(seed, x.shape[1:], x.device) >= p
    return times_mask(x, kept.to(x.dtype), 1 / (1 - p))


def _uniform(seed: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Uniform on [0, 1) from the seed and each place's own index: nothing is drawn or remembered."""
    bits = _mixed(seed.to(device))
    for size in shape:
        # An index times a constant a compiler takes for an address, which may not wrap around; after an
        # exclusive or it is a number as any other.
        index = torch.arange(1, size + 1, device=device)
        bits = _mixed((bits.unsqueeze(-1) ^ index) * _STEP)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def _mixed(bits: Tensor) -> Tensor:
    """A 64-bit mix in which every bit depends on all others (the finalizer of splitmix64)."""
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * _MIX_1
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * _MIX_2
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def _seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)


def _begin_run(module: nn.Module, training: bool) -> None:
    if not training:
        seed: Tensor = module.consistent_seed  # type: ignore[assignment]
        seed.copy_(_seed())


@Spec(
    "consistent",
    consistent_dropout,
    changes_eval=lambda _: True,
    state=lambda *_: {"consistent_seed": _seed()},
    transient=("consistent_seed",),
    on_mode=_begin_run,
    activations=True,
)
class ConsistentDropout(DropoutVariant):
    """`consistent_dropout` as a module, whose `eval()` begins a new run: `ConsistentDropout(p=0.2)`."""

    def train(self, mode: bool = True) -> ConsistentDropout:
        super().train(mode)
        _begin_run(self, mode)
        return self

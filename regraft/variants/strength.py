"""How strong a site's noise is, before and after a graft: the variance of the factor on each element.

Dropout at p multiplies each element by 0 or 1 / (1 - p): a mean of 1 and a variance of p / (1 - p). A variant
that multiplies is compared with it by that number alone, whatever the shape of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_AS_DROPOUT = frozenset(
    ("dropout", "mc", "consistent", "gaussian", "uniform", "spatial", "token", "dropblock", "droppath")
)
"""Their factor on each element has the mean and variance of dropout; how elements vary together differs."""


def noise_variance(name: str, p: float | None, options: Mapping[str, Any] | None = None) -> float | None:
    """The variance of the factor with which a variant multiplies each element, in training.

    Args:
        name: of a registered variant; "dropout" is the plain one, however it is written.
        p: the rate at the site; None counts as 0.
        options: the variant's own, where they differ from its defaults.

    Returns:
        The variance; None where the noise is no factor with a mean of 1 and a variance that the options
        tell: it depends on the activation, is added, learned, one of weights, or a registered function's.

    Example:
        >>> round(noise_variance("multisample", 0.1, {"num_samples": 8}), 3)
        0.014
    """
    options = options or {}
    rate = p or 0.0
    dropped = rate / (1 - rate) if rate < 1 else math.inf
    if name == "off":
        return 0.0
    if name == "gaussian" and options.get("sigma") is not None:
        return float(options["sigma"]) ** 2
    if name in _AS_DROPOUT:
        return dropped
    if name == "multisample":
        return dropped if options.get("match") == "variance" else dropped / options.get("num_samples", 8)
    return None


@dataclass(frozen=True)
class Strength:
    """A site's noise variance before and after a graft; `str` is how a report says it.

    Example:
        >>> print(Strength(noise_variance("dropout", 0.1), noise_variance("multisample", 0.1)))
        noise 0.111 -> 0.0139, 8x weaker
    """

    before: float
    after: float

    def __str__(self) -> str:
        change = f"noise {self.before:.3g} -> {self.after:.3g}"
        if math.isclose(self.before, self.after, rel_tol=1e-6):
            return f"noise {self.after:.3g}, as before"
        if self.after == 0:
            return f"{change}, none is left"
        if self.before == 0:
            return f"{change}, new"
        if self.after < self.before:
            return f"{change}, {self.before / self.after:.2g}x weaker"
        return f"{change}, {self.after / self.before:.2g}x stronger"


def strength(
    before: float | None, name: str, p: float | None, options: Mapping[str, Any] | None = None
) -> Strength | None:
    """What a graft does to a dropout site's noise: from plain dropout at `before` to a variant at rate `p`.

    None where the variant's noise is not known, see `noise_variance`.

    Example:
        >>> print(strength(0.1, "multisample", 0.2))
        noise 0.111 -> 0.0312, 3.6x weaker
    """
    after = noise_variance(name, p, options)
    return None if after is None else Strength(noise_variance("dropout", before) or 0.0, after)

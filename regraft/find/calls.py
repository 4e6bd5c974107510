"""Calls: what one operation did inside one module's own forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass
class Called:
    """The calls of one operation inside one module's own forward."""

    owner: nn.Module
    op: str
    rates: list[float | None] = field(default_factory=list)
    """The rate of each call, 0 for one that says it is not training, None where it cannot be read."""
    sources: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    """Methods of the owner that were running."""
    score_bytes: int = 0
    """Of attention: the size of the largest score matrix of one call."""
    node: str = ""
    """Of a call in a graph: the name of the node that ran."""

    @property
    def p(self) -> float | None:
        """The rate of the calls; the first that is not 0 where they differ."""
        known = [rate for rate in self.rates if rate is not None]
        above = next((rate for rate in known if rate > 0), None)
        return above if above is not None else 0.0 if len(known) == len(self.rates) else None

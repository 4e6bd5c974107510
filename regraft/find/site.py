"""A site: a place a regularizer sits or can sit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regraft.find.calls import Called
from regraft.ops import ATTENTION


@dataclass(frozen=True, eq=False)
class Site:
    """A place a regularizer sits or can sit, as it is before any graft.

    Attributes:
        path: dotted name of the module that owns it ("" for the model itself).
        paths: all names of that module; several if it is shared, or if a dead twin holds the rate.
        kind: "module", "call" (functional, inside the module's forward), "node" or "inserted".
        op: what is done there: "Dropout", "Linear", "scaled_dot_product_attention", "DropPath", ...
        type: the name of the owner's class.
        p: the rate, or None where there is none.
        calls: how often it ran in the probe's forward; 0 is never, None is not probed.
        source: the line that calls it, "bert/modeling_bert.py:198".
        family: the variants that can take its place: "Dropout", "DropPath", "Linear", "Embedding".
        module: the owner itself.
        variant: the variant grafted there, as text.
    """

    path: str
    paths: tuple[str, ...]
    kind: str
    op: str
    type: str
    p: float | None
    calls: int | None
    source: str | None
    family: str | None
    module: nn.Module = field(repr=False)
    shape: tuple[int, ...] | None = None
    parameters: int = 0
    device: str | None = None
    dtype: str | None = None
    training: bool = True
    variant: str | None = None
    draws: int = 0
    """How many operations drew random numbers there, in the probe's forward."""
    draws_in_eval: bool = False
    baked: bool | None = field(default=None, repr=False)
    """Of a node: the training flag, where tracing fixed it."""
    call: Called | None = field(default=None, repr=False)
    """Of a call site: what the probe recorded of it."""
    obstacle: tuple[str, str] | None = field(default=None, repr=False)
    """Why a graft here would be lost, and the remedy, where that is known from the module alone."""

    @property
    def written(self) -> str:
        """The site as a diff shows it: `Dropout(p=0.1)`, `Linear(768, 2)`."""
        if self.kind == "inserted":
            place = self.op.partition(":")[2].partition("#")[0]
            return f"{place}({', '.join(map(str, self.shape))})" if self.shape else place
        if self.shape and self.family in ("Linear", "Embedding"):
            return f"{self.op}({', '.join(map(str, self.shape))})"
        fixed = "" if self.baked is None or self.op == ATTENTION else f", training={self.baked}"
        return self.op if self.p is None else f"{self.op}(p={self.p:g}{fixed})"

    def to_dict(self) -> dict[str, Any]:
        """The site as plain JSON values."""
        names = ("path", "kind", "op", "type", "p", "calls", "source", "parameters", "device", "dtype")
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain["paths"] = list(self.paths)
        plain["shape"] = None if self.shape is None else list(self.shape)
        return plain | {"training": self.training, "variant": self.variant}

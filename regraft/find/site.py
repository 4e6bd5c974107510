"""A site: a place a regularizer sits or can sit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regraft.find.walk import Named
from regraft.ops import ATTENTION, CONVOLUTION
from regraft.record import original_class


@dataclass
class Called:
    """The calls of one operation inside one module's own forward."""

    owner: nn.Module
    op: str
    rates: list[float | None] = dataclasses.field(default_factory=list)
    """The rate of each call, 0 for one that says it is not training, None where it cannot be read."""
    sources: list[str] = dataclasses.field(default_factory=list)
    methods: set[str] = dataclasses.field(default_factory=set)
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


@dataclass(frozen=True, eq=False)
class Site:
    """A place a regularizer sits or can sit, as it is before any graft.

    Attributes:
        path: dotted name of the module that owns it ("" for the model itself).
        paths: all names of that module; several if it is shared, or if a dead twin holds the rate.
        kind: "module", "call" (functional, inside the module's forward), "weight" (lent to its reader),
            "node" or "inserted".
        op: what is done there: "Dropout", "Linear", "scaled_dot_product_attention", "DropPath", ...; of an
            insertion "after:Linear#field".
        type: the name of the owner's class.
        p: the rate, or None where there is none.
        calls: how often it ran in the probe's forward; 0 is never, None is not probed.
        source: the line that calls it, "bert/modeling_bert.py:198".
        family: the variants that can take its place: "Dropout", "DropPath", "Linear", "Embedding".
        module: the owner itself.
        variant: the variant grafted there, as text.
        node: of a node in a graph, its name.
        position: of an insertion, "before" or "after".
        place: of an insertion, what it is put before or after: "Linear".
        field: of an insertion, the argument or the part of the output that it is on; "" for the first tensor.
        role: "router" where what the product gives chooses between experts.
        reader: of a weight that another module multiplies by, the path of that module, which `module` is;
            `holder` leads from there to the module that has the weight, as its `attribute`, and `contracted`
            is the axis of it that the product sums over.
    """

    path: str
    paths: tuple[str, ...]
    kind: str
    op: str
    type: str
    module: nn.Module = dataclasses.field(repr=False)
    p: float | None = None
    calls: int | None = None
    source: str | None = None
    family: str | None = None
    shape: tuple[int, ...] | None = None
    parameters: int = 0
    device: str | None = None
    dtype: str | None = None
    training: bool = True
    variant: str | None = None
    draws: int = 0
    """How many operations drew random numbers there, in the probe's forward."""
    node: str = ""
    position: str = ""
    place: str = ""
    field: str = ""
    role: str = ""
    reader: str = ""
    holder: str = ""
    attribute: str = ""
    contracted: int | None = None
    draws_in_eval: bool = False
    baked: bool | None = dataclasses.field(default=None, repr=False)
    """Of a node: the training flag, where tracing fixed it."""
    call: Called | None = dataclasses.field(default=None, repr=False)
    """Of a call site: what the probe recorded of it."""
    rate_from: tuple[nn.Module, ...] = dataclasses.field(default=(), repr=False)
    """Of a call site: the modules whose rate it uses."""
    obstacle: tuple[str, str] | None = dataclasses.field(default=None, repr=False)
    """Why a graft here would be lost, and the remedy, where that is known from the module alone."""

    @property
    def owner(self) -> nn.Module:
        """The module that a class selects the site by: of a weight the one that has it."""
        return self.module.get_submodule(self.holder) if self.kind == "weight" else self.module

    @property
    def written(self) -> str:
        """The site as a diff shows it: `Dropout(p=0.1)`, `Linear(768, 2)`."""
        if self.kind == "inserted":
            return f"{self.place}({', '.join(map(str, self.shape))})" if self.shape else self.place
        if self.shape and self.family in ("Linear", "Embedding", CONVOLUTION):
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


def site_at(
    named: Named, kind: str, op: str, *, node: str = "", weight: Tensor | None = None, **facts: Any
) -> Site:
    """A site at a module, or at the `node` of its graph; `weight` tells its device and dtype."""
    module = named.module
    paths = tuple(".".join(filter(None, (path, node))) for path in named.paths)
    return Site(
        path=paths[0],
        paths=paths,
        kind=kind,
        op=op,
        type=original_class(module).__name__,
        module=module,
        device=None if weight is None else str(weight.device),
        dtype=None if weight is None else str(weight.dtype).removeprefix("torch."),
        training=module.training,
        node=node,
        **facts,
    )


def grafted_site(module: nn.Module, paths: Iterable[str], edit: Mapping[str, Any]) -> Site:
    """The site that an edit is at, as far as the edit tells: of a graft, or of a plan that was read.

    Args:
        module: the module at the site; of a node, the module whose graph it is in.
        paths: the names that it has now; of a weight, those of its reader.
        edit: the edit as plain values.
    """
    paths = tuple(paths)
    inserted = edit["kind"] == "inserted"
    if edit["kind"] == "weight":
        last = "" if edit["attribute"] == "weight" else edit["attribute"]
        paths = tuple(".".join(filter(None, (path, edit["holder"], last))) for path in paths)
    names = [
        *("kind", "op", "type", "calls", "source", "family", "node", "position", "place", "field"),
        *("role", "reader", "holder", "attribute"),
    ]
    return Site(
        path=paths[0],
        paths=paths,
        p=edit["options"].get("p") if inserted else edit["p"],
        module=module,
        shape=tuple(edit["shape"]) if edit["shape"] else None,
        training=module.training,
        variant=edit["after"],
        **{name: edit[name] for name in names},
    )

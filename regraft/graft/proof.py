"""The proof of a graft: real training forwards, watched, in which each variant is seen to run.

What a plan expects is no evidence. Here the grafted model runs, and what is seen is compared: which grafts'
variants were called, which stock draws are left, and whether a perturbed weight multiplies unperturbed too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regraft.find.frames import in_a_variant
from regraft.find.probe.example_inputs import Inputs
from regraft.find.probe.ledger import Draw, observe
from regraft.find.probe.preserve_state import (
    buffers_kept,
    preserving,
    random_state_kept,
    set_training,
    silent,
    unchanged,
)
from regraft.find.walk import named_modules
from regraft.graft.handlers import HANDLERS, CallGrafts
from regraft.graft.modules import VARIANT
from regraft.record import Graft, grafts_of
from regraft.variants.registry import spec

_FORWARDS = 2
_MOST_FORWARDS = 16
"""Of a model that leaves layers out by numbers it draws, until each graft's module has run."""
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "matmul"})


@dataclass(frozen=True)
class Proof:
    """What real training forwards of a grafted model have shown.

    Attributes:
        grafts: how many grafts there are.
        ran: of how many the variant was seen to run.
        never: paths of the others.
        stock: paths of modules where a graft stands, and that draw as they did before all the same.
        bypassed: paths of perturbed weights that somebody multiplies by unperturbed.
        draws: the stock draws at all other places.
        why_not: why no forward could be run; None if one was.
    """

    grafts: int
    ran: int = 0
    never: list[str] = field(default_factory=list)
    stock: list[str] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    draws: list[tuple[str, Draw]] = field(default_factory=list)
    why_not: str | None = None

    @property
    def passed(self) -> bool | None:
        """Whether each graft does what it says; None where no forward has shown it."""
        if self.why_not is not None:
            return None
        return not (self.never or self.stock or self.bypassed)

    @property
    def said(self) -> str:
        """The result in one line."""
        if self.why_not is not None:
            return f"no training forward could be run: {self.why_not}"
        parts = [f"{self.ran} of {self.grafts} grafts seen to run in real training forwards"]
        for what, paths in (
            ("never ran", self.never),
            ("still draws as before", self.stock),
            ("multiplied unperturbed", self.bypassed),
        ):
            if paths:
                parts.append(f"{what}: {', '.join(paths[:3])}" + (" ..." if len(paths) > 3 else ""))
        return "; ".join(parts)


def prove(root: nn.Module, candidates: Iterable[Inputs]) -> Proof:
    """Run training forwards of a grafted model, of the first inputs that it takes; it is left as it was."""
    placed = list(_placed(root))
    tensors = [*root.parameters(), *root.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return Proof(len(placed), why_not="the model has no weights to run with")
    why = "regraft does not know this model's inputs; give inputs="
    for inputs in candidates:
        try:
            return _proof(root, placed, inputs)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return Proof(len(placed), why_not=why)


def _proof(root: nn.Module, placed: list[tuple[str, nn.Module, Graft]], inputs: Inputs) -> Proof:
    modules = named_modules(root)
    known = {id(named.module): named.module for named in modules}
    every = list(known.values())
    paths = {id(named.module): named.paths[0] for named in modules}
    weights = _Bypasses(dict(_perturbed(placed)))
    state = dict([*root.named_parameters(), *root.named_buffers()])
    seen: set[int] = set()
    draws: list[Draw] = []
    counts: dict[int, int] = {}
    with preserving(silent(), buffers_kept(every), unchanged(every), random_state_kept()):
        set_training(every, mode=True)
        for at in range(_MOST_FORWARDS):
            with _variants_seen({graft.variant for _, _, graft in placed}, seen):
                ledger = observe(
                    root, inputs.args, inputs.kwargs, known=known, state=state, recorders=[weights]
                )
            draws += ledger.draws
            counts |= ledger.counts
            settled = not any(draw.may_decide for draw in draws)
            if at + 1 >= _FORWARDS and (settled or all(counts.get(id(module)) for _, module, _ in placed)):
                break
    never, stock = [], set()
    left = [draw for draw in draws if not draw.own and not draw.kind and draw.p != 0]
    for path, module, graft in placed:
        drawn = [draw for draw in left if _is_at(draw, module, graft)]
        if graft.layer is None:  # it only sets a rate: the module's own draws are what it makes
            given = [draw.p for draw in drawn if draw.p is not None and draw.applied is None]
            same = all(abs(p - float(graft.rate or 0)) < 1e-6 for p in given)
            shown = bool(counts.get(id(module))) and same
            left = [draw for draw in left if draw not in drawn] if shown else left
        else:
            shown = id(graft) in seen
            stock |= {path} if drawn else set()
        if not shown:
            never.append(path)
    others = [(paths[id(draw.module)], draw) for draw in left]
    return Proof(
        len(placed),
        len(placed) - len(never),
        never,
        sorted(stock),
        sorted(weights.found),
        [(path, draw) for path, draw in others if path not in stock],
    )


def _placed(root: nn.Module) -> Iterator[tuple[str, nn.Module, Graft]]:
    """Every graft that has a variant, with the path it is reported at and its module."""
    for named in named_modules(root):
        for graft in grafts_of(named.module).values():
            if graft.variant and graft.edit:
                yield graft.edit.get("path", named.paths[0]), named.module, graft


def _is_at(draw: Draw, module: nn.Module, graft: Graft) -> bool:
    """Whether a stock draw is one that the graft should have taken over."""
    if draw.module is not module or graft.slot.kind in ("insert", "lend"):
        return False
    if graft.slot.kind == "calls":
        return draw.call is not None and draw.call.op == graft.slot.op
    return graft.slot.kind == "rate" or (draw.call is None and graft.edit.get("family") != "Linear")


@contextmanager
def _variants_seen(names: set[str], seen: set[int]) -> Iterator[None]:
    """Adds to `seen` the id of each graft whose variant is called in this thread, while the block runs."""
    codes: set[CodeType] = set()
    for name in names:
        found = spec(name)
        functions = [found.function, found.function_for("Linear"), getattr(found, "weight_function", None)]
        codes |= {inspect.unwrap(function).__code__ for function in functions if function is not None}
    routes = {CallGrafts.drop.__code__, HANDLERS[F.scaled_dot_product_attention].__code__}

    def profile(frame: FrameType, event: str, value: Any) -> None:
        graft = None
        if event == "call" and frame.f_code in codes:
            graft = _graft_above(frame)
        elif event == "return" and value is not None and frame.f_code in routes:
            graft = frame.f_locals.get("graft")
        if graft is not None:
            seen.add(id(graft))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _graft_above(frame: FrameType) -> Graft | None:
    """The graft for which a variant's function was called."""
    above = frame.f_back
    while above is not None:
        graft = above.f_locals.get("graft")
        if isinstance(graft, Graft):
            return graft
        module = above.f_locals.get("self")
        if isinstance(module, nn.Module):
            return grafts_of(module).get(str(VARIANT))
        above = above.f_back
    return None


def _perturbed(placed: Sequence[tuple[str, nn.Module, Graft]]) -> Iterator[tuple[int, str]]:
    """The storage of each weight that a graft perturbs, and the path of its module."""
    for path, module, graft in placed:
        weight = module._parameters.get("weight")
        if graft.slot == VARIANT and graft.edit.get("family") == "Linear" and weight is not None:
            yield weight.untyped_storage()._cdata, path


class _Bypasses:
    """Products by a perturbed weight that are not the variant's own."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        self.weights = weights
        self.found: set[str] = set()

    def start(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is forgotten: the proof is of all forwards together."""

    def record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: nn.Module
    ) -> None:
        """A product, or something else."""
        del kwargs, result, module
        if not self.weights or func._overloadpacket.__name__ not in _PRODUCTS:
            return
        for tensor in args:
            if isinstance(tensor, Tensor):
                path = self.weights.get(tensor.untyped_storage()._cdata)
                if path is not None and not in_a_variant():
                    self.found.add(path)

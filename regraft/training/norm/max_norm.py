"""`regraft.max_norm`: after each step of the optimizer, weight vectors that grew too long are scaled back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import MisfitError, OptionError
from regraft.find.site import Site
from regraft.find.walk import inner_model
from regraft.report.view import SCHEMA, View
from regraft.training.norm.bounds import Bound, limited_sites, read_limits
from regraft.training.norm.rows import Rows, across_of, bounds_of, local_part, row_norms, scale_back, why_not

_MOST = 0.5
_TOO_TIGHT = (
    "So this bound changes the model more than training does; a bound relative to the norms as they were, "
    "such as '1.1x', leaves a pretrained model whole"
)
_TOO_FAST = "One step took them beyond their bounds: the learning rate is high for a pretrained model"
_FROZEN = ("it is frozen", "nothing: it is held as soon as it trains")
_NO_ROWS = ("which of its axes are rows is not known: what multiplies is a copy", "leave it alone")
_NOT_HELD = ("the optimizer does not hold it", "nothing: it is held once it is in a param group")


class MaxNorm(View):
    """What `regraft.max_norm` returns: what it holds, and the way to end it.

    Attributes:
        model: the model's class name.
        rules: pairs of a selector and a bound, as text.
        limited: of each weight its `path`, `paths`, `op`, `shape`, `rows`, `bound`, the `largest` norm
            and how many rows were `over` the bound, as it stood when the limit was set.
        skipped: selected layers that are not held, each with `path`, `op`, `reason`, `remedy`.
        first: of the first step, how many `rows` there were, and how many were `over` and scaled back.
        notes: what a reader should know first.
    """

    def __init__(self, root: nn.Module, optimizer: torch.optim.Optimizer, rules: list[list[Any]]) -> None:
        self.model = type(root).__name__
        self.rules = rules
        self.limited: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.first: dict[str, int] | None = None
        self.notes: list[str] = []
        self._rows: dict[str, Rows] = {}
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def to_dict(self) -> dict[str, Any]:
        """The limits as plain JSON values."""
        names = ("model", "rules", "limited", "skipped", "first", "notes")
        return {"schema": SCHEMA, "view": "max_norm", **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """The norms of all rows as they are now, by the path of their layer."""
        return {path: row_norms(rows.weight, rows.across) for path, rows in self._rows.items()}

    def remove(self) -> None:
        """End it: weights stay as they are, and are limited no more."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The bounds that are relative to norms at the start, for a run that is resumed from the middle."""
        return {path: rows.bound for path, rows in self._rows.items() if isinstance(rows.bound, Tensor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the bounds of an earlier run.

        Raises:
            MisfitError: they are of other weights.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[path].shape != state[path].shape for path in own):
            paths = sorted(own.keys() ^ state.keys()) or sorted(own)
            raise MisfitError("these bounds are of other weights", where=", ".join(map(repr, paths[:3])))
        for path, bound in state.items():
            self._rows[path].bound = bound.clone()

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        distinct = {id(one.weight): one for one in self._rows.values()}  # tied weights may come later
        rows = [
            one
            for key, one in distinct.items()
            if key in held and one.weight.requires_grad and one.weight.numel()
        ]
        # A GradScaler lets fused optimizers find out for themselves that a step is to be skipped.
        skipped = getattr(optimizer, "found_inf", None)
        if self.first is None and rows and not (skipped is not None and bool(skipped > 0)):
            self._look_first(rows)
        scale_back(rows, skipped)

    @torch.no_grad()
    def _look_first(self, rows: list[Rows]) -> None:
        norms = [row_norms(one.weight, one.across) for one in rows]
        over = sum(
            int((norm > bounds_of([one], [norm])).sum()) for one, norm in zip(rows, norms, strict=True)
        )
        every = sum(len(norm) for norm in norms)
        self.first = {"rows": every, "over": over}
        if over > _MOST * every:
            middle = float(torch.cat([norm.float().cpu() for norm in norms]).median())
            relative = all(isinstance(one.bound, Tensor) for one in rows)
            warnings.warn(
                f"max-norm scales back {over:,} of {every:,} rows at its first step: their norms are around "
                f"{middle:.3g}. {_TOO_FAST if relative else _TOO_TIGHT}",
                stacklevel=5,
            )


def max_norm(model: nn.Module, limits: Mapping[Any, Any], optimizer: Any, inputs: Any = None) -> MaxNorm:
    """Hold the incoming weight vector of each output unit to a norm, after every step of the optimizer.

    Only weights that the optimizer holds and that train are held, each once, however many layers share
    it. Gradients and the optimizer's state are left alone, and so is every row within its bound, bit for
    bit. Where the weights are sharded (FSDP2, tensor parallel) the norm is the whole row's.

    Args:
        model: any module; DDP and compiled wrappers are looked into.
        limits: selector -> bound, later ones win, `None` leaves alone. A number is the norm itself
            (3 to 4 in the paper, for networks trained from the start); `"1.1x"` is relative to each row's
            norm now, which is what suits a pretrained model. Convolution layers, and matrices that multiply:
            `"Linear"` means the same as in a rule, and experts are held expert by expert.
        optimizer: of torch, or one that accelerate has wrapped.
        inputs: for the probe, which shows the weights that other modules multiply by; see `regraft.inspect`.

    Returns:
        What is held: print it; `.remove()` ends it, `.norms()` has the norms as they are.

    Raises:
        RegraftError: a selector that matches nothing, a bound out of range, no such layers, or an
            optimizer that cannot be watched.

    Warns:
        If most rows are scaled back at the first step.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), "Dropout: a simple way to
        prevent neural networks from overfitting", section 5.1.

    Differs: bounds relative to a pretrained row's own norm; a row of zeros has none then.

    Example:
        >>> import regraft, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
        >>> held = regraft.max_norm(net, {"Linear": 3.0}, optimizer)
        >>> net(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> max(float(norms.max()) for norms in held.norms().values()) <= 3.0001
        True
    """
    root, notes = inner_model(model)
    rules = read_limits(limits)
    watched = _watched(optimizer)
    chosen = limited_sites(root, rules, inputs)
    made = MaxNorm(root, watched, [[selector.text, bound] for selector, bound in rules])
    made.notes += notes
    try:
        _hold(made, chosen, {id(one) for group in watched.param_groups for one in group["params"]})
        bare = sum(int(bound.isinf().sum()) for bound in made.state_dict().values())
        if bare:
            made.notes.append(f"{bare:,} rows are all zeros: a bound relative to nothing leaves them free")
    except BaseException:
        made.remove()
        raise
    return made


def _watched(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch that makes the steps."""
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer  # accelerate's own is a shell around it, which skips steps by itself
    if isinstance(found, torch.optim.Optimizer) and hasattr(found, "_optimizer_step_post_hooks"):
        return found
    raise OptionError(
        f"max-norm acts after an optimizer's steps, and {type(optimizer).__name__} is none that it can watch",
        where="optimizer",
        remedy="give a torch.optim.Optimizer, or one that accelerator.prepare returned",
    )


@torch.no_grad()
def _hold(made: MaxNorm, chosen: list[tuple[Site, Bound]], held: set[int]) -> None:
    lines: dict[int, dict[str, Any]] = {}
    for site, bound in chosen:
        line: dict[str, Any] = {"path": site.path, "paths": list(site.paths), "op": site.op}
        name = site.attribute or "weight"
        reason = why_not(site.owner, name)
        across = across_of(site)
        if reason is None and across is None:
            reason = _NO_ROWS
        if reason is not None:
            made.skipped.append({**line, "reason": reason[0], "remedy": reason[1]})
            continue
        rows = Rows(site.owner, across or (), 0.0, name)
        weight = rows.weight
        if id(weight) in lines:  # tied: it is held once
            lines[id(weight)]["paths"] += site.paths
            continue
        lines[id(weight)] = line
        norms = row_norms(weight, rows.across)
        if isinstance(bound, str):
            rows.bound = torch.where(norms > 0, norms * float(bound[:-1]), torch.inf)
        else:
            rows.bound = bound
        made._rows[site.path] = rows
        if not weight.requires_grad or id(weight) not in held:
            reason = _NOT_HELD if weight.requires_grad else _FROZEN
            made.skipped.append(line | {"reason": reason[0], "remedy": reason[1]})
            continue
        line |= {
            "shape": list(local_part(weight).shape),
            "rows": len(norms),
            "bound": bound,
            "largest": round(float(norms.max()), 6) if len(norms) else 0.0,
            "over": int((norms > bounds_of([rows], [norms])).sum()),
        }
        made.limited.append(line)
    if not made.limited:
        raise MisfitError(
            "none of the selected weights can be held: " + made.skipped[0]["reason"],
            where=f"first at {made.skipped[0]['path']!r}",
            remedy=made.skipped[0]["remedy"].removeprefix("nothing: "),
        )

"""`regraft.max_norm`: after each step of the optimizer, weight vectors that grew too long are scaled back.

A row is the incoming weight vector of an output unit; a limit is a pair of a selector and a bound.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from regraft.errors import (
    MisfitError,
    ModelError,
    NoMatchError,
    OptionError,
    RateError,
    RuleSyntaxError,
    WrongKindError,
)
from regraft.find.insertion_points import places
from regraft.find.inspect import inspect
from regraft.find.recognize import op_of
from regraft.find.selectors import Selector, read_selector
from regraft.find.site import Site
from regraft.find.walk import inner_model, named_modules
from regraft.find.weights import KINDS
from regraft.record import original_class
from regraft.report.view import SCHEMA, View

Bound = float | str
"""A norm, or `"1.1x"`, relative to a row's norm when the limit was set."""
_RELATIVE = re.compile(r"(\d+(\.\d+)?)x|x(\d+(\.\d+)?)")
_MOST = 0.5
_TOO_TIGHT = (
    "So this bound changes the model more than training does; a bound relative to the norms as they were, "
    "such as '1.1x', leaves a pretrained model whole"
)
_TOO_FAST = "One step took them beyond their bounds: the learning rate is high for a pretrained model"


_IN_FORCE: weakref.WeakSet[MaxNorm] = weakref.WeakSet()
"""What is held anywhere, so that a saved plan tells of it; optimizers keep them alive."""


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
        self._root = root
        self._rows: dict[str, _Rows] = {}
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def to_dict(self) -> dict[str, Any]:
        """The limits as plain JSON values."""
        names = ("model", "rules", "limited", "skipped", "first", "notes")
        return {"schema": SCHEMA, "view": "max_norm", **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """The norms of all rows as they are now, by the path of their layer."""
        return {path: rows.norms() for path, rows in self._rows.items()}

    def remove(self) -> None:
        """End it: weights stay as they are, and are limited no more."""
        self._handle.remove()
        _IN_FORCE.discard(self)

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
            self._rows[path].bound = bound.to(own[path].dtype, copy=True)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *_: Any) -> None:
        held = _parameters(optimizer)
        distinct = {id(rows.weight): rows for rows in self._rows.values()}  # tied weights may come later
        every = [
            rows
            for key, rows in distinct.items()
            if key in held and rows.weight.requires_grad and rows.weight.numel()
        ]
        # A GradScaler lets fused optimizers find out for themselves that a step is to be skipped.
        skipped = getattr(optimizer, "found_inf", None)
        if self.first is None and every and not (skipped is not None and bool(skipped > 0)):
            self._look_first(every)
        _scale_back(every, skipped)

    def _look_first(self, every: list[_Rows]) -> None:
        norms = [rows.norms() for rows in every]
        over = sum(rows.over(norm) for rows, norm in zip(every, norms, strict=True))
        count = sum(map(len, norms))
        self.first = {"rows": count, "over": over}
        if over > _MOST * count:
            middle = float(torch.cat([norm.float().cpu() for norm in norms]).median())
            relative = all(isinstance(rows.bound, Tensor) for rows in every)
            warnings.warn(
                f"max-norm scales back {over:,} of {count:,} rows at its first step: their norms are around "
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
    rules = _read_limits(limits)
    watched = _watched(optimizer)
    chosen = _limited_sites(root, rules, inputs)
    result = MaxNorm(root, watched, [[selector.text, bound] for selector, bound in rules])
    result.notes += notes
    try:
        _hold(result, chosen, _parameters(watched))
        bare = sum(int(bound.isinf().sum()) for bound in result.state_dict().values())
        if bare:
            result.notes.append(f"{bare:,} rows are all zeros: a bound relative to nothing leaves them free")
    except BaseException:
        result.remove()
        raise
    _IN_FORCE.add(result)
    return result


def limits_on(root: nn.Module) -> list[dict[str, Any]] | None:
    """The limits that hold weights of a model, with their relative bounds as lists; None without any."""
    limits = [(held.rules, held.state_dict()) for held in _IN_FORCE if held._root is root]
    return [
        # A row of zeros has no bound, which is written as 0.
        {"rules": rules, "bounds": {path: x.where(x < torch.inf, 0).tolist() for path, x in bounds.items()}}
        for rules, bounds in limits
    ] or None


def restore_limits(model: nn.Module, saved: Mapping[str, Any], optimizer: Any) -> MaxNorm:
    """The limits that `limits_on` gave, on a model like the one that had them."""
    result = max_norm(model, dict(saved["rules"]), optimizer)
    try:
        bounds = {path: torch.tensor(x, dtype=torch.float64) for path, x in saved["bounds"].items()}
        result.load_state_dict({path: x.where(x > 0, torch.inf) for path, x in bounds.items()})
    except BaseException:
        result.remove()
        raise
    return result


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


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
def _hold(result: MaxNorm, chosen: list[tuple[Site, Bound]], held: set[int]) -> None:
    lines: dict[int, dict[str, Any]] = {}
    for site, bound in chosen:
        line: dict[str, Any] = {"path": site.path, "paths": list(site.paths), "op": site.op}
        name = site.attribute or "weight"
        across = _across(site)
        reason = _why_not(site.owner, name)
        if reason is not None or across is None:
            unknown = "which of its axes are rows is not known: what multiplies is a copy"
            reason = reason or (unknown, "leave it alone")
            result.skipped.append({**line, "reason": reason[0], "remedy": reason[1]})
            continue
        rows = _Rows(site.owner, name, across)
        weight = rows.weight
        if id(weight) in lines:  # tied: it is held once
            lines[id(weight)]["paths"] += site.paths
            continue
        lines[id(weight)] = line
        norms = rows.norms()
        if isinstance(bound, float):
            rows.bound = bound
        else:
            rows.bound = torch.where(norms > 0, norms * float(bound[:-1]), torch.inf)
        result._rows[site.path] = rows
        if not weight.requires_grad or id(weight) not in held:
            reason = ("it is frozen", "nothing: it is held as soon as it trains")
            if weight.requires_grad:
                reason = ("the optimizer does not hold it", "nothing: it is held once it is in a param group")
            result.skipped.append(line | {"reason": reason[0], "remedy": reason[1]})
            continue
        line |= {
            "shape": list(_local(weight).shape),
            "rows": len(norms),
            "bound": bound,
            "largest": round(float(norms.max()), 6) if len(norms) else 0.0,
            "over": rows.over(norms),
        }
        result.limited.append(line)
    if not result.limited:
        raise MisfitError(
            "none of the selected weights can be held: " + result.skipped[0]["reason"],
            where=f"first at {result.skipped[0]['path']!r}",
            remedy=result.skipped[0]["remedy"].removeprefix("nothing: "),
        )


def _read_limits(limits: Any) -> list[tuple[Selector, Bound | None]]:
    if not isinstance(limits, Mapping) or not limits:
        raise RuleSyntaxError(f"{limits!r} is no set of limits", remedy="write {'Linear': 3.0}")
    read = [(read_selector(key), bound) for key, bound in limits.items()]
    for selector, _ in read:
        if selector.position:
            raise RuleSyntaxError(
                "a weight has no place before or after", where=f"limit for {selector.text!r}"
            )
    return [(selector, _bound(bound, f"limit for {selector.text!r}")) for selector, bound in read]


def _bound(bound: Any, where: str) -> Bound | None:
    if bound is None:
        return None
    relative = _RELATIVE.fullmatch(bound.strip()) if isinstance(bound, str) else None
    if relative is not None:
        factor = float(relative[1] or relative[3])
        if factor < 1:
            raise RateError(f"{bound!r} would shrink every row", where=where, remedy="a factor of 1 or more")
        return f"{factor:g}x"
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise OptionError(f"{bound!r} is no bound", where=where, remedy="a norm, 3.0; or relative, '1.1x'")
    if not 0 < bound < float("inf"):
        raise RateError(f"{bound!r} is no norm to hold weights to", where=where, remedy="a number above 0")
    return float(bound)


def _limited_sites(
    root: nn.Module, rules: list[tuple[Selector, Bound | None]], inputs: Any
) -> list[tuple[Site, Bound]]:
    """The weights to hold, each with the bound of the last limit that selects it or one that shares it."""
    sites = _limitable(root, rules, inputs)
    weights = [site.owner._parameters.get(site.attribute or "weight") for site in sites]
    keys = [id(site if weight is None else weight) for site, weight in zip(sites, weights, strict=True)]
    selected: set[int] = set()
    bounds: dict[int, Bound | None] = {}
    for selector, bound in rules:
        where = f"limit for {selector.text!r}"
        matching = [index for index, site in enumerate(sites) if selector.matches(site)]
        if not matching:
            layers = sorted({site.op for site in sites if _has_rows(site)})
            has = f"this model's layers with rows are {', '.join(layers) or 'none'}"
            raise NoMatchError("the limit matches nothing", where=where, remedy=has)
        fitting = [index for index in matching if _has_rows(sites[index])]
        if not fitting and bound is not None:
            kinds = ", ".join(sorted({sites[index].op for index in matching}))
            raise WrongKindError(
                f"{kinds} has no incoming weights of output units",
                where=where,
                remedy="max-norm is for Linear, Conv1D and convolution layers",
            )
        selected.update(fitting)
        bounds |= {keys[index]: bound for index in fitting}
    chosen = [(sites[index], bounds[keys[index]]) for index in sorted(selected)]
    return [(site, bound) for site, bound in chosen if bound is not None]


def _limitable(root: nn.Module, rules: list[tuple[Selector, Bound | None]], inputs: Any) -> list[Site]:
    """Every module, and the weights that others multiply by, if a limit asks for matrices."""
    every = places(named_modules(root))
    if not any(selector.type in KINDS for selector, _ in rules):
        return every
    sites = inspect(root, inputs).sites
    lent = [site for site in sites if site.kind == "weight" and site.family == "Linear"]
    held = {id(site.owner) for site in lent if site.attribute == "weight"}
    return [*(site for site in every if id(site.module) not in held), *lent]


def _has_rows(site: Site) -> bool:
    return site.kind == "weight" or _unit_axis(site.module) is not None


def _unit_axis(module: nn.Module) -> int | None:
    """The axis of a module's weight along which its output units lie; None if it has no such rows."""
    cls, op = original_class(module), op_of(module)
    if op == "Conv1D":
        return 1
    if op == "Linear" or issubclass(cls, nn.Linear):
        return 0
    if issubclass(cls, _ConvNd):
        return 1 if module.transposed else 0
    return None


def _across(site: Site) -> tuple[int, ...] | None:
    """The axes of one row of a site's weight; None if it has no rows, or none that are known."""
    if site.kind == "weight":
        return None if site.contracted is None else (site.contracted,)
    axis, weight = _unit_axis(site.module), site.module._parameters.get("weight")
    if axis is None or (axis == 1 and getattr(site.module, "groups", 1) > 1):
        return None  # of a grouped transposed convolution no axis of the weight is that of its units
    return tuple(other for other in range(2 if weight is None else weight.dim()) if other != axis)


def _why_not(module: nn.Module, name: str) -> tuple[str, str] | None:
    """Why the rows of a weight cannot be limited, and the remedy; None if they can."""
    if is_parametrized(module, name):
        return "its weight is computed, by a parametrization", "limit it before that, or take that out"
    weight = module._parameters.get(name)
    if weight is None:
        return "its weight is computed by a hook, and no parameter", "take that out, for example prune.remove"
    if is_lazy(weight):
        return "it is lazy and has no weight yet", "run one forward first"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, no plain numbers", "leave it alone"
    if any(placement.is_partial() for placement in getattr(weight, "placements", ())):
        return "its weight is a partial sum over processes", "leave it alone"
    return None


@dataclass
class _Rows:
    """The rows of one weight, along the axes `across`, and their bound: a number, or one for each row.

    The weight is looked up at each step, since sharding and loading may put another in its place.
    """

    module: nn.Module
    name: str
    across: tuple[int, ...]
    bound: float | Tensor = torch.inf

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module._parameters[self.name]  # type: ignore[assignment]
        return weight

    def norms(self) -> Tensor:
        """The norm of each row that this process holds, in float32 (float64 for such weights).

        Where the rows themselves are spread over processes, it is the norm of the whole row.
        """
        weight = self.weight
        local = _local(weight)
        wide = torch.float64 if local.dtype is torch.float64 else torch.float32
        norms: Tensor = torch.linalg.vector_norm(local, dim=self.across, dtype=wide).flatten()
        placed = enumerate(getattr(weight, "placements", ()))
        spread = [i for i, where in placed if where.is_shard() and where.dim % local.dim() in self.across]
        if not spread:
            return norms
        squares: Tensor = norms.square_()
        for i in spread:
            torch.distributed.all_reduce(squares, group=weight.device_mesh.get_group(i))  # type: ignore[attr-defined]
        return squares.sqrt_()

    def bounds(self, norms: Tensor) -> Tensor:
        """The bound of each row."""
        if not isinstance(self.bound, Tensor):
            return torch.full_like(norms, self.bound)
        if self.bound.shape != norms.shape:
            raise ModelError(
                f"max-norm knows the norms of {len(self.bound)} rows, and the weight has {len(norms)} now",
                where=type(self.module).__name__,
                remedy="call regraft.max_norm after sharding or resizing the model",
            )
        return self.bound.to(norms.device)

    def over(self, norms: Tensor) -> int:
        """How many rows are above their bounds."""
        return int((norms > self.bounds(norms)).sum())


def _local(weight: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor itself."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def _scale_back(every: Sequence[_Rows], skipped: Tensor | None) -> None:
    """Scale the rows above their bounds back to them, in place; the others stay bit for bit.

    `skipped`, of a fused optimizer under a GradScaler, is above 0 if it has made no step.
    """
    groups: dict[tuple[torch.device, bool], list[_Rows]] = {}
    for rows in every:
        groups.setdefault((rows.weight.device, rows.weight.dtype is torch.float64), []).append(rows)
    for group in groups.values():
        norms = [rows.norms() for rows in group]
        bounds = [rows.bounds(norm) for rows, norm in zip(group, norms, strict=True)]
        # One kernel for all norms: on a GPU each layer would else wait for several launches of its own.
        scale = torch.cat(bounds).div_(torch.cat(norms)).clamp_(max=1)
        if skipped is not None:
            scale = torch.where(skipped.to(scale.device) > 0, 1.0, scale)
        on_cpu = scale.device.type == "cpu"
        if on_cpu and not bool((scale < 1).any()):
            continue
        parts: Sequence[Tensor] = torch.split(scale, [len(norm) for norm in norms])
        for rows, part in zip(group, parts, strict=True):
            # Elsewhere than on a CPU to ask would be to wait for the device.
            if on_cpu and not bool((part < 1).any()):
                continue
            local = _local(rows.weight)
            shape = [1 if axis in rows.across else size for axis, size in enumerate(local.shape)]
            local.mul_(part.view(shape))

"""Rows of weights: the incoming weight vector of each output unit, its norm, and scaling it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from regraft.errors import ModelError
from regraft.find.recognize import op_of
from regraft.find.site import Site
from regraft.record import original_class


@dataclass
class Rows:
    """The rows of one weight and their bound: a number, or one for each row.

    Attributes:
        module: the layer whose weight it is; the weight is looked up at each step, since sharding and
            loading may put another in its place.
        across: the axes of one row; the output units lie along the others.
        bound: norms are held to it.
        name: the weight's attribute of the module.
    """

    module: nn.Module
    across: tuple[int, ...]
    bound: float | Tensor
    name: str = "weight"

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.module._parameters[self.name]  # type: ignore[assignment]
        return found


def unit_axis(module: nn.Module) -> int | None:
    """The axis of a module's weight along which its output units lie; None if it has no such rows."""
    cls, op = original_class(module), op_of(module)
    if op == "Conv1D":
        return 1
    if op == "Linear" or issubclass(cls, nn.Linear):
        return 0
    if issubclass(cls, _ConvNd):
        return 1 if module.transposed else 0
    return None


def across_of(site: Site) -> tuple[int, ...] | None:
    """The axes of one row of a site's weight; None if it has no rows, or none that are known."""
    if site.kind == "weight":
        return None if site.contracted is None else (site.contracted,)
    axis, weight = unit_axis(site.module), site.module._parameters.get("weight")
    if axis is None or (axis == 1 and getattr(site.module, "groups", 1) > 1):
        return None  # of a grouped transposed convolution no axis of the weight is that of its units
    return tuple(one for one in range(2 if weight is None else weight.dim()) if one != axis)


def why_not(module: nn.Module, name: str = "weight") -> tuple[str, str] | None:
    """Why the rows of a module cannot be limited, and the remedy; None if they can."""
    if is_parametrized(module, name):
        return "its weight is computed, by a parametrization", "limit it before that, or take that out"
    weight = module._parameters.get(name)
    if weight is None:
        return "its weight is computed by a hook, and no parameter", "take that out, for example prune.remove"
    if is_lazy(weight):
        return "it is lazy and has no weight yet", "run one forward first"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, no plain numbers", "leave it alone"
    if any(one.is_partial() for one in getattr(weight, "placements", ())):
        return "its weight is a partial sum over processes", "leave it alone"
    return None


def row_norms(weight: Tensor, across: tuple[int, ...]) -> Tensor:
    """The norm of each row that this process holds, in float32 (float64 for such weights).

    Where the rows themselves are spread over processes, it is the norm of the whole row.
    """
    local = local_part(weight)
    wide = torch.float64 if local.dtype is torch.float64 else torch.float32
    placed = getattr(weight, "placements", ())
    spread = [
        one for one, where in enumerate(placed) if where.is_shard() and where.dim % local.dim() in across
    ]
    norms: Tensor = torch.linalg.vector_norm(local, dim=across, dtype=wide).flatten()
    if not spread:
        return norms
    squares: Tensor = norms.square_()
    for one in spread:
        torch.distributed.all_reduce(squares, group=weight.device_mesh.get_group(one))  # type: ignore[attr-defined]
    return squares.sqrt_()


def local_part(weight: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor itself."""
    if not hasattr(weight, "to_local"):
        return weight
    local: Tensor = weight.to_local()
    return local


@torch.no_grad()
def scale_back(rows: Sequence[Rows], skipped: Tensor | None = None) -> None:
    """Scale the rows above their bounds back to them, in place; the others stay bit for bit.

    Args:
        rows: of weights that are all different.
        skipped: of a fused optimizer under a GradScaler: above 0 if it has made no step.
    """
    for group in _alike(rows):
        weights = [one.weight for one in group]
        norms = [row_norms(weight, one.across) for weight, one in zip(weights, group, strict=True)]
        # One kernel for all norms: on a GPU each layer would else wait for several launches of its own.
        scale = bounds_of(group, norms).div_(torch.cat(norms)).clamp_(max=1)
        if skipped is not None:
            scale = torch.where(skipped.to(scale.device) > 0, 1.0, scale)
        on_cpu = scale.device.type == "cpu"
        if on_cpu and not bool((scale < 1).any()):
            continue
        parts: Sequence[Tensor] = torch.split(scale, [len(norm) for norm in norms])
        for weight, one, part in zip(weights, group, parts, strict=True):
            # Elsewhere than on a CPU to ask would be to wait for the device.
            if on_cpu and not bool((part < 1).any()):
                continue
            local = local_part(weight)
            local.mul_(
                part.view([1 if axis in one.across else size for axis, size in enumerate(local.shape)])
            )


def bounds_of(group: Sequence[Rows], norms: Sequence[Tensor]) -> Tensor:
    """The bound of each row, in the order of the norms."""
    bounds = []
    for one, norm in zip(group, norms, strict=True):
        if not isinstance(one.bound, Tensor):
            bounds.append(torch.full_like(norm, one.bound))
            continue
        if one.bound.shape != norm.shape:
            raise ModelError(
                f"max-norm knows the norms of {len(one.bound)} rows, and the weight has {len(norm)} now",
                where=type(one.module).__name__,
                remedy="call regraft.max_norm after sharding or resizing the model",
            )
        bounds.append(one.bound.to(norm.device))
    return torch.cat(bounds)


def _alike(rows: Sequence[Rows]) -> list[list[Rows]]:
    """The rows by device and by the precision of their norms."""
    groups: dict[tuple[torch.device, bool], list[Rows]] = {}
    for one in rows:
        groups.setdefault((one.weight.device, one.weight.dtype is torch.float64), []).append(one)
    return list(groups.values())

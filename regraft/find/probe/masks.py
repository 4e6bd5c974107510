"""Masks written by hand, followed from the draw to the tensor that they are applied to.

What a mask is divided, compared or subtracted by on the way gives the rate, and the shapes of the two where
it is applied give the law. Only tensors that come from a draw are followed, so nothing else costs time.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

ELEMENTS, ROWS, SHARED = "elements", "rows", "shared"
_UNIFORM = ("rand", "rand_like", "uniform_")
_BELOW = ("lt", "lt_", "le", "le_")
_ABOVE = ("gt", "gt_", "ge", "ge_")
_FLIPS = ("logical_not", "bitwise_not", "rsub", "logical_not_", "bitwise_not_", "eq", "eq_")
_APPLIES = ("mul", "mul_", "masked_fill", "masked_fill_", "where", "div", "div_", "add", "add_")
_POOLS = ("max_pool2d_with_indices", "max_pool3d_with_indices")
"""What makes blocks of a mask's single elements, as DropBlock does."""
_MOST = 256
"""Tensors followed at a time."""


@dataclass(frozen=True)
class _Label:
    """A tensor that comes from a draw.

    Attributes:
        draw: the draw.
        tensor: kept, so that its id stays its own.
        shape: of the mask, before it is expanded to what it is applied to.
        uniform: whether it still holds uniform numbers, to which `shift` was added.
        binary: whether it is a mask by now: of numbers that are 0, or all the same.
        keep: the probability that an entry is not 0, where it can be read.
        jitter: whether it holds uniform numbers around 1.
    """

    draw: Any
    tensor: Tensor
    shape: tuple[int, ...]
    uniform: bool = False
    shift: float = 0.0
    binary: bool = False
    keep: float | None = None
    jitter: bool = False


class Masks:
    """The tensors that come from a draw; `parameters` are the ids of the model's own."""

    def __init__(self, parameters: Container[int]) -> None:
        self.parameters = parameters
        self._labels: dict[int, _Label] = {}

    def __bool__(self) -> bool:
        return bool(self._labels)

    def begin(self, draw: Any, tensor: Tensor, name: str, args: tuple[Any, ...]) -> None:
        """Follow what `draw` has drawn."""
        keep = None
        binary = name in ("bernoulli_", "bernoulli")
        if binary:
            p = args[1] if len(args) > 1 else 0.5 if name == "bernoulli_" else None  # a default is left out
            keep = float(p) if isinstance(p, (int, float)) else None
        if len(self._labels) < _MOST:
            bounds = args[1:3] if name == "uniform_" else ()
            uniform = name in _UNIFORM and bounds in ((), (0.0, 1.0))
            jitter = len(bounds) == 2 and bounds[0] < 1 and abs(sum(bounds) - 2) < 1e-6
            shape = tuple(tensor.shape)
            self._labels[id(tensor)] = _Label(
                draw, tensor, shape, uniform, binary=binary, keep=keep, jitter=jitter
            )

    def follow(self, func: Any, name: str, args: tuple[Any, ...], result: Any) -> None:
        """One operation ran; if it read a tensor that is followed, its result is, or the mask is applied."""
        at = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and id(a) in self._labels), None)
        if at is None:
            return
        label = self._labels[id(args[at])]
        if isinstance(result, (bool, int, float)):
            label.draw.read = True
            return
        if isinstance(result, tuple) and name in _POOLS:
            label.draw.kind = "DropBlock" if label.binary else ""
            result = result[0]
        if not isinstance(result, Tensor):
            return
        others = [a for a in args if isinstance(a, Tensor) and id(a) not in self._labels and a.dim()]
        if others and name in _APPLIES:
            x = max(others, key=lambda a: a.numel())
            if x.numel() >= label.tensor.numel():
                self._apply(label, name, x)
                if label.uniform and result.shape == label.tensor.shape:  # it may be compared yet
                    self._labels[id(result)] = replace(label, tensor=result, uniform=False)
                elif args[at] is not result:
                    del self._labels[id(args[at])]
                return
        if result is not args[at] or name.endswith("_"):
            self._labels[id(result)] = _step(label, func, name, args, result)

    def _apply(self, label: _Label, name: str, x: Tensor) -> None:
        draw, shape = label.draw, tuple(x.shape)
        if draw.applied is not None and not label.binary:
            return
        draw.applied, draw.to_weight = shape, id(x) in self.parameters
        if label.jitter and name in ("mul", "mul_"):
            draw.kind = "jitter"
        draw.law = _law(label.shape, shape, to_weight=draw.to_weight) if label.binary else ""
        if label.keep is not None and 0 <= label.keep <= 1:
            draw.p = round(label.keep if name.startswith("masked_fill") else 1 - label.keep, 12)


def _step(label: _Label, func: Any, name: str, args: tuple[Any, ...], result: Tensor) -> _Label:
    """The label of the result of an operation on a labelled tensor."""
    number = next((a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)), None)
    changed: dict[str, Any] = {"tensor": result}
    if func.is_view and not name.startswith("expand"):
        changed["shape"] = tuple(result.shape)
    if label.uniform and number is not None:
        if name in ("add", "add_"):
            changed["shift"] = label.shift + number
        elif name in ("sub", "sub_"):
            changed["shift"] = label.shift - number
        elif name in _BELOW:
            changed |= {"uniform": False, "binary": True, "keep": number - label.shift}
        elif name in _ABOVE:
            changed |= {"uniform": False, "binary": True, "keep": 1 - (number - label.shift)}
        elif not func.is_view:
            changed["uniform"] = False
    elif number is not None and name in (*_BELOW, *_ABOVE) and label.keep is None:
        changed["binary"] = True
    elif label.uniform and name in ("floor", "floor_"):
        changed |= {"uniform": False, "binary": True, "keep": label.shift}
    elif label.keep is not None and (name in _FLIPS and (name[:2] != "eq" or number == 0)):
        changed["keep"] = 1 - label.keep
    return replace(label, **changed)


def _law(mask: tuple[int, ...], x: tuple[int, ...], *, to_weight: bool) -> str:
    """How a mask of one shape, applied to a tensor of another, drops."""
    mask = (1,) * (len(x) - len(mask)) + mask
    if mask == x:
        return ELEMENTS
    one_a_row = len(x) > 1 and mask[0] == x[0] and all(size == 1 for size in mask[1:])
    return ROWS if one_a_row and not to_weight else SHARED

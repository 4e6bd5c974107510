"""The thin modules' bases: a variant's function, its rate and its options, as an `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regraft.errors import RateError
from regraft.libraries import is_conv1d
from regraft.variants.spec import written_value

SHOWS = "_regraft_shows"
"""On the class of a grafted module: the variant's own class."""


def check_rate(p: object, *, where: str = "") -> float:
    """`p` as a float in [0, 1), or RateError."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise RateError(f"a rate is a number in [0, 1), not {p!r}", where=where)
    if p == 1:
        raise RateError(
            "p=1 drops everything: a dead layer is no regularizer",
            where=where,
            remedy="give a rate below 1; 'off' takes a regularizer out",
        )
    if not 0 <= p < 1:
        raise RateError(f"p={p!r} is not in [0, 1)", where=where, remedy="p is the probability to drop")
    return float(p)


class VariantType(type):
    """The class of variants' classes: a grafted module is an instance of the variant that it shows."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or issubclass(getattr(type(instance), SHOWS, object), cls)


class DropoutVariant(nn.Module, metaclass=VariantType):
    """Base of the dropout family: `forward(x)` is `function(x, p, training, **options)`."""

    function: ClassVar[Callable[..., Tensor]]
    state: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters and buffers that `function` takes as keyword arguments."""

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raises OptionError or RateError for options out of range."""

    def __init__(self, p: float, **options: Any) -> None:
        super().__init__()
        type(self).check(options)
        self.p = check_rate(p)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        state = {name: getattr(self, name) for name in type(self).state}
        return type(self).function(x, self.p, self.training, **self.options, **state)

    def extra_repr(self) -> str:
        return written_options(self.p, self.options)


class LinearVariant(nn.Linear, metaclass=VariantType):
    """Base of the linear family: `function(x, weight, bias, p, training, **options)`."""

    function: ClassVar[Callable[..., Tensor]]
    state: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raises OptionError or RateError for options out of range."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        type(self).check(options)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.p = check_rate(p)
        self.options = options

    def forward(self, input: Tensor) -> Tensor:
        state = {name: getattr(self, name) for name in type(self).state}
        function = type(self).function
        return function(input, self.weight, self.bias, self.p, self.training, **self.options, **state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {written_options(self.p, self.options)}"


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), which is not how a Conv1D (GPT-2) stores it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


_QUIET = {"exact": False, "couple_channels": False, "noise": "bernoulli", "eval": "plain", "match": "rate"}
"""What is printed only where it is something else."""


def written_options(p: float | None, options: dict[str, Any]) -> str:
    """`p=0.1, num_samples=8`, as a module's repr shows it, without options at None and at rest.

    The rate is left out where a `sigma` takes its place.
    """
    shown = {} if p is None or options.get("sigma") is not None else {"p": p}
    shown |= {key: value for key, value in options.items() if value is not None and _QUIET.get(key) != value}
    return ", ".join(f"{key}={written_value(value)}" for key, value in shown.items())

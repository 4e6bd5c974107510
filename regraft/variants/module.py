"""The thin modules' bases: a variant's function, its rate and its options, as an `nn.Module`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regraft.errors import RateError
from regraft.libraries import is_conv1d
from regraft.variants.spec import DEFAULT_RATE, Spec, written_value

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


def acts(p: float, training: bool) -> bool:
    """Does a variant at rate `p` act now? RateError for what is no rate."""
    return check_rate(p) > 0 and training


class VariantType(type):
    """The class of the thin modules' classes."""

    def __instancecheck__(cls, instance: object) -> bool:
        """A grafted module is an instance of the variant that it shows."""
        return super().__instancecheck__(instance) or issubclass(getattr(type(instance), SHOWS, object), cls)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Of the constructor, with the variant's options by name."""
        _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        if parameters and parameters[-1].name == "options":
            spec = getattr(cls, "spec", None)
            options = spec.defaults.items() if spec else ()
            named = inspect.Parameter.KEYWORD_ONLY
            parameters[-1:] = [inspect.Parameter(name, named, default=default) for name, default in options]
        return inspect.Signature(parameters)


class ThinModule(nn.Module, metaclass=VariantType):
    """Base of the thin modules; a `Spec` decorates them."""

    family: ClassVar[str] = "Dropout"
    spec: ClassVar[Spec]
    p: float
    options: dict[str, Any]

    def _settle(self, p: float, options: Mapping[str, Any]) -> None:
        spec = self.spec
        spec.check(options)
        self.p = check_rate(p) if spec.rated else 0.0
        self.options = spec.complete(options)
        state = spec.state(self, {**self.options, "p": self.p}) if spec.state else {}
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=name not in spec.transient)

    def _run(self, *given: Any) -> Tensor:
        function, names = self.spec.function_for(self.family), self.spec.tensors
        state = {}
        if self.spec.adds_state(self.options):
            state = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return function(*given, self.p, self.training, **self.options, **state)  # type: ignore[no-any-return]


class DropoutVariant(ThinModule):
    """Base of the dropout family: `forward(x)` is `function(x, p, training, **options)`."""

    def __init__(self, p: float = DEFAULT_RATE, **options: Any) -> None:
        super().__init__()
        self._settle(p, options)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def extra_repr(self) -> str:
        return written_options(self.p if self.spec.rated else None, self.options)


class LinearVariant(ThinModule, nn.Linear):
    """Base of the linear family: `function(x, weight, bias, p, training, **options)`."""

    family = "Linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = DEFAULT_RATE,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._settle(p, options)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, self.weight, self.bias)

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

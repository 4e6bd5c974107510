"""What a variant is: its function, its module, its options; and a variant with options chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from regraft.errors import OptionError, RegraftError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    Rate = float | str | Callable[[Any], float]
    """A probability to drop in [0, 1); "x2", relative to the site's own; or a callable of the site."""

_Class = TypeVar("_Class", bound=type[Any])
DEFAULT_RATE = 0.2
"""Where a rule puts a rate and names none: the low end of the 0.2 to 0.5 of Srivastava et al. 2014."""
_RATES = ("rate", "prob", "probability", "drop_prob", "drop_rate", "dropout", "dropout_rate")
"""What other libraries call `p`."""


@dataclass(frozen=True)
class Spec:
    """A registered variant.

    `function` is the whole variant, both of training and of eval:

    - in the "Dropout", "DropPath" and "Embedding" families `function(x, p, training, **options)`;
      for an embedding x is what the embedding returns;
    - in the "Linear" family `function(x, weight, bias, p, training, **options)`, with the weight as
      (out, in) and the bias possibly None.

    Its keyword-only parameters are the options, except those annotated as tensors: they are the state
    that `state` adds to a module (parameters or buffers of the same names).
    """

    name: str
    function: Callable[..., Any]
    families: tuple[str, ...] = ("Dropout",)
    checks: Mapping[str, Callable[[str, Any], None]] = field(default_factory=dict)
    """For an option, what raises OptionError or RateError for a value out of range."""
    changes_eval: Callable[[Mapping[str, Any]], bool] | None = None
    """Of the complete options: is the eval output another than the original's? None: never."""
    needs_rate: Callable[[Mapping[str, Any]], bool] | None = None
    """Of the complete options: does a site at rate 0 do nothing? None: yes."""
    state: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None
    """Of the module at the site and the complete options, `p` included: the tensors to add, by name."""
    state_when: Callable[[Mapping[str, Any]], bool] | None = None
    """Of the complete options: does it bring state at all? None: always, if `state` is given."""
    transient: tuple[str, ...] = ()
    """Names of buffers among them that stay out of the state dict."""
    on_mode: Callable[[nn.Module, bool], None] | None = None
    """Called with the module after its `train(mode)` or `eval()`: a new run begins."""
    penalty: Callable[[nn.Module, Mapping[str, Any], Sequence[Tensor]], Any] | None = None
    """Of the module, the complete options and the weights that multiply its output, as far as they are
    known: what it adds to the loss; see `regraft.penalty`."""
    rated: bool = True
    """Does it have a rate, the option `p`?"""
    attention: bool = False
    """Does it act on attention weights, (..., queries, keys), and on nothing else?"""
    activations: bool = False
    """Does it drop whole parts of activations? Which axes those are is then read off the forward, where they
    are its options `channel_axis` and `batch_axis`, and attention weights are left out."""
    linear_function: Callable[..., Any] | None = None
    """Of a variant that takes the place of dropouts and of linears: the function for linears."""
    weight_function: Callable[..., Any] | None = None
    """Of a variant that can act on a weight by itself: `function(weight, p, **options)` is the weight that
    multiplies in its place, whoever multiplies by it. Called only where the variant acts."""
    weight_unfit: Callable[[Mapping[str, Any], Any], tuple[str, str] | None] | None = None
    """Of the complete options and the site of a weight: why it cannot act there, and the remedy."""
    weight_state: Callable[[Tensor], dict[str, Any]] | None = None
    """Of a weight: the tensors that `weight_function` takes as further keyword arguments, by name."""
    modules: dict[str, type[nn.Module]] = field(default_factory=dict)
    """The thin modules that it decorates, by their family."""
    defaults: dict[str, Any] = field(init=False)
    """The options, each with its default."""
    tensors: tuple[str, ...] = field(init=False)
    """Names of the tensors that the function takes as keyword arguments."""

    def __post_init__(self) -> None:
        # Now, and in no `cached_property`: before Python 3.12 it has a lock, which a compiler does not enter.
        parameters = inspect.signature(self.function).parameters.values()
        keywords = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
        tensors = tuple(one.name for one in keywords if "Tensor" in str(one.annotation))
        object.__setattr__(self, "tensors", tensors)
        defaults = {one.name: one.default for one in keywords if one.name not in tensors}
        object.__setattr__(self, "defaults", defaults)

    def __call__(self, module: _Class) -> _Class:
        """As a decorator: `module` is the variant's thin module for its family."""
        self.modules[module.family] = module
        module.spec = self
        return module

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options given, of those that are the variant's own, over its defaults."""
        return {name: options.get(name, default) for name, default in self.defaults.items()}

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises OptionError or RateError for an unknown option, or a value out of range."""
        where, known = f"variant {self.name!r}", [*(["p"] if self.rated else []), *self.defaults]
        for name, value in options.items():
            if name not in known:
                hint = f"the rate is p: '{self.name}(p=...)';" if name in _RATES and self.rated else ""
                listed = "its options are " + ", ".join(known) if known else "it has no options"
                raise OptionError(
                    f"{self.name!r} has no option {name!r}",
                    where=where,
                    remedy=f"{hint or nearest(name, known)} {listed}".strip(),
                )
            if name in self.checks and not (value is None and self.defaults[name] is None):
                try:
                    self.checks[name](name, value)
                except RegraftError as error:
                    error.where = error.where or where
                    raise

    def rate_matters(self, options: Mapping[str, Any]) -> bool:
        """False where another option says how strong the noise is."""
        return self.needs_rate is None or self.needs_rate(self.complete(options))

    def fits(self, family: str | None) -> bool:
        """Can it take the place at a site of `family`? What acts on a weight fits a convolution's too."""
        return family in self.families or (family == "Convolution" and self.weight_function is not None)

    def function_for(self, family: str) -> Callable[..., Any]:
        """The function that runs at a site of `family`."""
        return self.linear_function if family == "Linear" and self.linear_function else self.function

    def module_for(self, family: str) -> type[nn.Module]:
        """The module whose name a site of `family` shows after the graft."""
        return self.modules.get(family) or self.module

    @property
    def module(self) -> type[nn.Module]:
        """The first of its thin modules."""
        return next(iter(self.modules.values()))

    def adds_state(self, options: Mapping[str, Any]) -> bool:
        """Does the variant with these complete options bring parameters or buffers of its own?"""
        return self.state is not None and (self.state_when is None or self.state_when(options))

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True)
class Variant:
    """A registered variant with the options a rule gives it; options left out keep their defaults.

    Make one with `regraft.variant(name, **options)`, which checks both. `p` is among the options
    only if the rule names a rate.

    Example:
        >>> import regraft
        >>> regraft.variant("multisample", p=0.3, num_samples=4)
        multisample(p=0.3, num_samples=4)
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={written_value(value)}" for key, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name

    def __hash__(self) -> int:
        return hash((self.name, repr(self)))


def written_value(value: Any) -> str:
    """The value of an option as text; a float with six digits, so that 0.1 in float32 is printed as 0.1."""
    if callable(value):
        return f"<{getattr(value, '__name__', 'callable')}>"
    return repr(float(f"{value:.6g}") if isinstance(value, float) else value)

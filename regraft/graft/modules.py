"""The layer of a module site: the module does what its variant does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from regraft.find.kinds import rate_name
from regraft.find.site import Site
from regraft.graft.classes import Namespace, layer
from regraft.planning.edits import Edit
from regraft.record import RECORD, Graft
from regraft.variants.module import written_options
from regraft.variants.registry import complete_options, spec
from regraft.variants.spec import Spec

SLOT = "variant"


def module_graft(site: Site, edit: Edit) -> Graft:
    """The graft that makes the module at `site` do what `edit` says; nothing is changed yet."""
    found = spec(edit.variant)
    family = site.family or found.families[0]
    written: dict[str, Any] = {}
    if "p" in edit.options:
        written[rate_name(site.module) or "p"] = float(edit.options["p"])
    options = complete_options(found, edit.options)
    layer_name = f"{SLOT}:{found.name}/{family}/{next(iter(written), '')}"
    rate = {"p": edit.options["p"]} if "p" in edit.options else {}
    state = found.state(site.module, {**options, **rate}) if found.state else {}
    graft = Graft(layer_name, vars(edit), options, written=written, state=state, mends=edit.mends)
    graft.transient = found.transient
    return graft


def rate_graft(site: Site, edit: Edit) -> Graft:
    """The graft that only sets the rate of a module of torch that drops inside, such as an LSTM."""
    rate = 0.0 if edit.variant == "off" else float(edit.options["p"])
    return Graft("", vars(edit), written={rate_name(site.module) or "dropout": rate})


@layer(SLOT)
def _variant_layer(base: type[nn.Module], argument: str) -> Namespace:
    name, family, rate = argument.split("/")
    found = spec(name)
    forward = _FORWARDS[family](base, found, rate)
    title = found.module_for(family).__name__
    on_mode = {"train": _train(base, found.on_mode)} if found.on_mode else {}
    return {
        **on_mode,
        "__name__": title,
        "__qualname__": title,
        "__module__": found.module_for(family).__module__,
        "forward": functools.wraps(base.forward)(forward),
        "extra_repr": _extra_repr(base, rate),
    }


def _train(base: type[nn.Module], on_mode: Callable[[nn.Module, bool], None]) -> Callable[..., nn.Module]:
    @functools.wraps(base.train)
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        base.train(self, mode)
        on_mode(self, mode)
        return self

    return train


def _settings(module: nn.Module) -> dict[str, Any]:
    graft: Graft = module.__dict__[RECORD][SLOT]
    if not graft.state:
        return graft.options
    return {**graft.options, **{name: getattr(module, name) for name in graft.state}}


def _stands_aside(module: nn.Module, in_eval: bool) -> bool:
    """In eval; or after a revert, in a bound method that somebody kept (accelerate does)."""
    graft: Graft | None = module.__dict__.get(RECORD, {}).get(SLOT)
    return graft is None or not (module.training or in_eval or graft.mends)


def _dropout_forward(base: type[nn.Module], found: Spec, rate: str) -> Callable[..., Tensor]:
    function, in_eval = found.function, found.changes_eval is not None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _stands_aside(self, in_eval):
            return base.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        x = args[0] if args else next(iter(kwargs.values()))
        p = getattr(self, rate) if rate else 0.0
        return function(x, p, self.training, **_settings(self))  # type: ignore[no-any-return]

    return forward


def _linear_forward(base: type[nn.Module], found: Spec, rate: str) -> Callable[..., Tensor]:
    function, in_eval = found.function_for("Linear"), found.changes_eval is not None
    transposed = base.__name__ == "Conv1D"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _stands_aside(self, in_eval):
            return base.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        x = args[0] if args else next(iter(kwargs.values()))
        weight = self.weight.T if transposed else self.weight
        p = getattr(self, rate) if rate else 0.0
        return function(x, weight, self.bias, p, self.training, **_settings(self))  # type: ignore[no-any-return]

    return forward


def _embedding_forward(base: type[nn.Module], found: Spec, rate: str) -> Callable[..., Tensor]:
    function, in_eval = found.function, found.changes_eval is not None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = base.forward(self, *args, **kwargs)
        if _stands_aside(self, in_eval):
            return x
        p = getattr(self, rate) if rate else 0.0
        return function(x, p, self.training, **_settings(self))  # type: ignore[no-any-return]

    return forward


_FORWARDS = {
    "Dropout": _dropout_forward,
    "DropPath": _dropout_forward,
    "Linear": _linear_forward,
    "Embedding": _embedding_forward,
}


def _extra_repr(base: type[nn.Module], rate: str) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        graft: Graft = self.__dict__[RECORD][SLOT]
        own = "" if issubclass(base, nn.modules.dropout._DropoutNd) else base.extra_repr(self)
        new = written_options(getattr(self, rate) if rate else None, graft.options)
        return ", ".join(filter(None, [own, new]))

    return extra_repr

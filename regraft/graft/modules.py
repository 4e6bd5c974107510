"""The layer of a module site: the module does what its variant does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from regraft.find.recognize import rate_name
from regraft.graft.classes import Namespace
from regraft.graft.handlers import written_back
from regraft.graft.slots import is_applied, require_state, state_methods
from regraft.libraries import is_conv1d
from regraft.planning.plan import Edit
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.variants.module import SHOWS, written_options
from regraft.variants.registry import complete_options, spec
from regraft.variants.spec import Spec

VARIANT = Slot("variant")
RATE = Slot("rate")
_KEY = str(VARIANT)


def module_graft(edit: Edit) -> Graft:
    """The graft that makes the module at the edit's site do what the edit says; nothing is changed yet.

    One that is in place already keeps its state: no other is drawn.
    """
    assert edit.site is not None
    found, module = spec(edit.variant), edit.site.module
    p = edit.options.get("p")
    rate = {} if p is None else {"p": p}
    written = {} if p is None else {rate_name(module) or "p": float(p)}
    options = complete_options(found, edit.options)
    graft = Graft(
        VARIANT,
        Layer(variant_layer, (found.name, edit.family, next(iter(written), ""))),
        found.name,
        p,
        options,
        edit.to_dict(),
        written=written,
        fixes_eval=edit.fixes_eval,
        transient=found.transient,
    )
    if found.state:
        current = grafts_of(module).get(_KEY)
        if current is not None and is_applied(module, current, graft):
            graft.state = dict(current.state)
        else:
            graft.state = found.state(module, {**options, **rate})
    return graft


def rate_graft(edit: Edit, slot: Slot = RATE) -> Graft:
    """The graft that only sets the rate of a module that goes on to drop by its own law, as an LSTM does."""
    assert edit.site is not None
    rate = 0.0 if edit.variant == "off" else float(edit.options["p"])
    written = {rate_name(edit.site.module) or "dropout": rate}
    return Graft(slot, None, edit.variant, rate, edit=edit.to_dict(), written=written)


def variant_layer(base: type[nn.Module], name: str, family: str, rate: str) -> Namespace:
    """The layer of a variant: its forward, its name and its `repr`; the attribute `rate` has the rate."""
    found = spec(name)
    title = found.module_for(family).__name__
    on_mode = {"train": _train(base, found.on_mode)} if found.on_mode else {}
    return {
        **on_mode,
        **(state_methods(base) if found.state else {}),
        SHOWS: found.module_for(family),
        "__name__": title,
        "__qualname__": title,
        "__module__": found.module_for(family).__module__,
        "forward": functools.wraps(base.forward)(_FORWARDS[family](base, found, rate)),
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
    graft: Graft = module.__dict__[RECORD][_KEY]
    if not graft.state:
        return graft.options
    if graft.awaited:
        require_state(graft)
    return {**graft.options, **{name: getattr(module, name) for name in graft.state}}


def _stands_aside(module: nn.Module, in_eval: bool) -> bool:
    """In eval; or after a revert, in a bound method that somebody kept (accelerate does)."""
    graft: Graft | None = module.__dict__.get(RECORD, {}).get(_KEY)
    return graft is None or not (module.training or in_eval or graft.fixes_eval)


def _dropout_forward(base: type[nn.Module], found: Spec, rate: str) -> Callable[..., Tensor]:
    function, in_eval = found.function, found.changes_eval is not None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _stands_aside(self, in_eval):
            return base.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        x = args[0] if args else next(iter(kwargs.values()))
        p = getattr(self, rate) if rate else 0.0
        if not getattr(self, "inplace", False):
            return function(x, p, self.training, **_settings(self))  # type: ignore[no-any-return]
        return written_back(x, function(x.clone(), p, self.training, **_settings(self)))

    return forward


def _linear_forward(base: type[nn.Module], found: Spec, rate: str) -> Callable[..., Tensor]:
    function, in_eval = found.function_for("Linear"), found.changes_eval is not None
    transposed = is_conv1d(base)

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
        graft: Graft | None = self.__dict__.get(RECORD, {}).get(_KEY)
        if graft is None:  # between two states
            return base.extra_repr(self)
        own = "" if issubclass(base, nn.modules.dropout._DropoutNd) else base.extra_repr(self)
        new = written_options(getattr(self, rate) if rate else None, graft.options)
        return ", ".join(filter(None, [own, new]))

    return extra_repr

"""Generated classes: what a grafted module's class is, and how to take a layer out of it again.

A graft changes what a module does by giving it a class derived from its own, so that references, hooks,
tied weights, optimizers and sharding survive by construction. Each layer (a variant, the handling of
calls, an insertion) is one derived class with one reason to exist; the chain above a user's class is
rebuilt from its layers, never undone by assignment, because other tools may since have put
a class of their own on top.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from regraft.errors import RevertError
from regraft.graft.graph_classes import graph_methods, stable_base
from regraft.record import BASE, LAYER, Layer, foreign_base, is_foreign, is_generated

Namespace = dict[str, Any]
"""What a layer's builder returns: methods, and a `__name__` if the class is not to keep the one below's."""
Class = type[nn.Module]
_derived: dict[tuple[Class, Layer], Class] = {}
_rebuilt: dict[tuple[Class, Class], Class] = {}


def derive(base: Class, layer: Layer) -> Class:
    """The class that adds a layer to `base`; always the same one for the same two."""
    key = (base, layer)
    if key not in _derived:
        namespace = dict(layer.build(stable_base(base), *layer.args))
        title = namespace.pop("__name__", base.__name__)
        namespace.setdefault("__module__", base.__module__)
        namespace.setdefault("__qualname__", base.__qualname__)
        namespace.setdefault("__doc__", base.__doc__)
        namespace |= {BASE: base, LAYER: layer, "__reduce_ex__": _reduce_ex}
        namespace |= graph_methods(base, lambda cls, other: layered(cls, layers_of(other)))
        _derived[key] = _new_class(base, title, (base,), namespace)
    return _derived[key]


def layered(cls: Class, layers: Sequence[Layer]) -> Class:
    """The class of a module of class `cls` once its grafts are exactly `layers`, the lowest first.

    Classes that torch generated stay on top: they look for the user's methods right below themselves.
    """
    if is_foreign(cls):
        below = foreign_base(cls)
        wanted = layered(below, layers)
        return cls if wanted is below else _rebuild_foreign(cls, wanted)
    while is_generated(cls):
        cls = cls.__dict__[BASE]
    hidden = [one for one in cls.__mro__ if is_generated(one)]
    if hidden:
        raise RevertError(
            f"{cls.__name__} was made from a grafted class by something regraft does not know",
            where=f"{cls.__module__}.{cls.__qualname__} above {hidden[0].__name__}",
            remedy="undo that first, then revert",
        )
    for layer in layers:
        cls = derive(cls, layer)
    return cls


def _new_class(like: Class, name: str, bases: tuple[type, ...], body: Namespace) -> Class:
    metaclass: Any = type(like)  # a user's class may have one of its own
    return cast("Class", metaclass(name, bases, body))


def _rebuild_foreign(cls: Class, base: Class) -> Class:
    made = _rebuilt.get((cls, base))
    if made is None or _body(made) != _body(cls):  # torch adds a property with each parametrization
        prefix = cls.__name__.removesuffix(foreign_base(cls).__name__)
        made = _new_class(cls, f"{prefix}{base.__name__}", (*cls.__bases__[:-1], base), _body(cls))
        _rebuilt[cls, base] = made
        _rebuilt[made, foreign_base(cls)] = cls  # the way back is to the same class
    return made


def _body(cls: Class) -> Namespace:
    return {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")}


def layers_of(cls: Class) -> list[Layer]:
    """The layers in `cls`, the lowest first."""
    return [one.__dict__[LAYER] for one in reversed(cls.__mro__) if is_generated(one)]


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Pickle by the user's class and the layers: a generated class cannot be imported."""
    cls = type(self)
    user = cls
    while is_generated(user):
        user = user.__dict__[BASE]
    reduced: Any = super(_lowest(cls), self).__reduce_ex__(protocol)
    function, args, *rest = reduced
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (_make, (user, layers_of(cls), *args[1:]), *rest)
    return (_make_by, (function, args, layers_of(cls)), *rest)


def _lowest(cls: Class) -> Class:
    return next(one for one in reversed(cls.__mro__) if is_generated(one))


def _make(user: Class, layers: list[Layer], *args: Any) -> nn.Module:
    cls = layered(user, layers)
    return cls.__new__(cls, *args)


def _make_by(function: Callable[..., nn.Module], args: tuple[Any, ...], layers: list[Layer]) -> nn.Module:
    made = function(*args)
    made.__class__ = layered(type(made), layers)
    return made

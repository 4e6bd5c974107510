"""Generated classes: what a grafted module's class is, and how to take a layer out of it again.

A graft changes what a module does by giving it a class derived from its own, so that references, hooks,
tied weights, optimizers and sharding survive by construction. Each layer (a variant, the handling of
calls, an insertion) is one derived class with one reason to exist; the chain above a user's class is
rebuilt from its layers, never undone by assignment, because other tools may since have put
a class of their own on top.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import fx, nn

from regraft.errors import ModelError, RevertError
from regraft.record import (
    BASE,
    LAYER,
    RECORD,
    Layer,
    foreign_base,
    is_foreign,
    is_generated,
    rebind_instance_forward,
)

Namespace = dict[str, Any]
"""What a layer's builder returns: methods, and a `__name__` if the class is not to keep the one below's."""
Class = type[nn.Module]
_COMPILED = "_wrapped_call"
"""What torch.fx puts on the class that it compiles a graph into."""
_derived: WeakValueDictionary[tuple[Class, Layer], Class] = WeakValueDictionary()
"""Freed with the last module of the class: a class that a notebook defines anew is no longer needed."""
_rebuilt: WeakValueDictionary[tuple[Class, Class], Class] = WeakValueDictionary()
_rebuilt_from: WeakKeyDictionary[Class, Class] = WeakKeyDictionary()


def derive(base: Class, layer: Layer) -> Class:
    """The class that adds a layer to `base`; always the same one for the same two."""
    key = (base, layer)
    derived = _derived.get(key)
    if derived is None:
        namespace = dict(layer.build(_stable_base(base), *layer.args))
        title = namespace.pop("__name__", base.__name__)
        namespace.setdefault("__module__", base.__module__)
        namespace.setdefault("__qualname__", base.__qualname__)
        namespace.setdefault("__doc__", base.__doc__)
        namespace |= {BASE: base, LAYER: layer, "__reduce_ex__": _reduce_ex}
        namespace["__prepare_scriptable__"] = _refuse_script
        namespace |= _graph_methods(base)
        derived = _derived[key] = _new_class(base, title, (base,), namespace)
    return derived


def _refuse_script(self: nn.Module) -> nn.Module:
    raise ModelError(
        "a grafted model cannot be scripted: TorchScript cannot read what a graft does",
        where=type(self).__name__,
        remedy="regraft.revert(model) first; torch.export takes a grafted model in eval",
    )


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
    made = _rebuilt.get((cls, base)) or _rebuilt_from.get(cls)
    if made is not None and foreign_base(made) is not base:
        made = None
    if made is None or _body(made) != _body(cls):  # torch adds a property with each parametrization
        prefix = cls.__name__.removesuffix(foreign_base(cls).__name__)
        made = _new_class(cls, f"{prefix}{base.__name__}", (*cls.__bases__[:-1], base), _body(cls))
        _rebuilt[cls, base] = made
        _rebuilt_from[made] = cls  # the way back is to the same class
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


def compile_graph(owner: fx.GraphModule) -> Any:
    """Make the code of a graph module anew, on the class that has it; classes made above it stay."""
    cls = type(owner)
    holder: Any = next((one for one in cls.__mro__ if _COMPILED in vars(one)), cls)
    owner.__class__ = holder
    try:
        code = holder.recompile(owner)
    finally:
        owner.__class__ = cls
    rebind_instance_forward(owner)
    return code


def _stable_base(base: Class) -> Class:
    """A stand-in for `base` whose forward stays the same object while the graph is compiled again."""
    if not issubclass(base, fx.GraphModule) or _COMPILED not in vars(base):
        return base

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def _graph_methods(base: Class) -> Namespace:
    """Methods of a class generated above `base`, if that is a graph module's: what compiles and copies it.

    Each graph module has a class of its own, which holds the forward that torch.fx makes from the graph, and
    makes again whenever the graph changes: on the class of the moment, and without end if that is derived
    from the one that has it.
    """
    if not issubclass(base, fx.GraphModule):
        return {}

    def recompile(self: fx.GraphModule) -> Any:
        return compile_graph(self)

    def deepcopy(self: fx.GraphModule, memo: dict[int, Any]) -> Any:
        # A copy is built from the graph, which knows nothing of classes above it, nor of grafts.
        cls = type(self)
        holder: Any = next(one for one in cls.__mro__ if _COMPILED in vars(one))
        self.__class__ = holder
        try:
            copied = holder.__deepcopy__(self, memo)
        finally:
            self.__class__ = cls
        for name in (RECORD, *_written(self)):
            copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        copied.__class__ = layered(type(copied), layers_of(cls))
        return copied

    return {"recompile": recompile, "__deepcopy__": deepcopy}


def _written(module: nn.Module) -> list[str]:
    grafts = module.__dict__[RECORD].values()
    return [name for graft in grafts for name in graft.written if name in module.__dict__]

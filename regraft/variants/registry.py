"""The registered variants, by name: the built-in ones are found by listing this folder."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from regraft.errors import OptionError, RuleSyntaxError, UnknownVariantError, nearest
from regraft.variants.module import DropoutVariant, LinearVariant, check_rate
from regraft.variants.spec import Spec, Variant

_EXAMPLES = "for example 'gaussian', 'multisample(p=0.2, num_samples=4)', 'off'"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FAMILIES = ("Dropout", "DropPath", "Linear", "Embedding")
OF_RULES = ("fused", "adds")
"""Options that a rule gives to the graft, and not to the variant."""
_NO_VARIANTS = {
    "rdrop": "R-Drop is two passes and no variant: regraft.rdrop(model, alpha=1.0);",
    "maxnorm": "max-norm is no variant: regraft.max_norm(model, {'Linear': 3.0}, optimizer);",
}
_RELATIVE = re.compile(r"x\d+(\.\d+)?")
complete_options = Spec.complete
rate_matters = Spec.rate_matters
_specs: dict[str, Spec] = {}
_builtin: set[str] = set()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _load_builtin() -> None:
    if _builtin:
        return
    package = importlib.import_module("regraft.variants")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for builtin in (getattr(value, "spec", None) for value in vars(module).values()):
            if isinstance(builtin, Spec):
                _specs[builtin.name] = builtin
                _builtin.add(builtin.name)


def names() -> list[str]:
    """Names of all registered variants, sorted."""
    _load_builtin()
    return sorted(_specs)


def spec(name: str) -> Spec:
    """The variant called `name`, or UnknownVariantError with the nearest names."""
    if name not in names():
        hint = _NO_VARIANTS.get(name.replace("_", "").casefold()) or nearest(name, _specs)
        remedy = f"{hint} the variants are {', '.join(names())}".strip()
        raise UnknownVariantError(f"no variant is called {name!r}", remedy=remedy)
    return _specs[name]


def variant(name: str, /, **options: Any) -> Variant:
    """A registered variant with options chosen; what a rule maps a selector to.

    Args:
        name: a registered name; `regraft variants` lists them.
        options: of that variant. `p` is a rate in [0, 1), a rate relative to the site's own
            (`"x0.5"`), or a callable of the `Site`.

    Raises:
        UnknownVariantError: no such variant (also a LookupError).
        OptionError: no such option, or a value of the wrong kind (also a TypeError).
        RateError: a number outside its range (also a ValueError).

    Example:
        >>> import regraft
        >>> regraft.variant("dropconnect", p=0.2)
        dropconnect(p=0.2)
    """
    chosen = spec(name)
    check_options(chosen, options)
    if "p" in options and not chosen.rate_matters(options):
        given = ", ".join(key for key in options if key != "p")
        raise OptionError(
            f"p plays no part beside {given}", where=f"variant {chosen.name!r}", remedy=f"give p, or {given}"
        )
    return Variant(name, dict(options))


def check_options(chosen: Spec, options: Mapping[str, Any]) -> None:
    if "Dropout" in chosen.families and options.get("fused", "auto") in ("auto", "write", "keep"):
        options = {key: value for key, value in options.items() if key != "fused"}
    if chosen.name == "droppath" and isinstance(options.get("adds"), bool):
        options = {key: value for key, value in options.items() if key != "adds"}
    chosen.check(options)
    p = options.get("p", 0.0)
    if isinstance(p, str) and not _RELATIVE.fullmatch(p):
        raise OptionError(
            f"p={p!r} is no rate",
            where=f"variant {chosen.name!r}",
            remedy="a number in [0, 1), or relative: 'x0.5'",
        )
    if not (callable(p) or isinstance(p, str)):
        check_rate(p, where=f"variant {chosen.name!r}")


def register(
    name: str, *, replaces: str = "Dropout", changes_eval: bool = False
) -> Callable[[_Function], _Function]:
    """Register a new variant: a decorator for its function.

    The function is called only in training and with p > 0, so it needs no `training` of its own. Its
    keyword-only parameters with defaults are the variant's options (plain JSON values). With
    `changes_eval` it is called in eval too.

    Args:
        name: what rules call it: `[a-z][a-z0-9_]*`, not a built-in's.
        replaces: "Dropout" (`f(x, p, *, ...)`), "DropPath" (the same), "Embedding" (the same, x is its
            output) or "Linear" (`f(x, weight, bias, p, *, ...)`).
        changes_eval: whether the output in eval is another than the original's.

    Raises:
        OptionError: a bad name, `replaces` or signature.

    Example:
        >>> import regraft, torch
        >>> @regraft.register("my_noise", replaces="Dropout")
        ... def my_noise(x, p, *, strength=1.0):
        ...     return x + strength * p * torch.randn_like(x)
        >>> regraft.variant("my_noise", strength=0.5)
        my_noise(strength=0.5)
    """
    _load_builtin()
    if not _NAME.fullmatch(name):
        raise OptionError(f"{name!r} is no name for a variant", remedy="use [a-z][a-z0-9_]*")
    if name in _builtin:
        raise OptionError(f"{name!r} is a built-in variant", remedy="choose another name")
    if replaces not in _FAMILIES:
        raise OptionError(
            f"replaces={replaces!r} is not one of {', '.join(_FAMILIES)}",
            where=f"variant {name!r}",
            remedy=nearest(replaces, _FAMILIES),
        )

    def decorate(function: _Function) -> _Function:
        _specs[name] = _spec_of(name, function, replaces, changes_eval)
        return function

    return decorate


def _spec_of(name: str, function: Callable[..., Any], family: str, always: bool) -> Spec:
    _check_signature(name, function, family)

    @functools.wraps(function)
    def whole(*given: Any, **options: Any) -> Any:
        from torch.nn.functional import linear

        *tensors, p, training = given
        if p > 0 and (training or always):
            return function(*tensors, p, **options)
        return linear(*tensors) if family == "Linear" else tensors[0]

    spec = Spec(name, whole, (family,), changes_eval=(lambda _: True) if always else None)
    base = LinearVariant if family == "Linear" else DropoutVariant
    title = "".join(part.capitalize() for part in name.split("_"))
    spec(types.new_class(title, (base,), exec_body=lambda body: body.update(__module__=function.__module__)))
    return spec


def _check_signature(name: str, function: Callable[..., Any], family: str) -> None:
    wanted = ("x", "weight", "bias", "p") if family == "Linear" else ("x", "p")
    signature = inspect.signature(function)
    by_name = inspect.Parameter.KEYWORD_ONLY
    positional = [one for one in signature.parameters.values() if one.kind is not by_name]
    bare = any(one.kind is by_name and one.default is one.empty for one in signature.parameters.values())
    if len(positional) != len(wanted) or bare:
        raise OptionError(
            f"a variant that replaces {family} is written def {name}({', '.join(wanted)}, *, "
            f"option=default), not {getattr(function, '__name__', function)}{signature}",
            where=f"variant {name!r}",
        )


def parse_variant(text: str) -> Variant:
    """The variant that `name` or `name(option=value, ...)` stands for; values are Python literals."""

    def unreadable(why: str, remedy: str = _EXAMPLES) -> RuleSyntaxError:
        return RuleSyntaxError(f"the variant {text!r} cannot be read: {why}", remedy=remedy)

    try:
        body = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        body = ast.Constant(None)
    call = body if isinstance(body, ast.Call) else ast.Call(body, [], [])
    if not isinstance(call.func, ast.Name):
        raise unreadable("it is not `name` or `name(option=value)`")
    name = call.func.id
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        number = len(call.args) == 1 and isinstance(call.args[0], ast.Constant)
        meant = f"{name}(p={ast.unparse(call.args[0])})" if number else ""
        raise unreadable("options are written option=value", f"write {meant!r}" if meant else _EXAMPLES)
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            options[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise unreadable(f"{keyword.arg} is not a Python literal") from None
    return variant(name, **options)

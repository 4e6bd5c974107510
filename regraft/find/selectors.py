"""Selectors: what a rule matches. A type name, a class, `TYPE@PATH`, a path, `re:REGEX`, a predicate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regraft.errors import RuleSyntaxError
from regraft.find.site import Site
from regraft.ops import FAMILIES, KINDS
from regraft.record import original_class

_POSITIONS = ("after", "before")
_TYPE = re.compile(r"[A-Za-z_]\w*|\*")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_TOKEN = re.compile(r"\*|\{[^{}]*\}|[^*{}]+")
_MOST_IN_A_RANGE = 100_000


@dataclass(frozen=True)
class Selector:
    """A selector that has been read.

    Attributes:
        text: as the user wrote it; of a class or a predicate, its name.
        type: an operation or class name, or "*" for any.
        paths: over whole dotted paths; None for any.
        position: "after" or "before" for an insertion, else "".
        field: of an insertion, the part of an output or the argument that it is on; "" for the first tensor.
        test: of a class or a predicate.
    """

    text: str
    type: str = "*"
    paths: re.Pattern[str] | None = None
    position: str = ""
    field: str = ""
    test: Callable[[Site], bool] | None = None

    @property
    def any_type(self) -> bool:
        """Does it leave the type open, so that it means the sites its variant fits?"""
        return self.type == "*" and self.test is None

    def matches(self, site: Site) -> bool:
        if site.kind == "inserted":
            return self._matches_inserted(site)
        return not self.position and self.means(site)

    def means(self, site: Site) -> bool:
        """Does it match the site itself, whether or not it says before or after it?"""
        if self.test is not None:
            return bool(self.test(site))
        return self._type_matches(site) and self.path_matches(site.paths)

    def path_matches(self, paths: tuple[str, ...]) -> bool:
        return self.paths is None or any(self.paths.fullmatch(path) for path in paths)

    def _matches_inserted(self, site: Site) -> bool:
        """An insertion is what it was inserted by, `after:Linear`, and a dropout or drop-path itself."""
        if self.position:
            there = self.position == site.position and self.field in ("", site.field)
            return there and self.means(replace(site, kind="module", op=site.place))
        if self.test is not None:
            return bool(self.test(site))
        return self.type in ("*", site.family, site.op) and self.path_matches(site.paths)

    def _type_matches(self, site: Site) -> bool:
        if self.type in ("*", site.op, site.role):
            return True
        if self.type == "Linear":
            return site.family == "Linear"  # every matrix that multiplies
        if self.type == KINDS.get(site.op):
            return True  # "Dropout2d" is the kind, made as a module or called
        # A class name of the user's own; a private class that has the name of an operation is none.
        return _has_class(site) and self.type == site.type and self.type not in FAMILIES


def read_selector(key: Any) -> Selector:
    """The selector a rule's key stands for.

    Raises:
        RuleSyntaxError: a key that is no string, class or callable, or a string that cannot be read.
    """
    if isinstance(key, Selector):
        return key
    if isinstance(key, str):
        return _read_text(key)
    if isinstance(key, type):
        if not issubclass(key, nn.Module):
            raise RuleSyntaxError(f"{key.__name__} is no class of modules", remedy="use an nn.Module class")
        return Selector(key.__name__, test=_is_a(key))
    if callable(key):
        return Selector(f"<{getattr(key, '__name__', 'predicate')}>", test=key)
    raise RuleSyntaxError(
        f"{key!r} selects nothing: a {type(key).__name__} is no selector",
        remedy="a rule's key is a string ('Dropout@encoder.**'), a class, or a function of a site",
    )


def _is_a(cls: type[nn.Module]) -> Callable[[Site], bool]:
    # A functional dropout inside a module is no instance of the module's class, but a call that uses the
    # rate of such an instance is what that instance stands for.
    def test(site: Site) -> bool:
        modules = [site.owner] if _has_class(site) else site.rate_from
        return any(issubclass(original_class(module), cls) for module in modules)

    return test


def _has_class(site: Site) -> bool:
    """Does the name of a class mean the site? `nn.LSTM` means its dropout, and not its weights."""
    if site.kind == "weight":
        return not isinstance(site.owner, (nn.RNNBase, nn.MultiheadAttention))
    return site.kind == "module"


def _read_text(text: str) -> Selector:
    rest, position = text.strip(), ""
    for name in _POSITIONS:
        if rest.startswith(f"{name}:"):
            rest, position = rest[len(name) + 1 :].strip(), name
    field = ""
    if position and not rest.startswith("re:"):
        rest, _, field = rest.partition("#")
    if not rest:
        raise RuleSyntaxError(f"the selector {text!r} is empty", remedy="for example 'Dropout@encoder.**'")
    if rest.startswith("re:"):
        return Selector(text, paths=_regex(rest[3:], text), position=position)
    kind, at, path = rest.partition("@")
    if (not at and "." in rest) or (not at and not _TYPE.fullmatch(rest)):
        return Selector(text, paths=compile_path(rest), position=position, field=field)
    if not _TYPE.fullmatch(kind):
        raise RuleSyntaxError(
            f"the selector {text!r} cannot be read: {kind!r} is no type",
            remedy="TYPE@PATH, for example 'Dropout@encoder.**' or '*@head.*'",
        )
    return Selector(text, kind, compile_path(path) if at else None, position, field)


def _regex(source: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(source)
    except re.error as error:
        raise RuleSyntaxError(f"the regular expression in {text!r} cannot be read: {error}") from None


def compile_path(pattern: str) -> re.Pattern[str]:
    """A pattern over whole dotted paths.

    `*` is one part or a piece of one, `**` zero or more parts, `{0..5}` a range, `{0,2,7..9}` a list.

    Raises:
        RuleSyntaxError: braces that do not close, an empty part, a range that runs backwards.
    """
    # Dots inside braces belong to a range, so the parts are split outside of them only.
    parts = re.split(r"\.(?![^{]*\})", pattern)
    parts = [part for at, part in enumerate(parts) if at == 0 or (part, parts[at - 1]) != ("**", "**")]
    regex = ""
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part != "**":
            regex += _part(part, pattern) + ("" if last else r"\.")
        elif not last:
            # "**" takes its own dot along, so that it can also stand for nothing.
            regex += r"(?:[^.]+\.)*"
        else:
            regex = regex.removesuffix(r"\.") + r"(?:\.[^.]+)*" if regex else r".*"
    return re.compile(regex)


def _part(part: str, pattern: str) -> str:
    tokens = _TOKEN.findall(part)
    if not part or "".join(tokens) != part:
        why = "a brace does not close" if part else "one of its parts is empty"
        raise RuleSyntaxError(
            f"the path {pattern!r} cannot be read: {why}", remedy="for example 'encoder.layer.{0..5}.**'"
        )
    return "".join(_token(token, pattern) for token in tokens)


def _token(token: str, pattern: str) -> str:
    if token == "*":
        return r"[^.]*"
    if not token.startswith("{"):
        return re.escape(token)
    choices: list[str] = []
    for item in token[1:-1].split(","):
        ends = _RANGE.fullmatch(item.strip())
        if ends is None:
            choices.append(re.escape(item.strip()))
            continue
        first, last = int(ends[1]), int(ends[2])
        if last < first or last - first > _MOST_IN_A_RANGE:
            raise RuleSyntaxError(
                f"the range {token} in {pattern!r} has no numbers in it",
                remedy=f"write it upwards: {{{last}..{first}}}",
            )
        choices.extend(str(number) for number in range(first, last + 1))
    return f"(?:{'|'.join(choices)})"

"""Variants written as text: `multisample(p=0.2, num_samples=4)`."""

from __future__ import annotations

import ast
from typing import Any

from regraft.errors import RuleSyntaxError
from regraft.variants.registry import variant
from regraft.variants.spec import Variant

_EXAMPLES = "for example 'gaussian', 'multisample(p=0.2, num_samples=4)', 'off'"


def parse_variant(text: str) -> Variant:
    """The variant that `name` or `name(option=value, ...)` stands for; values are Python literals."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise _unreadable(text, "it is not `name` or `name(option=value)`") from None
    if isinstance(body, ast.Name):
        return variant(body.id)
    if not (isinstance(body, ast.Call) and isinstance(body.func, ast.Name)):
        raise _unreadable(text, "it is not `name` or `name(option=value)`")
    if body.args or any(keyword.arg is None for keyword in body.keywords):
        number = len(body.args) == 1 and isinstance(body.args[0], ast.Constant)
        said = f"{body.func.id}(p={ast.unparse(body.args[0])})" if number else ""
        raise _unreadable(text, "options are written option=value", said)
    return variant(body.func.id, **_literals(text, body))


def _literals(text: str, call: ast.Call) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            options[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise _unreadable(text, f"{keyword.arg} is not a Python literal") from None
    return options


def _unreadable(text: str, why: str, meant: str = "") -> RuleSyntaxError:
    return RuleSyntaxError(
        f"the variant {text!r} cannot be read: {why}",
        remedy=f"write {meant!r}" if meant else _EXAMPLES,
    )

"""Path patterns: dotted paths with `*`, `**` and `{0..5}`."""

from __future__ import annotations

import re

from regraft.errors import RuleSyntaxError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_TOKEN = re.compile(r"\*|\{[^{}]*\}|[^*{}]+")
_MOST_IN_A_RANGE = 100_000


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

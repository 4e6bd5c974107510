"""Every error regraft raises: what is wrong, where, and what to do about it.

Each class is also the builtin a caller would catch, so that code which knows nothing of regraft
(`except ValueError`) still works.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RegraftError(Exception):
    """Base of all errors of regraft: one `what`, an optional `where`, an optional `remedy`."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.remedy:
            lines.append(f"  help: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (type(self), self.what, self.where, self.remedy)


def _rebuild_error(cls: type[RegraftError], what: str, where: str, remedy: str) -> RegraftError:
    return cls(what, where=where, remedy=remedy)


class RuleSyntaxError(RegraftError, ValueError):
    """A selector or a variant string that cannot be read."""


class NoMatchError(RegraftError, LookupError):
    """A rule, or a path, that matches nothing in the model."""


class UnknownVariantError(RegraftError, LookupError):
    """A variant name that is not registered."""


class OptionError(RegraftError, TypeError):
    """An option that the variant does not have, or of the wrong kind."""


class RateError(RegraftError, ValueError):
    """A rate outside [0, 1), or another number outside its range."""


class WrongKindError(RegraftError, TypeError):
    """A variant that cannot take the place of what its rule selects."""


class ModelError(RegraftError, TypeError):
    """Something that is not a module, or a module that cannot be grafted."""


class InputsError(RegraftError, ValueError):
    """Inputs for the probe (or a pass) that the model's forward does not take."""


class MisfitError(RegraftError, ValueError):
    """A plan made for another model."""


class UnprovenError(RegraftError, RuntimeError):
    """A graft that no training forward has shown to do what it says."""


class RevertError(RegraftError, RuntimeError):
    """A graft that cannot be undone as the model stands."""


class LossError(RegraftError, ValueError):
    """Logits, labels or model outputs from which no loss can be computed."""


class FileError(RegraftError, OSError):
    """A file that cannot be read as a model or a plan."""


class RulesError(RegraftError, ValueError):
    """Several problems found together; `problems` has each as an error of its own."""

    def __init__(self, problems: Sequence[RegraftError]) -> None:
        super().__init__(f"{len(problems)} problems, nothing was changed")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:", *(f"- {problem}" for problem in self.problems)])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


def raise_all(problems: Sequence[RegraftError]) -> None:
    """Raise nothing, the only problem, or all of them as one error."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise RulesError(problems)


def nearest(name: str, names: Iterable[str], *, most: int = 3) -> str:
    """`did you mean 'a' or 'b'?`, or an empty string when nothing comes close."""
    folded: dict[str, str] = {}
    for known in names:  # of two that differ by case alone, the first
        folded.setdefault(known.casefold(), known)
    close = difflib.get_close_matches(name.casefold(), folded, n=most, cutoff=0.55)
    if not close:
        return ""
    return "did you mean " + " or ".join(repr(folded[match]) for match in close) + "?"

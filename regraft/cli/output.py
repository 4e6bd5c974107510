"""How results are printed, how errors end, and how a rule is read from the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import typer

from regraft.errors import FileError, RegraftError, RuleSyntaxError

if TYPE_CHECKING:
    from regraft.report.view import View

SUSPICIOUS = 3
MODELS = (
    "timm:NAME, torchvision:NAME, hf:NAME, a Hugging Face folder, package.module:factory, or a file: "
    ".pt, .pth, .bin, .pt2, .safetensors"
)


class Format(str, Enum):
    """How a result is printed."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


def show(view: View, format: Format) -> None:
    """Print a view to stdout: coloured and as wide as the terminal there, plain elsewhere."""
    if format is Format.json:
        put(view.to_json())
    elif format is Format.markdown:
        put(view.to_markdown())
    elif format is Format.html:
        put(view.to_html())
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console

        Console().print(view)  # rich reads NO_COLOR and the terminal's width
    else:
        put(str(view))


def put(text: str) -> None:
    """Write text to stdout, whatever characters stdout takes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))


def printed(run: Callable[[], View], format: Format, debug: bool) -> View:
    """The view that `run` returns, after it was printed; an error ends the command."""

    def both() -> View:
        view = run()
        show(view, format)
        return view

    made: View = guarded(both, debug)
    return made


def guarded(run: Callable[[], Any], debug: bool) -> Any:
    """What `run` returns; an error becomes one clear message and an exit code."""
    try:
        return run()
    except RegraftError as error:
        if debug:
            raise
        _say(str(error))
        suspicious = isinstance(error, FileError) and error.suspicious
        raise typer.Exit(SUSPICIOUS if suspicious else 2 if _bad_usage(error) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        why = next(iter(str(error).strip().splitlines()), "")
        _say(f"{type(error).__name__}: {why[:300]}\n  help: --debug shows where this comes from")
        raise typer.Exit(1) from None


def _say(message: str) -> None:
    from regraft.report.document import visible

    # What a file or a model is named must not command the terminal.
    lines = "\n".join(visible(line) for line in message.split("\n"))
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    typer.echo(f"error: {lines}".encode(encoding, "backslashreplace").decode(encoding), err=True)


def _bad_usage(error: RegraftError) -> bool:
    from regraft.errors import OptionError, RateError, RulesError, UnknownVariantError, WrongKindError

    if isinstance(error, RulesError):
        return all(map(_bad_usage, error.problems))
    return isinstance(error, (OptionError, RateError, RuleSyntaxError, UnknownVariantError, WrongKindError))


def pair(text: str) -> tuple[str, str | None]:
    """A rule as it is written on the command line: `SELECTOR=VARIANT`; the variant may be `None`.

    Raises:
        RuleSyntaxError: there is no selector, or no variant.
    """
    selector, equals, variant = text.partition("=")
    if not equals or not selector.strip() or not variant.strip():
        raise RuleSyntaxError(
            f"the rule {text!r} is not SELECTOR=VARIANT",
            remedy="for example --rule 'Dropout@encoder.**=gaussian'",
        )
    return selector.strip(), None if variant.strip() == "None" else variant.strip()

"""How results are printed, how errors end, what is said meanwhile, and how options are read."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from regraft.errors import (
    FileError,
    OptionError,
    RateError,
    RegraftError,
    RulesError,
    RuleSyntaxError,
    UnknownVariantError,
    WrongKindError,
)
from regraft.report.document import visible
from regraft.report.view import View

MODELS = (
    "timm:NAME, torchvision:NAME, hf:NAME, a Hugging Face folder, package.module:factory, or a file: "
    ".pt, .pth, .bin, .safetensors"
)


_QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Opening:
    """How a MODEL is opened: `--arch`, `--trust`, and the patterns of names that are the user's own."""

    arch: str = ""
    trust: bool = False
    allow: tuple[str, ...] = ()


class Format(str, Enum):
    """How a result is printed."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


def _visible_facts(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isprintable() else "\n".join(map(visible, value.split("\n")))
    if isinstance(value, dict):
        return {_visible_facts(key): _visible_facts(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible_facts(entry) for entry in value]
    return value


def show(view: View, format: Format) -> None:
    """Print a view to stdout: coloured and as wide as the terminal there, plain elsewhere."""
    if format is Format.json:
        put(
            json.dumps(view.to_dict(), indent=2, allow_nan=False)
        )  # ASCII: a terminal sees no other character
        return
    from regraft.cli.file_view import Facts

    view = Facts(_visible_facts(view.to_dict()))  # what a file names must not command the terminal
    if format is Format.markdown:
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
    """The view that `run` returns, after it was printed; an error ends the command.

    A view of files has a `closing` line, or an error in its place.
    """

    def both() -> View:
        try:
            view = run()
        except FileError as error:
            if format is not Format.table and hasattr(error, "verdicts"):
                from regraft.cli.file_view import refusal

                show(refusal(error, error.verdicts), format)
            raise
        show(view, format)
        if closing := getattr(view, "closing", None):
            line = closing()
            if format in (Format.table, Format.markdown):
                put(f"\n{line}")
        return view

    view: View = guarded(both, debug)
    return view


def guarded(run: Callable[[], Any], debug: bool) -> Any:
    """What `run` returns; an error becomes one clear message and an exit code."""
    try:
        return run()
    except RegraftError as error:
        _say(_told(error), debug)
        raise typer.Exit(getattr(error, "exit_code", 2 if _bad_usage(error) else 1)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `| head` has read enough: click ends the command without a word
        raise
    except Exception as error:
        help = "" if debug else "\n  help: --debug shows where this comes from"
        _say(f"{visible(reason(error))}{help}", debug)
        raise typer.Exit(1) from None


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _told(error: RegraftError) -> str:
    """The message of an error, in which a name that holds the end of a line does not end it."""
    if isinstance(error, RulesError):
        return str(error)
    lines = [error.what if "\n" in error.what and not isinstance(error, FileError) else visible(error.what)]
    lines += [f"  --> {visible(error.where)}"] if error.where else []
    lines += [f"  help: {visible(error.remedy)}"] if error.remedy else []
    return "\n".join(lines)


def _say(message: str, debug: bool) -> None:
    # What a file or a model is named must not command the terminal.
    text = f"{traceback.format_exc()}error: {message}" if debug else f"error: {message}"
    lines = "\n".join(map(visible, text.split("\n")))
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    typer.echo(lines.encode(encoding, "backslashreplace").decode(encoding), err=True)


def _bad_usage(error: RegraftError) -> bool:
    if isinstance(error, RulesError):
        return all(map(_bad_usage, error.problems))
    return isinstance(error, (OptionError, RateError, RuleSyntaxError, UnknownVariantError, WrongKindError))


def pair(text: str) -> tuple[str, str | None]:
    """A rule as it is written on the command line: `SELECTOR=VARIANT`; the variant may be `None`."""
    selector, equals, variant = text.partition("=")
    if not equals or not selector.strip() or not variant.strip():
        raise RuleSyntaxError(
            f"the rule {text!r} is not SELECTOR=VARIANT",
            remedy="for example --rule 'Dropout@encoder.**=gaussian'",
        )
    return selector.strip(), None if variant.strip() == "None" else variant.strip()


def allowed(patterns: list[str] | None) -> list[str]:
    """The patterns of `--allow`, and the lines of `regraft/allow` in `~/.config`, never beside the model."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    file = Path(home) / "regraft" / "allow"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    given = [
        line.strip() for line in [*lines, *(patterns or [])] if line.strip() and not line.startswith("#")
    ]
    for pattern in given:
        if not pattern.partition(".")[0].replace("_", "a").isalnum():
            raise OptionError(
                f"{pattern!r} does not begin with the name of a package",
                remedy="for example --allow 'coolnets.*'",
            )
    return given


@contextmanager
def working(what: str) -> Iterator[None]:
    """While the block runs for longer than a second, say so, if stderr is a terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_show, args=(what, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _show(what: str, ended: threading.Event) -> None:
    if ended.wait(_QUIET_SECONDS):
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    status: Any = None
    with suppress(Exception):  # a broken terminal must not end the work
        status = console.status(Text(visible(what)))
        status.start()
    ended.wait()
    if status is not None:
        with suppress(Exception):
            status.stop()

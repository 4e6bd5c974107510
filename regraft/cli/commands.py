"""The commands. Results go to stdout and messages to stderr.

Exit codes: 0 done, 1 nothing matched or the file cannot be read, 2 bad usage, 3 suspicious content.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft import __version__
from regraft.errors import FileError, RegraftError

if TYPE_CHECKING:
    from regraft.report.view import View

app = typer.Typer(
    help="Retrofit regularizers into PyTorch models that already exist.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SUSPICIOUS = 3


class Format(str, Enum):
    """How a result is printed."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


_MODEL_HELP = (
    "timm:NAME, torchvision:NAME, hf:FOLDER, a Hugging Face folder, package.module:factory, or a .pt file."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Rules = Annotated[
    list[str], typer.Option("--rule", "-r", help="SELECTOR=VARIANT, in order; later rules win.")
]
Arch = Annotated[str, typer.Option(help="The architecture of a file that holds weights alone: timm:NAME, …")]
As = Annotated[Format, typer.Option("--format", "-f", help="How to print the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regraft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(model: Model, arch: Arch = "", format: As = Format.table, debug: Debug = False) -> None:
    """Show the sites of a model: what can be regularized, and what really runs."""

    def run() -> View:
        import regraft
        from regraft.cli.opening import open_model

        return regraft.inspect(open_model(model, arch))

    _print(_guarded(run, debug), format)


@app.command()
def plan(model: Model, rule: Rules, arch: Arch = "", format: As = Format.table, debug: Debug = False) -> None:
    """Show what a set of rules would change in a model, and what it would not."""

    def run() -> View:
        import regraft
        from regraft.cli.opening import open_model

        pairs = [_pair(text) for text in rule]
        return regraft.plan(open_model(model, arch), pairs)

    _print(_guarded(run, debug), format)


@app.command()
def variants(
    name: Annotated[str, typer.Argument(help="One variant: its whole card.")] = "",
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """List the variants, or show one with its options and source."""

    def run() -> list[dict[str, Any]]:
        from regraft.variants import registry

        found = [registry.spec(name)] if name else [registry.spec(one) for one in registry.names()]
        return [
            {
                "name": one.name,
                "replaces": list(one.families),
                "options": dict(one.defaults),
                "changes_eval": one.changes_eval is not None and one.changes_eval(dict(one.defaults)),
                "adds_state": one.adds_state(dict(one.defaults)),
                "summary": one.summary,
                "card": (one.function.__doc__ or "") if name else None,
            }
            for one in found
        ]

    from regraft.cli.variants import print_variants

    print_variants(_guarded(run, debug), format.value)


def _pair(text: str) -> tuple[str, str | None]:
    from regraft.errors import RuleSyntaxError

    selector, equals, variant = text.partition("=")
    if not equals or not selector or not variant:
        raise RuleSyntaxError(
            f"the rule {text!r} is not SELECTOR=VARIANT",
            remedy="for example --rule 'Dropout@encoder.**=gaussian'",
        )
    return selector.strip(), None if variant.strip() == "None" else variant.strip()


def _guarded(run: Callable[[], Any], debug: bool) -> Any:
    """What `run` returns; an error becomes one clear message and an exit code."""
    try:
        return run()
    except RegraftError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        suspicious = isinstance(error, FileError) and error.suspicious
        code = SUSPICIOUS if suspicious else 2 if _bad_usage(error) else 1
        raise typer.Exit(code) from None


def _bad_usage(error: RegraftError) -> bool:
    from regraft.errors import OptionError, RateError, RuleSyntaxError, UnknownVariantError

    return isinstance(error, (OptionError, RateError, RuleSyntaxError, UnknownVariantError))


def _print(view: View, format: Format) -> None:
    if format is Format.json:
        typer.echo(view.to_json())
    elif format is Format.markdown:
        typer.echo(view.to_markdown())
    elif format is Format.html:
        typer.echo(view.to_html())
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(view)
    else:
        typer.echo(str(view))

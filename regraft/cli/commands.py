"""The commands. Results go to stdout and messages to stderr.

Exit codes: 0 done, 1 a check failed, nothing matched or a file cannot be read, 2 bad usage, 3 a file would
run what no model needs, 4 a file names what is not known to be harmless. Of several, the first of 3, 4, 1, 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft import __version__
from regraft.cli.output import MODELS, Format, allowed, guarded, pair, printed

if TYPE_CHECKING:
    from regraft.report.view import View

app = typer.Typer(
    help="Retrofit regularizers into PyTorch models that already exist.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check failed, nothing matched or a file cannot be read, 2 bad usage, "
    "3 a file would run what no model needs, 4 a file names what is not known to be harmless. "
    "Of several, the first of 3, 4, 1, 0.",
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODELS}.")]
Rules = Annotated[
    list[str], typer.Option("--rule", "-r", help="SELECTOR=VARIANT, in order; later rules win.")
]
Arch = Annotated[
    str,
    typer.Option(metavar="MODEL", help="The architecture of a file that holds weights alone: timm:NAME, …"),
]
As = Annotated[Format, typer.Option("--format", "-f", case_sensitive=False, help="How to print the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load the file for real, which runs the code that it names.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="PATTERN", help="Unknown names that you vouch for: 'coolnets.*'."),
]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the model.")]
Safe = Annotated[bool, typer.Option("--safe", help="Write the weights as safetensors.")]
Shape = Annotated[
    str,
    typer.Option(metavar="2x3x224x224", help="The shape of the input to probe with, if it is one tensor."),
]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]


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
def inspect(
    model: Model,
    arch: Arch = "",
    shape: Shape = "",
    trust: Trust = False,
    allow: Allow = None,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Show the sites of a model: what can be regularized, and what really runs."""

    def run() -> View:
        from regraft.cli.opening import view_of

        return view_of(model, arch, shape, trust=trust, allow=allowed(allow))

    printed(run, format, debug)


@app.command()
def plan(
    model: Model,
    rule: Rules,
    arch: Arch = "",
    shape: Shape = "",
    trust: Trust = False,
    allow: Allow = None,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Show what a set of rules would change in a model, and what it would not."""

    def run() -> View:
        from regraft.cli.opening import planned

        rules = [pair(text) for text in rule]
        return planned(model, rules, arch, shape, trust=trust, allow=allowed(allow))

    printed(run, format, debug)


@app.command()
def apply(
    model: Model,
    rule: Rules,
    output: Out,
    arch: Arch = "",
    shape: Shape = "",
    trust: Trust = False,
    allow: Allow = None,
    safe: Safe = False,
    force: Force = False,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Graft variants into a model and write it in the form it came in, with its plan beside it."""

    def run() -> View:
        from regraft.cli.loading import load
        from regraft.cli.opening import inputs_for
        from regraft.cli.writing import applied, check_free

        inputs = inputs_for(model, shape)
        rules = [pair(text) for text in rule]
        check_free(output, force)
        loaded = load(model, arch, trust=trust, allow=allowed(allow))
        return applied(loaded, rules, inputs, output, safe)

    printed(run, format, debug)


@app.command()
def revert(
    model: Model,
    output: Out,
    selector: Annotated[str, typer.Option(help="Undo the grafts at these sites alone.")] = "",
    arch: Arch = "",
    trust: Trust = False,
    allow: Allow = None,
    safe: Safe = False,
    force: Force = False,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Undo the grafts of a model and write it plain, with its weights as trained."""

    def run() -> View:
        from regraft.cli.loading import load
        from regraft.cli.writing import check_free, reverted

        check_free(output, force)
        return reverted(load(model, arch, trust=trust, allow=allowed(allow)), selector, output, safe)

    printed(run, format, debug)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{MODELS}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    arch: Arch = "",
    trust: Trust = False,
    allow: Allow = None,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Show what differs between two models: grafts, rates, layers, weights."""

    def run() -> View:
        import regraft
        from regraft.cli.opening import side_of

        mine = allowed(allow)
        return regraft.diff(
            side_of(a, arch, trust=trust, allow=mine), side_of(b, arch, trust=trust, allow=mine)
        )

    printed(run, format, debug)


@app.command()
def verify(
    model: Model,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", "-r", help="SELECTOR=VARIANT to verify with.")
    ] = None,
    arch: Arch = "",
    shape: Shape = "",
    trust: Trust = False,
    allow: Allow = None,
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """Graft a copy of a model and check each of regraft's promises on it.

    The exit code is 1 if a check fails, and also if none does but no forward could show what the grafts do.
    """

    def run() -> Any:
        import regraft
        from regraft.cli.loading import load
        from regraft.cli.opening import inputs_for
        from regraft.cli.progress import working

        rules = [pair(text) for text in rule or []] or None
        loaded = load(model, arch, trust=trust, allow=allowed(allow))
        with working("verifying"):
            return regraft.verify(loaded.model, inputs_for(model, shape), rules)

    verification: Any = printed(run, format, debug)
    if not verification.passed:
        raise typer.Exit(1)


@app.command()
def variants(
    name: Annotated[str, typer.Argument(help="One variant: its whole card.")] = "",
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """List the variants, or show one with its options and source."""
    from regraft.cli.variants import print_variants, rows_of

    print_variants(guarded(lambda: rows_of(name), debug), format.value)

"""The commands. Results go to stdout and messages to stderr.

Exit codes: 0 done, 1 a check failed, nothing matched or a file cannot be read, 2 bad usage, 3 a file would
run what no model needs, 4 a file names what is not known to be harmless. Of several, the first of 3, 4, 1, 0.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft import __version__
from regraft.cli.output import MODELS, Format, Opening, allowed, guarded, pair, printed

app = typer.Typer(
    help="Retrofit regularizers into PyTorch models that already exist.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=" ".join((__doc__ or "").partition("\n\n")[2].split()),
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODELS}.")]
Rules = Annotated[
    list[str], typer.Option("--rule", "-r", help="SELECTOR=VARIANT, in order; later rules win.")
]
As = Annotated[Format, typer.Option("--format", "-f", case_sensitive=False, help="How to print the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write the model.")]
Safe = Annotated[bool, typer.Option("--safe", help="Write the weights as safetensors.")]
Shape = Annotated[
    str,
    typer.Option(metavar="2x3x224x224", help="The shape of the input to probe with, if it is one tensor."),
]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
_OPENING = {
    "arch": Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="The architecture of a file that holds weights alone: timm:NAME, …"
        ),
    ],
    "trust": Annotated[
        bool, typer.Option("--trust", help="Load the file for real, which runs the code that it names.")
    ],
    "allow": Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="PATTERN", help="Unknown names that you vouch for: 'coolnets.*'."),
    ],
}
_OPENING_DEFAULTS = {"arch": "", "trust": False, "allow": None}


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that prints what the function returns; its parameter `how` stands for three options."""

    def run(*, format: Format, debug: bool, **given: Any) -> None:
        def opened() -> Any:
            arch, trust, patterns = (given.pop(name) for name in _OPENING)
            return function(**given, how=Opening(arch, trust, tuple(allowed(patterns))))

        view = printed(opened, format, debug)
        if not getattr(view, "passed", True):
            raise typer.Exit(1)

    def keyword(name: str, annotation: Any, default: Any) -> Parameter:
        return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

    own = signature(function, eval_str=True).parameters
    options = [keyword(name, one.annotation, one.default) for name, one in own.items() if name != "how"]
    options += [keyword(name, option, _OPENING_DEFAULTS[name]) for name, option in _OPENING.items()]
    options += [keyword("format", As, Format.table), keyword("debug", Debug, False)]
    run.__annotations__ = {option.name: option.annotation for option in options}
    vars(run)["__signature__"] = Signature(options)
    return app.command(function.__name__, help=cleandoc(function.__doc__ or ""))(run)


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


@_command
def inspect(model: Model, how: Opening, shape: Shape = "") -> Any:
    """Show the sites of a model: what can be regularized, and what really runs."""
    from regraft.cli.opening import view_of

    return view_of(model, how, shape)


@_command
def plan(model: Model, rule: Rules, how: Opening, shape: Shape = "") -> Any:
    """Show what a set of rules would change in a model, and what it would not."""
    from regraft.cli.opening import planned

    return planned(model, [pair(text) for text in rule], how, shape)


@_command
def apply(
    model: Model,
    rule: Rules,
    output: Out,
    how: Opening,
    shape: Shape = "",
    safe: Safe = False,
    force: Force = False,
) -> Any:
    """Graft variants into a model and write it in the form it came in, with its plan beside it."""
    from regraft.cli.architectures import inputs_for
    from regraft.cli.opening import load
    from regraft.cli.writing import applied, check_free

    inputs = inputs_for(model, shape)
    rules = [pair(text) for text in rule]
    check_free(output, force)
    return applied(load(model, how), rules, inputs, output, safe)


@_command
def revert(
    model: Model,
    output: Out,
    how: Opening,
    selector: Annotated[str, typer.Option(help="Undo the grafts at these sites alone.")] = "",
    safe: Safe = False,
    force: Force = False,
) -> Any:
    """Undo the grafts of a model and write it plain, with its weights as trained."""
    from regraft.cli.opening import load
    from regraft.cli.writing import check_free, reverted

    check_free(output, force)
    return reverted(load(model, how), selector, output, safe)


@_command
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{MODELS}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    how: Opening,
) -> Any:
    """Show what differs between two models: grafts, rates, layers, weights."""
    import regraft
    from regraft.cli.opening import side_of

    return regraft.diff(side_of(a, how), side_of(b, how))


@_command
def verify(
    model: Model,
    how: Opening,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", "-r", help="SELECTOR=VARIANT to verify with.")
    ] = None,
    shape: Shape = "",
) -> Any:
    """Graft a copy of a model and check each of regraft's promises on it.

    The exit code is 1 if a check fails, and also if none does but no forward could show what the grafts do.
    """
    import regraft
    from regraft.cli.architectures import inputs_for
    from regraft.cli.opening import load
    from regraft.cli.output import working

    rules = [pair(text) for text in rule or []] or None
    loaded = load(model, how)
    with working("verifying"):
        return regraft.verify(loaded.model, inputs_for(model, shape), rules)


@app.command()
def variants(
    name: Annotated[str, typer.Argument(help="One variant: its whole card.")] = "",
    format: As = Format.table,
    debug: Debug = False,
) -> None:
    """List the variants, or show one with its options and source."""
    from regraft.cli.variants import print_variants, rows_of

    print_variants(guarded(lambda: rows_of(name), debug), format.value)

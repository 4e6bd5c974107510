"""The command line: it opens a model, calls public names, and prints what they return."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point `regraft`."""
    from regraft.cli.commands import app

    app()

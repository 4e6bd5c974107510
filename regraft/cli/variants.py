"""How the list of variants, and one variant, are printed."""

from __future__ import annotations

import inspect
import json
import sys
from html import escape
from typing import Any

import typer

_COLUMNS = ("variant", "takes the place of", "what it does")


def rows_of(name: str) -> list[dict[str, Any]]:
    """The facts of one variant, or of all."""
    from regraft.variants import registry

    specs = [registry.spec(name)] if name else [registry.spec(known) for known in registry.names()]
    return [
        {
            "name": spec.name,
            "replaces": list(spec.families),
            "options": dict(spec.defaults),
            "changes_eval": spec.changes_eval is not None and spec.changes_eval(dict(spec.defaults)),
            "adds_state": spec.adds_state(dict(spec.defaults)),
            "summary": spec.summary,
            "card": (spec.function.__doc__ or "") if name else None,
        }
        for spec in specs
    ]


def print_variants(rows: list[dict[str, Any]], format: str) -> None:
    """Print variants as a table, JSON or Markdown; a single one with its whole card."""
    if format == "json":
        typer.echo(json.dumps({"schema": 1, "variants": rows}, indent=2))
    elif format == "html":
        typer.echo(_page(rows))
    elif len(rows) == 1 and rows[0]["card"]:
        typer.echo(_card(rows[0]))
    elif format == "markdown":
        typer.echo("\n".join(["| " + " | ".join(_COLUMNS) + " |", "|---|---|---|"]))
        typer.echo("\n".join("| " + " | ".join(_cells(row)) + " |" for row in rows))
    else:
        _print_table(rows)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    marks = [
        word for word, on in (("changes eval", row["changes_eval"]), ("adds state", row["adds_state"])) if on
    ]
    summary = row["summary"] + (f" ({', '.join(marks)})" if marks else "")
    return row["name"], ", ".join(row["replaces"]), summary


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_COLUMNS, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _card(row: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items()) or "none"
    head = f"{row['name']}: takes the place of {', '.join(row['replaces'])}; options beside p: {options}"
    return f"{head}\n\n{inspect.cleandoc(row['card'])}"


def _page(rows: list[dict[str, Any]]) -> str:
    """The list, or the card of one, as a page without any script."""
    if len(rows) == 1 and rows[0]["card"]:
        body = f"<pre>{escape(_card(rows[0]))}</pre>"
    else:
        lines = [_COLUMNS, *map(_cells, rows)]
        body = "\n".join("<tr><td>" + "</td><td>".join(map(escape, line)) + "</td></tr>" for line in lines)
        body = f"<table>\n{body}\n</table>"
    start = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    return f"{start}<title>regraft variants</title></head>\n<body>\n{body}\n</body></html>"

"""The README is true: its example prints what it shows, and its table lists the variants there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regraft.variants.registry import complete_options, names, spec

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def timeless(text):
    """Without what differs between machines and versions: seconds, and line numbers of transformers."""
    text = re.sub(r"in [0-9.]+ s", "in # s", text)
    return [re.sub(r"(\.py):\d+", r"\1:#", line).rstrip() for line in text.strip().splitlines()]


def test_the_example_prints_the_diff_that_is_shown(capsys):
    exec(blocks("python")[0], {})
    assert timeless(capsys.readouterr().out) == timeless(blocks("diff")[0])


@pytest.mark.parametrize("name", names())
def test_the_table_lists_each_variant_as_its_docstring_has_it(name):
    found = spec(name)
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, replaces, summary, _ = row.split("|")
    assert replaces.strip() == ", ".join(found.families)
    default = complete_options(found, {})
    changes = found.changes_eval is not None and found.changes_eval(default)
    assert ("changes eval" in summary) == changes
    assert found.summary.split("`")[0].rstrip(".").casefold() in summary.casefold()


def test_there_are_two_commands_that_set_up_and_run():
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert commands == [
        'pip install -e ".[recipes]" && python recipes/bert.py',
        'pip install -e ".[dev]" && pytest',
    ]

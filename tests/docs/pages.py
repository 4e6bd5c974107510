"""The pages of the documentation as programs: their blocks in order, and what each printed.

    python tests/docs/pages.py docs/selectors.md     # run pages and write their outputs anew; by default all

A block of Python runs in the names that the blocks above it left; a block of `text` or `diff` right below it
shows what it prints, where `...` on a line of its own stands for any lines. In a block of `console` each line
that begins with `$ regraft` runs as a command.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from given import given

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def all_pages():
    """The files with snippets; the cards of the variants have tests of their own (tests/variants/test_cards.py)."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        file
        for file in files
        if file.parent.name != "variants" and blocks_of(file.read_text(encoding="utf-8"))
    ]


@dataclass
class Block:
    """A fenced block: its language and text, where it starts, and the output shown below it, if any."""

    language: str
    text: str
    line: int
    shown: tuple[int, int] | None = None


def blocks_of(text):
    """The blocks that run, in order."""
    blocks, last_end = [], 0
    for match in _FENCE.finditer(text):
        language, body = match[1], match[2]
        line = text.count("\n", 0, match.start()) + 2
        if language in ("python", "console"):
            blocks.append(Block(language, body, line))
        elif language in ("text", "diff") and blocks and not text[last_end : match.start()].strip():
            blocks[-1].shown = match.span(2)
        last_end = match.end()
    return blocks


def timeless(text):
    """Without what differs between machines and versions: seconds, line numbers, hashes."""
    text = re.sub(r" in [0-9.]+ s\b", "", text)  # not said at all where it is next to nothing
    text = re.sub(r"\bsha256 [0-9a-f]+", "sha256 #", text)
    text = re.sub(r"0x[0-9a-f]+", "0x#", text)
    return [re.sub(r"(\.py):\d+", r"\1:#", line).rstrip() for line in text.strip().splitlines()]


def agree(printed, shown):
    """Whether what was printed is what is shown; `...` alone on a line stands for any lines."""
    pieces = re.split(r"^ *\.\.\.$\n?", "\n".join(timeless(shown)) + "\n", flags=re.MULTILINE)
    pattern = r"(?:.*\n)*?".join(map(re.escape, pieces))
    return re.fullmatch(pattern, "\n".join(timeless(printed)) + "\n") is not None


def run_block(block, names, path):
    """What a block prints."""
    if block.language == "console":
        return "".join(_command(line, shown, path) for line, shown in _commands(block.text))
    out = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, "project/train.py", "exec")
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def _commands(text):
    for piece in re.split(r"^(?=\$ )", text, flags=re.MULTILINE):
        if piece.startswith("$ regraft "):
            command, _, shown = piece.partition("\n")
            yield command[2:].partition("  #")[0].strip(), shown


def _command(line, shown, path):
    from typer.testing import CliRunner

    from regraft.cli.commands import app

    line, _, target = line.partition(" > ")
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code in (0, 3, 4), f"{path}: {line}\n{result.output}{result.exception!r}"
    if target:
        Path(target).write_text(result.output, encoding="utf-8")
    elif shown.strip():
        assert agree(result.output, shown), f"{path}: {line} prints\n{result.output}"
    return ""


def run_page(path):
    """Each block of a page, and what it prints."""
    new_names = given(path.relative_to(ROOT).as_posix())
    names = next(new_names)
    for block in blocks_of(path.read_text(encoding="utf-8")):
        if (new := next(new_names, {})) is None:
            continue
        names.update(new)
        yield block, run_block(block, names, path)


def write_outputs(path):
    """Run a page, and put what it prints into the blocks that show it."""
    text = path.read_text(encoding="utf-8")
    outputs = []
    for block, printed in run_page(path):
        if block.shown:
            outputs.append(
                (block.shown, "\n".join(line.rstrip() for line in printed.strip().splitlines()) + "\n")
            )
    for (start, end), printed in reversed(outputs):
        if not agree(printed, text[start:end]):
            text = text[:start] + printed + text[end:]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import os
    import tempfile

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for page in [Path(name).resolve() for name in sys.argv[1:]] or all_pages():
        os.chdir(tempfile.mkdtemp())
        write_outputs(page)

"""How many of the dropout calls that really run are reached, by a module walk and by regraft.

Every architecture of `tests/zoo` runs one training forward under a recorder that shares no code with
regraft; then `regraft.apply(model, {"Dropout": "gaussian", "DropPath": "droppath"})`, and the recorder
looks again at what stock dropout is left.

    python benchmarks/coverage.py                          # everything, a few minutes on one core
    python benchmarks/coverage.py --library timm --limit 10
    python benchmarks/coverage.py --walk-only              # the module-walk column alone, without regraft
    python benchmarks/coverage.py --json coverage.json     # a row per model, to study what is missed
    python benchmarks/coverage.py --linear                 # the weights that multiply, instead
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import linear
from zoo.check import Row, graft_row, quiet, walk_row
from zoo.entries import LIBRARIES, entries, entry

NAMES = {"hf": "transformers"}
COLUMNS = ("calls + DropPath", "module walk", "regraft", "with DropPath", "skipped", "silent")
LAST = ("broken", "eval differs", "revert differs")


def main() -> None:
    options = _options()
    quiet()
    names = [entry.id for entry in _chosen(options)]
    rows = _read(options)
    done = {f"{row.library}:{row.name}" for row in rows}
    start = time.perf_counter()
    for row in _rows([name for name in names if name not in done], options):
        rows.append(row)
        if options.verbose or _problems(row):
            print(" | ".join([_line(row), *_problems(row)]), file=sys.stderr, flush=True)
        if options.json:
            kept = {"of": _measured(), "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
        if options.seconds and time.perf_counter() - start > options.seconds:
            print(f"stopped after {len(rows)} of {len(names)} models: --seconds", file=sys.stderr)
            break
    print(table(rows, options.walk_only))
    print(reasons(rows))


def _measured() -> str:
    """What the rows are of: the code of regraft, as git names it, and whether it has been changed since."""
    git = ["git", "-C", str(ROOT)]
    tree = subprocess.run([*git, "rev-parse", "HEAD:regraft"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "regraft"], capture_output=True, check=True
    ).stdout
    return tree.stdout.strip() + (" changed" if changed else "")


def _read(options: argparse.Namespace) -> list[Any]:
    """The rows of a run that was stopped, if it was of the same code."""
    if not options.resume:
        return []
    kept = json.loads(options.json.read_text())
    if kept["of"] != _measured():
        raise SystemExit(f"{options.json} is of other code: run without --resume")
    return [(linear.LinearRow if options.linear else Row)(**row) for row in kept["rows"]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", action="append", choices=LIBRARIES)
    parser.add_argument("--only", action="append", help="part of a name; may be given more than once")
    parser.add_argument("--limit", type=int, help="at most so many models of a library")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--walk-only", action="store_true")
    parser.add_argument("--linear", action="store_true", help="weights that multiply, instead of dropouts")
    parser.add_argument("--every", type=int, default=1, help="take only each n-th model")
    parser.add_argument("--given", action="store_true", help="hand the zoo's inputs to the probe everywhere")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with the rows in --json")
    parser.add_argument("--verbose", action="store_true", help="a line for every model")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> Iterator:
    for library in options.library or LIBRARIES:
        found = entries(library)
        if options.only:
            found = [one for one in found if any(part in one.name for part in options.only)]
        yield from found[:: options.every][: options.limit]


def _rows(names: list[str], options: argparse.Namespace) -> Iterable[Row]:
    kind = (options.walk_only, options.given, options.linear)
    if options.jobs == 1:
        return (_row(name, *kind) for name in names)
    pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=quiet)
    return pool.map(_row, names, *([one] * len(names) for one in kind))


def _row(name: str, walk_only: bool, given: bool, weights: bool) -> Row:
    walk, graft = (linear.walk_row, linear.linear_row) if weights else (walk_row, graft_row)
    return walk(entry(name)) if walk_only else graft(entry(name), True if given else None)


def table(rows: list[Any], walk_only: bool = False) -> str:
    """The coverage of each library, as a Markdown table."""
    weights = isinstance(rows[0], linear.LinearRow)
    inside, columns = (linear.cells, linear.COLUMNS) if weights else (_cells, COLUMNS)
    columns = ("library", "models", *columns, *LAST)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for library in [*dict.fromkeys(row.library for row in rows), "all"]:
        own = [row for row in rows if library in (row.library, "all")]
        good = [row for row in own if row.error is None]
        cells = [NAMES.get(library, library), str(len(own)), *inside(good, walk_only)]
        cells += [str(len(own) - len(good)), str(sum(row.eval_differs for row in good))]
        lines.append("| " + " | ".join([*cells, str(sum(bool(row.revert_differs) for row in good))]) + " |")
    return "\n".join(lines)


def _cells(rows: list[Row], walk_only: bool) -> list[str]:
    plain, calls = sum(row.plain for row in rows), sum(row.calls for row in rows)
    walked = [f"{plain} + {calls - plain}", linear.share(sum(row.walked for row in rows), plain)]
    if walk_only:
        return [*walked, *["-"] * 4]
    reached = [(sum(row.reached_plain for row in rows), plain), (sum(row.reached for row in rows), calls)]
    skipped, silent = sum(sum(row.skipped.values()) for row in rows), sum(len(row.silent) for row in rows)
    return [*walked, *(linear.share(*pair) for pair in reached), str(skipped), str(silent)]


def reasons(rows: list[Any]) -> str:
    """Why sites were skipped, most frequent first; of dropouts also the median of the module walk."""
    skipped: Counter[str] = Counter()
    for row in rows:
        skipped.update(row.skipped)
    lines = [f"{count:6d}  {reason}" for reason, count in skipped.most_common()]
    shares = sorted(row.walked / row.plain for row in rows if getattr(row, "plain", 0))
    if shares:
        lines.append(f"median architecture, module walk: {shares[len(shares) // 2]:.0%}")
    return "\n".join(lines)


def _line(row: Any) -> str:
    if isinstance(row, linear.LinearRow):
        return f"{linear.line(row)} {row.seconds:.2f}s"
    text = f"{row.library}:{row.name} ({row.model}) plain {row.reached_plain}/{row.plain}"
    return f"{text} walked {row.walked} droppath {row.reached_drop_path}/{row.drop_path} {row.seconds:.2f}s"


def _problems(row: Any) -> list[str]:
    names = ("error", "probe", "unmatched", "silent", "bypassed", "lost", "eval_differs", "revert_differs")
    values = {name: getattr(row, name, None) for name in names}
    return [
        f"{name}: {value[:3] if isinstance(value, list) else value}"
        for name, value in values.items()
        if value
    ]


if __name__ == "__main__":
    main()

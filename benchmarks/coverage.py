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
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import linear
from zoo.check import Row, graft_row, quiet, walk_row
from zoo.entries import LIBRARIES, entries, entry

from regraft.report.document import percent

NAMES = {"hf": "transformers", "torch": "torch"}
COLUMNS = (
    "library",
    "models",
    "calls + DropPath",
    "module walk",
    "regraft",
    "with DropPath",
    "skipped",
    "silent",
    "broken",
    "eval differs",
    "revert differs",
)


def main() -> None:
    options = _options()
    quiet()
    names = [one.id for one in _chosen(options)]
    rows: list[Row] = []
    start = time.perf_counter()
    for row in _rows(names, options):
        rows.append(row)
        wrong = row.error or row.silent or row.eval_differs or row.revert_differs
        if options.verbose or wrong or (row.bypassed if options.linear else row.lost):
            print(linear.line(row) if options.linear else _line(row), file=sys.stderr, flush=True)
        if options.seconds and time.perf_counter() - start > options.seconds:
            print(f"stopped after {len(rows)} of {len(names)} models: --seconds", file=sys.stderr)
            break
    if options.linear:
        print(linear.table(rows, walk_only=options.walk_only))
        print(counted(rows))
    else:
        print(table(rows, walk_only=options.walk_only))
        print(reasons(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


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


def table(rows: list[Row], walk_only: bool = False) -> str:
    """The coverage of each library, as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for library in dict.fromkeys(row.library for row in rows):
        lines.append(_table_line(library, [row for row in rows if row.library == library], walk_only))
    lines.append(_table_line("all", rows, walk_only))
    return "\n".join(lines)


def _table_line(library: str, rows: list[Row], walk_only: bool) -> str:
    good = [row for row in rows if row.error is None]
    plain = sum(row.plain for row in good)
    calls = sum(row.calls for row in good)
    cells = [NAMES.get(library, library), str(len(rows)), f"{plain} + {calls - plain}"]
    cells.append(_share(sum(row.walked for row in good), plain))
    if walk_only:
        cells += ["-"] * 4
    else:
        cells.append(_share(sum(row.reached_plain for row in good), plain))
        cells.append(_share(sum(row.reached for row in good), calls))
        cells.append(str(sum(sum(row.skipped.values()) for row in good)))
        cells.append(str(sum(len(row.silent) for row in good)))
    cells.append(str(len(rows) - len(good)))
    cells += [str(sum(row.eval_differs for row in good)), str(sum(bool(row.revert_differs) for row in good))]
    return "| " + " | ".join(cells) + " |"


def _share(part: int, whole: int) -> str:
    return f"{part} ({percent(part, whole)})" if whole else "-"


def counted(rows: list[Row]) -> str:
    """Why sites were skipped, most frequent first."""
    skipped: Counter[str] = Counter()
    for row in rows:
        skipped.update(row.skipped)
    return "\n".join(f"{count:6d}  {reason}" for reason, count in skipped.most_common())


def reasons(rows: list[Row]) -> str:
    """Why calls were skipped, most frequent first; and the median of the module walk."""
    lines = counted(rows).splitlines()
    shares = sorted(row.walked / row.plain for row in rows if row.plain)
    if shares:
        lines.append(f"median architecture, module walk: {shares[len(shares) // 2]:.0%}")
    return "\n".join(lines)


def _line(row: Row) -> str:
    text = f"{row.library}:{row.name} ({row.model}) plain {row.reached_plain}/{row.plain}"
    text += f" walked {row.walked} droppath {row.reached_drop_path}/{row.drop_path} {row.seconds:.2f}s"
    problems = {
        row.error or "": row.error,
        f"no probe: {row.probe}": row.probe,
        f"no match: {row.unmatched}": row.unmatched,
        f"silent: {row.silent[:3]}": row.silent,
        f"lost {row.lost}": row.lost,
        "eval differs": row.eval_differs,
        f"revert: {row.revert_differs[:3]}": row.revert_differs,
    }
    return " | ".join([text, *(text for text, true in problems.items() if true)])


if __name__ == "__main__":
    main()

"""Counts the faults that leave a model changed, at every line of every operation on five models.

    python tests/faults/table.py             # hours; every line, every fault
    python tests/faults/table.py --step 20   # each 20th line

Prints a table of operations and faults, and each place that left something changed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from cases import MODELS, OPERATIONS, case
from harness import FAULTS, broken_by, lines_of


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", type=int, default=1, help="take only each n-th line")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--model", action="append", choices=MODELS)
    names = [operation.__name__ for operation in OPERATIONS]
    parser.add_argument("--operation", action="append", choices=names)
    parser.add_argument("--start", type=int, default=0, help="the first line taken")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = time.monotonic() + options.seconds
    injected, broken = Counter(), Counter()
    operations = [work for work in OPERATIONS if work.__name__ in (options.operation or names)]
    for operation in operations:
        for name in options.model or MODELS:
            if time.monotonic() > ends:
                break
            work, build = case(operation, name)
            lines = lines_of(work, build)
            for place, line in enumerate(lines[options.start :: options.step]):
                if time.monotonic() > ends:
                    break
                # In turns, so that a sample has as many of each.
                faults = list(FAULTS) if options.step == 1 else [list(FAULTS)[place % len(FAULTS)]]
                for fault in faults:
                    what = broken_by(work, build, line, FAULTS[fault])
                    injected[operation.__name__, fault] += 1
                    if what:
                        broken[operation.__name__, fault] += 1
                        print(
                            f"{operation.__name__} {name}, {fault} at {line[0]}:{line[1]}: {what[:3]}",
                            flush=True,
                        )
    print("| operation |", " | ".join(FAULTS), "|")
    print("|---|", "---|" * len(FAULTS))
    for operation in operations:
        counts = [
            f"{broken[operation.__name__, fault]} of {injected[operation.__name__, fault]}"
            for fault in FAULTS
        ]
        print(f"| `{operation.__name__}` |", " | ".join(counts), "|")
    print(f"{broken.total()} of {injected.total()} faults left something changed")


if __name__ == "__main__":
    main()

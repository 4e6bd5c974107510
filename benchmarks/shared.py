"""For how many real models several passes share what is the same in all of them, and why not for the rest.

Every architecture of `tests/zoo`, in training and with all its rates at 0.1, makes two passes by
`strategy="shared"` and two by "auto", each with a backward.

    python benchmarks/shared.py                            # everything, a quarter of an hour on one core
    python benchmarks/shared.py --library hf --start 0 --limit 60
    python benchmarks/shared.py --library timm --every 8   # each eighth model
    python benchmarks/shared.py --json shared.json         # a row per model
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from zoo.check import quiet
from zoo.entries import LIBRARIES, entries
from zoo.entry import tensors

import regraft
from regraft.training.passes.analyze import Inputs, analysis_of


@dataclass
class Row:
    """One model; a strategy's entry is None where it ran, and else why it did not."""

    name: str
    model: str = ""
    shared: str | None = None
    settled: str | None = None
    """"shared" with every BatchNorm in eval, as in Monte Carlo prediction and often in fine-tuning."""
    auto: str | None = None
    prefix: float = 0.0
    """What part of a pass comes before the first draw."""
    differ: bool = False
    """Whether the passes differ."""
    per_pass: tuple[str, ...] = ()
    """Classes of modules that vmap cannot run, and that run once for each pass."""
    seconds: float = 0.0


def row_of(entry) -> Row:
    row, start = Row(entry.id), time.perf_counter()
    try:
        model, inputs = entry.build()
        row.model = type(model).__name__
        for strategy in ("auto", "shared"):
            setattr(row, strategy, tried(row, strategy, model, inputs))
        row.settled = row.shared
        if row.shared and "BatchNorm" in row.shared:
            settle(model)
            row.settled = tried(row, "shared", model, inputs)
        analysis = analysis_of(model, Inputs(called(inputs)))
        row.prefix, row.per_pass = round(analysis.prefix, 3), tuple(cls.__name__ for cls in analysis.per_pass)
    except Exception as error:
        row.auto = row.shared = row.settled = f"the model itself: {first_line(error)}"
    row.seconds = round(time.perf_counter() - start, 2)
    gc.collect()
    return row


def tried(row: Row, strategy: str, model, inputs) -> str | None:
    args, kwargs = called(inputs)
    try:
        found = tensors(regraft.stochastic_passes(model, 2, *args, strategy=strategy, **kwargs))
        stacked = [one for one in found if one.is_floating_point() and one.dim()]
        row.differ = any(not torch.equal(one[0], one[1]) for one in stacked if len(one) == 2)
        trained = [one.float().mean() for one in stacked if one.requires_grad]
        if trained:
            torch.stack(trained).sum().backward()
    except Exception as error:
        return first_line(error)
    model.zero_grad(set_to_none=True)
    return None


def settle(model) -> None:
    for module in model.modules():
        if "running_mean" in module._buffers:
            module.eval()


def called(inputs):
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def main() -> None:
    options = parse()
    quiet()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for library in options.library or LIBRARIES:
        found = [one for one in entries(library) if not options.only or options.only in one.name]
        for one in found[options.start : options.start + options.limit : options.every]:
            rows.append(row_of(one))
            if rows[-1].shared or rows[-1].auto or options.verbose:
                print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))


def table(rows: list[Row]) -> str:
    lines = ["| library | models | shared | with BatchNorm in eval | auto | once a pass | passes differ |"]
    lines.append("|---|---|---|---|---|---|---|")
    names = [*dict.fromkeys(row.name.split(":")[0] for row in rows), ""]
    for name in names:
        some = [row for row in rows if name in ("", row.name.split(":")[0])]
        counts = [sum(not one for one in column) for column in columns(some)]
        cells = [name or "all", str(len(some)), *(f"{one} ({one / max(len(some), 1):.1%})" for one in counts)]
        lines.append(
            "| " + " | ".join([*cells, *(str(sum(map(bool, one))) for one in traits_in(some))]) + " |"
        )
    reasons = Counter(row.shared for row in rows if row.shared)
    return "\n".join([*lines, "", *(f"{count:4d}  {reason}" for reason, count in reasons.most_common())])


def columns(rows: list[Row]):
    return [row.shared for row in rows], [row.settled for row in rows], [row.auto for row in rows]


def traits_in(rows: list[Row]):
    return [row.per_pass for row in rows], [row.differ for row in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", action="append", choices=LIBRARIES)
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="a line for every model")
    return parser.parse_args()


if __name__ == "__main__":
    main()

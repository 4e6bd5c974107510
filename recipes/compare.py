"""Which regularizer helps when labels are few: arms that are rules, paired over seeds, with intervals.

    pip install -e ".[recipes]"
    python recipes/compare.py                        # offline: 4 arms, 8 seeds, 6 minutes on 2 cores
    python recipes/compare.py --fresh                # again: other seeds, other test sentences
    python recipes/compare.py --also mixout gaussian # arms by name; --list names them
    python recipes/compare.py --also mine --arm mine "Dropout=gaussian(p=0.3)" alpha=2 steps=2
    python recipes/compare.py --model bert-base-uncased --dataset glue --task mrpc --labels 400 --tune

Each seed draws its own labelled sentences, their order and the weights of the head; every arm of that seed
gets the same. The lower layers are frozen and have no dropout (except where an arm says so), so that what
they compute is computed once. The learning rate was tuned for the baseline with --tune, on sentences that
are neither trained nor tested on; the same sentences fit the temperature. A run that was interrupted goes on
where it was. `results.json` holds the command, the settings and every run; `results.csv` the runs alone.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import shared  # first: without --model or --dataset it keeps to what is installed
from shared import calibration_error, difference, nll

# isort: split
import numpy as np
import torch
import transformers
from rich.progress import Progress, TimeElapsedColumn
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import regraft

LABELS = 200  # labelled sentences of a run
STEPS, BATCH = 80, 16  # optimizer steps, sentences a step: 6.4 times over 200 sentences
GROUP = 4  # batches whose sentences are sorted by length, so that little is padded
LEARNING_RATE = 3e-4  # of AdamW, tuned for the baseline: docs/results/tune.json
RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # what --tune tries
WARMUP, WEIGHT_DECAY = 0.1, 0.01  # a part of the steps; then the rate falls linearly to 0
FROZEN = 4  # lower layers that keep their weights, with the embeddings
LENGTH = 48  # tokens a sentence; 9 of 10 have at most 41
TEST, APART = 1000, 400  # sentences for the results; for the learning rate and the temperature
SEEDS = 8


@dataclass(frozen=True)
class Arm:
    """One way to train: rules, and how the loss is made of passes."""

    rules: dict[str, str]  # what `regraft.apply` grafts, selectors and variants
    alpha: float | None = None  # of R-Drop's KL, beside the mean of the cross-entropies; None is one pass
    steps: float = 1  # times the steps of the others
    fork: float | None = None  # the part of the layers that R-Drop's passes share, draws and all
    everywhere: bool = False  # the frozen layers keep their dropout, and so run in every step
    whole: bool = False  # the frozen layers run in every step, although they need not: for the cost


def dropout(p: float) -> dict[str, str]:
    return {"Dropout": f"dropout(p={p})"}


TOP = "Linear@**.layer.{4..5}.**"  # the linears that train, below the head

ARMS = {
    # Compared by default, and fixed before the runs in docs/results.
    "p=0.1": Arm(dropout(0.1)),
    "p=0.1, steps x2": Arm(dropout(0.1), steps=2),  # as long as R-Drop takes
    "p=0.3": Arm(dropout(0.3)),
    "R-Drop, p=0.3": Arm(dropout(0.3), alpha=2),
    # By name.
    "p=0.5": Arm(dropout(0.5)),
    "p=0.3, steps x2": Arm(dropout(0.3), steps=2),
    "R-Drop, p=0.1": Arm(dropout(0.1), alpha=0.5),
    "two passes, p=0.3": Arm(dropout(0.3), alpha=0),
    "gaussian": Arm({"Dropout": "gaussian(p=0.3)"}),
    "multisample": Arm({"Dropout": "multisample(p=0.3, num_samples=2)"}),  # half the noise of p=0.3
    "mixout": Arm(dropout(0.1) | {TOP: "mixout(p=0.5)"}),
    "dropconnect": Arm(dropout(0.1) | {TOP: "dropconnect(p=0.1)"}),
    "weak noise": Arm({"Dropout": "multisample(p='x2')", "Linear@classifier": "dropconnect(p=0.2)"}),
    "p=0.3 everywhere": Arm(dropout(0.3), everywhere=True),
    "R-Drop, p=0.3 everywhere": Arm(dropout(0.3), alpha=2, everywhere=True),
    "R-Drop, p=0.3 everywhere, fork": Arm(dropout(0.3), alpha=2, fork=2 / 3, everywhere=True),
    "p=0.3, whole model": Arm(dropout(0.3), whole=True),
    "R-Drop, p=0.3, whole model": Arm(dropout(0.3), alpha=2, whole=True),
}
DEFAULT = ("p=0.1", "p=0.1, steps x2", "p=0.3", "R-Drop, p=0.3")  # the first is the baseline

GPU = torch.accelerator.is_available()
DEVICE = torch.accelerator.current_accelerator() if GPU else torch.device("cpu")
COST = "seconds" if GPU else "cpu_seconds"  # what others do on the machine counts less


# What runs in each process.


@dataclass
class Data:
    """Token ids and labels of every sentence; which of them test, are apart, or wait to be drawn."""

    ids: list[list[int]]
    labels: list[int]
    test: range
    apart: range
    pool: range
    pad: int

    def drawn(self, seed: int, count: int) -> list[int]:
        """The labelled sentences of a seed, in an order that is random too."""
        return random.Random(seed).sample(self.pool, count)

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        ids, mask = shared.padded([self.ids[row] for row in rows], self.pad)
        labels = torch.tensor([self.labels[row] for row in rows])
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


class Skipped(nn.Module):
    """In the place of the embeddings or of a frozen layer: gives back what they made of the sentences."""

    def forward(self, *given, inputs_embeds=None, **_):
        return next(value for value in (inputs_embeds, *given) if value is not None)


def cut(model, count: int) -> None:
    """Let the model begin where its frozen layers end."""
    layers = shared.frozen_parts(model)[1]
    model.base_model.embeddings = Skipped()
    for index in range(count):
        layers[index] = Skipped()


class Worker:
    """Trains one arm with one seed after the other, in a process of its own."""

    def __init__(self, options: argparse.Namespace, data: Data, arms: dict[str, Arm], folder: str) -> None:
        torch.set_num_threads(options.threads)
        shared.quiet()
        self.options, self.data, self.arms = options, data, arms
        self.computed = {}
        file = Path(folder) / "computed.pt"
        if file.exists():
            packed = torch.load(file, mmap=True)
            self.computed = dict(zip(packed["rows"], packed["hidden"].split(packed["lengths"]), strict=True))

    def model(self, seed: int):
        torch.manual_seed(seed)
        classes = max(self.data.labels) + 1
        model = AutoModelForSequenceClassification.from_pretrained(
            self.options.model or shared.minilm(), num_labels=classes
        )
        shared.freeze(model, self.options.frozen)
        return model.to(DEVICE)

    def run(self, name: str, seed: int, rate: float, split: str) -> dict:
        """One run: trained, and measured on the test or, to tune, on the sentences apart."""
        options, arm = self.options, self.arms[name]
        model = self.model(seed)
        off = {} if arm.everywhere else shared.without_dropout(model, options.frozen)
        report = regraft.apply(model, {**arm.rules, **off})
        computed = not arm.whole and self.is_computed(model)
        if arm.alpha is not None:
            regraft.rdrop(model, alpha=arm.alpha, ce="mean", fork=arm.fork)
        if computed:
            cut(model, options.frozen)
        torch.manual_seed(1000 + seed)
        began, cpu = time.perf_counter(), time.process_time()
        self.train(model, seed, round(arm.steps * options.steps), rate, computed)
        if GPU:
            torch.accelerator.synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        if self.computed and not computed:  # in eval the frozen layers are the same for all arms
            cut(model, options.frozen)
        row = {"arm": name, "seed": seed, "rate": rate, "split": split, "grafted": len(report.grafted)}
        apart = self.predict(model, self.data.apart)
        measured = apart if split == "apart" else self.predict(model, self.data.test)
        return row | measures(*measured, *apart) | {"seconds": seconds, "cpu_seconds": cpu}

    def is_computed(self, model) -> bool:
        """Do the frozen layers make in training what is kept of them? Not with a dropout or a graft there."""
        if not self.computed:
            return False
        rows = self.data.apart[:BATCH]
        with torch.no_grad():
            hidden, _ = behind_frozen(model.train(), self.options.frozen, self.inputs(rows, computed=False))
        pairs = zip(hidden, rows, strict=True)
        return all(torch.allclose(each, self.computed[row], atol=1e-4) for each, row in pairs)

    def inputs(self, rows: list[int], computed: bool) -> dict[str, torch.Tensor]:
        batch = self.data.batch(rows)
        if computed:
            del batch["input_ids"]
            hidden = [self.computed[row] for row in rows]
            batch["inputs_embeds"] = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
        return {name: value.to(DEVICE) for name, value in batch.items()}

    def train(self, model, seed: int, steps: int, rate: float, computed: bool) -> None:
        rows, order = self.data.drawn(seed, self.options.labels), random.Random(seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        model.train()
        for batch in itertools.islice(self.batches(rows, order), steps):
            model(**self.inputs(batch, computed)).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def batches(self, rows: list[int], order: random.Random) -> Iterator[list[int]]:
        """Without end: each sentence once before any comes again, sentences of like length together."""
        waiting: list[int] = []
        while True:
            while len(waiting) < BATCH * GROUP:
                waiting += order.sample(rows, len(rows))
            group, waiting = waiting[: BATCH * GROUP], waiting[BATCH * GROUP :]
            group.sort(key=lambda row: len(self.data.ids[row]))
            starts = order.sample(range(0, len(group), BATCH), GROUP)
            yield from (group[start : start + BATCH] for start in starts)

    @torch.no_grad()
    def predict(self, model, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels; sentences of like length together, so that little is padded."""
        model.eval()
        order, logits = sorted(rows, key=lambda row: len(self.data.ids[row])), []
        for batch in shared.batched(order, 64):
            inputs = self.inputs(batch, computed=bool(self.computed))
            inputs.pop("labels")
            logits.append(model(**inputs).logits)
        return torch.cat(logits).double().cpu().numpy(), np.array([self.data.labels[row] for row in order])


def behind_frozen(model, count: int, batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the frozen layers make of each sentence, and the logits."""
    kept = []
    handle = shared.frozen_parts(model)[1][count - 1].register_forward_hook(
        lambda _, __, output: kept.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    logits = model(**batch).logits
    handle.remove()
    lengths = batch["attention_mask"].sum(1).tolist()
    return [row[:length].cpu() for row, length in zip(kept[0], lengths, strict=True)], logits


@torch.no_grad()
def compute_frozen(options, data: Data, rows: list[int], folder: str) -> bool:
    """Run the frozen layers once for each sentence, and keep what comes out; False if that cannot serve."""
    worker = Worker(options, data, {}, folder)
    torch.set_num_threads(options.threads * options.processes)
    model, hidden = worker.model(0).eval(), []
    order = sorted(rows, key=lambda row: len(data.ids[row]))
    for batch in shared.batched(order, 64):
        made, logits = behind_frozen(model, options.frozen, worker.inputs(batch, computed=False))
        hidden += made
    lengths = [len(row) for row in hidden]
    file = Path(folder, "computed.pt")
    torch.save({"rows": order, "hidden": torch.cat(hidden), "lengths": lengths}, file)
    cut(model, options.frozen)
    try:  # the model that begins behind them must say the same
        again = model(**Worker(options, data, {}, folder).inputs(batch, computed=True)).logits
        served = torch.allclose(again, logits, atol=1e-4)
    except (TypeError, ValueError, RuntimeError):
        served = False
    if not served:
        file.unlink()
    return served


_worker: Worker | None = None


def start(*arguments) -> None:
    global _worker  # noqa: PLW0603
    _worker = Worker(*arguments)


def run(*arguments) -> dict:
    return _worker.run(*arguments)


# What is measured.


def measures(logits, labels, apart_logits, apart_labels) -> dict[str, float]:
    """Accuracy, NLL and ECE; the last two again with the temperature that fits the sentences apart."""
    temperature = shared.temperature(apart_logits, apart_labels)
    scaled = {"nll_scaled": nll(logits / temperature, labels)}
    scaled["ece_scaled"] = calibration_error(logits / temperature, labels)
    return shared.measures(logits, labels) | {"temperature": temperature} | scaled


def sentence(name: str, runs: dict[str, list[dict]], arms: dict[str, Arm]) -> str:
    """What the table says of an arm, in words; no claim where the interval holds 0."""
    baseline = next(iter(runs))
    if name == baseline:
        return f"{name} is the baseline: accuracy {np.mean([row['accuracy'] for row in runs[name]]):.3f}."
    cost = np.mean([r[COST] for r in runs[name]]) / np.mean([r[COST] for r in runs[baseline]])
    parts = [words(name, baseline, runs)]
    for other in runs:  # the same rules with one pass: what the second pass adds
        alone = arms[other].alpha is None and arms[other].rules == arms[name].rules
        if arms[name].alpha is not None and alone and other != baseline:
            parts.append(words(name, other, runs))
    return f"{name}: " + "; ".join(parts) + f"; {cost:.2f} times the baseline's {COST.replace('_', ' ')}."


def words(name: str, other: str, runs: dict[str, list[dict]]) -> str:
    made = []
    for measure, unit in (("accuracy", ""), ("nll", "NLL "), ("ece", "ECE ")):
        change = difference(runs[name], runs[other], measure, shared.MEASURES[measure])
        made.append(f"{unit}{change}" + ("" if change.separable else " (not separable)"))
        if measure == "accuracy":
            made[-1] += f", better in {change.wins} of {change.seeds} seeds"
    return f"{made[0]} over {other}, " + ", ".join(made[1:])


# What is read.


def read(options) -> Data:
    """Sentences and labels of the package, of a CSV file, or of a dataset of the hub."""
    if options.dataset is None:
        pairs = shared.reviews(options.task or "rotten_tomatoes")
    elif options.dataset.endswith(".csv"):
        with Path(options.dataset).open(encoding="utf-8") as lines:
            pairs = [(row["text"], int(row["label"])) for row in csv.DictReader(lines)]
    else:
        pairs = shared.hub_dataset(options.dataset, options.task)
    shared.shuffled(pairs)
    if len(pairs) < options.apart + 2 * options.test + options.labels:
        sys.exit(f"error: {len(pairs)} sentences are too few\n  help: lower --test, --apart or --labels")
    tokenizer = AutoTokenizer.from_pretrained(options.model or shared.minilm())
    ids = [tokenizer(*texts, truncation=True, max_length=options.length)["input_ids"] for *texts, _ in pairs]
    start = options.apart + options.test * options.fresh
    test, apart = range(start, start + options.test), range(options.apart)
    pool = range(options.apart + 2 * options.test, len(pairs))
    return Data(ids, [pair[-1] for pair in pairs], test, apart, pool, tokenizer.pad_token_id or 0)


class Runs:
    """The runs of a folder, one JSON line each: what is there is not run again."""

    def __init__(self, options, arms: dict[str, Arm]) -> None:
        self.file = options.output / "runs.jsonl"
        chosen = ("model", "dataset", "task", "labels", "steps", "frozen", "length", "test", "apart", "fresh")
        self.settings = {name: getattr(options, name) for name in chosen}
        self.arms = arms
        self.rows: dict[tuple, dict] = {}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for row in map(json.loads, lines):
            if row.pop("settings") != self.settings:
                remedy = "another --output, or delete the file"
                sys.exit(f"error: {self.file} holds runs with other settings\n  help: {remedy}")
            if row.pop("made_of") == repr(arms.get(row["arm"])):
                self.rows[self.key(row)] = row

    @staticmethod
    def key(row: dict) -> tuple:
        return row["arm"], row["seed"], row["rate"], row["split"]

    def add(self, row: dict) -> None:
        self.rows[self.key(row)] = row
        with self.file.open("a") as lines:
            extra = {"settings": self.settings, "made_of": repr(self.arms[row["arm"]])}
            lines.write(json.dumps(row | extra) + "\n")


def run_all(options, data: Data, runs: Runs, jobs: list[tuple]) -> None:
    """The jobs that have not been run yet, in processes of their own."""
    waiting = [job for job in jobs if job not in runs.rows]
    if not waiting:
        return
    with tempfile.TemporaryDirectory() as folder:
        needed = {*data.apart, *(data.test if any(job[3] == "test" for job in waiting) else ())}
        needed |= {row for _, seed, _, _ in waiting for row in data.drawn(seed, options.labels)}
        if options.frozen and not compute_frozen(options, data, sorted(needed), folder):
            shared.say("the frozen layers of this model run in every step: it cannot begin behind them")
        context = multiprocessing.get_context("spawn")
        arguments = (options, data, runs.arms, folder)
        bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=shared.console)
        with bar, ProcessPoolExecutor(options.processes, context, start, arguments) as pool:
            task = bar.add_task(f"{len(waiting)} runs", total=len(waiting))
            for done in as_completed([pool.submit(run, *job) for job in waiting]):
                runs.add(done.result())
                bar.advance(task)


def tuned(options, data: Data, runs: Runs, baseline: str) -> float:
    """The learning rate with which the baseline is best on the sentences apart, over seeds of its own."""
    seeds = range(1000, 1000 + options.tune_seeds)
    run_all(options, data, runs, [(baseline, seed, rate, "apart") for rate in RATES for seed in seeds])
    own = {rate: [runs.rows[baseline, seed, rate, "apart"] for seed in seeds] for rate in RATES}
    rows = []
    for rate, here in own.items():
        rows.append({"rate": rate} | {m: float(np.mean([r[m] for r in here])) for m in ("accuracy", "nll")})
        shared.say(f"rate {rate:g}: accuracy {rows[-1]['accuracy']:.3f}, NLL {rows[-1]['nll']:.3f}")
    made = [row for here in own.values() for row in here]
    shared.save_json(options, {"command": shared.command(), "rates": rows, "runs": made}, "tune.json")
    return max(rows, key=lambda row: row["accuracy"])["rate"]


def main() -> None:
    options, arms, names = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    data, runs = read(options), Runs(options, arms)
    rate = options.lr
    if options.tune:
        rate = tuned(options, data, runs, names[0])
        shared.say(f"learning rate {rate:g}: the best of {len(RATES)} for {names[0]}")
    seeds = [seed + 100 * options.fresh for seed in range(options.seeds)]
    began = time.perf_counter()
    run_all(options, data, runs, [(name, seed, rate, "test") for seed in seeds for name in names])
    made = {name: [runs.rows[name, seed, rate, "test"] for seed in seeds] for name in names}
    rows = [row | {"sentence": sentence(row["arm"], made, arms)} for row in shared.summarize(made)]
    title = f"{options.labels} labels, {options.seeds} seeds, {options.test} test sentences"
    shown, markdown = shared.table(rows, title, COST)
    shared.say(shown)
    for row in rows:
        shared.say(row["sentence"], highlight=False)
    shared.plot(made, title, options.output / "differences.png")
    (options.output / "table.md").write_text(markdown)
    with (options.output / "results.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(made[names[0]][0]))
        writer.writeheader()
        writer.writerows(row for name in names for row in made[name])
    result = {
        "command": shared.command(),
        "settings": runs.settings | {"lr": rate, "batch": BATCH, "weight_decay": WEIGHT_DECAY},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": str(DEVICE),
        "arms": {name: asdict(arms[name]) for name in names},
        "wall_seconds": time.perf_counter() - began,
        "summary": rows,
        "runs": made,
    }
    shared.save_json(options, result)
    shared.say(f"results.json, results.csv, table.md and differences.png are in {options.output}")


def parse() -> tuple[argparse.Namespace, dict[str, Arm], list[str]]:
    texts = {
        "model": "a hub name or a folder; default: the packaged MiniLM",
        "dataset": "a hub dataset or a .csv of text,label; default: packaged reviews",
        "task": "its configuration, such as sst2; of the packaged reviews: imdb",
    }
    parser = shared.parser(
        __doc__, texts, labels=LABELS, seeds=SEEDS, steps=STEPS, lr=LEARNING_RATE, frozen=FROZEN,
        length=LENGTH, test=TEST, apart=APART, tune_seeds=4, processes=2, threads=1,
    )  # fmt: skip
    parser.add_argument("--arms", nargs="+", default=DEFAULT, help="the first is the baseline")
    parser.add_argument("--also", nargs="+", default=[], help="beside the default arms")
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar=("NAME", "RULE"),
                        help="rules, and alpha=, steps=, fork=, everywhere=1, whole=1")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the arms there are")
    parser.add_argument("--tune", action="store_true", help="find the baseline's learning rate first")
    parser.add_argument("--fresh", action="store_true", help="other seeds and other test sentences")
    options = parser.parse_args()
    arms = dict(ARMS)
    for name, *parts in options.arm:
        settings = dict(part.split("=", 1) for part in parts)
        names = settings.keys() & {field.name for field in fields(Arm)}
        own = {name: float(settings.pop(name)) for name in names}
        arms[name] = Arm(settings, **own)
    if options.list:
        for name, arm in arms.items():
            shared.say(f"[bold]{name}[/]: {asdict(arm)}", highlight=False)
        sys.exit()
    names = list(dict.fromkeys([*options.arms, *options.also]))
    if unknown := [name for name in names if name not in arms]:
        parser.error(f"no arm is called {', '.join(unknown)}; --list names them")
    if options.seeds < 2 and len(names) > 1:
        parser.error("1 seed has no interval: --seeds 2 or more")
    if options.fresh and options.output == Path("output/compare"):
        options.output = Path("output/compare-fresh")
    return options, arms, names


if __name__ == "__main__":
    main()

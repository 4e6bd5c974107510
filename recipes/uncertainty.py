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

import random

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import regraft

LABELS, APART, HELD_OUT = 200, 200, 600  # sentences to learn, to fit temperatures, to test
LENGTH = 48  # tokens a sentence
STEPS, BATCH, LEARNING_RATE = 80, 16, 3e-4
FROZEN = 4  # lower layers that keep their weights, with the embeddings
RATE = 0.1  # of the dropout that learns and then samples
PASSES = 16


def main() -> None:
    transformers.set_seed(0)
    folder = shared.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    apart, test, train = data(tokenizer)
    fit(model, tokenizer, train)
    found = {}
    for name, rows in (("apart", apart), ("test", test)):
        model.eval()
        plain, passes, information = [], [], []
        for some in shared.batched(rows, 50):
            batch, _ = padded(tokenizer, some)
            with torch.no_grad():
                plain.append(model(**batch).logits.double().log_softmax(-1))
            sampled = regraft.mc_predict(model, options.passes, **batch, progress=False)
            passes.append(sampled.mean.double().log())
            information.append(sampled.mutual_information)
        found[name] = [torch.cat(each).numpy() for each in (plain, passes, information)]
    labels, apart_labels = (np.array([row["labels"] for row in rows]) for rows in (test, apart))
    rows, curves = [], {}
    for name, index in (("softmax", 0), (f"{options.passes} passes", 1)):
        logits, factor = found["test"][index], shared.temperature(found["apart"][index], apart_labels)
        for title, scaled in ((name, logits), (f"{name}, temperature", logits / factor)):
            curve = risk_coverage(shared.log_softmax(scaled).max(-1), scaled.argmax(-1) == labels)
            rows.append({"method": title, **shared.measures(scaled, labels), "aurc": float(curve.mean())})
            curves[title] = curve
    _, mean, information = found["test"]
    curve = curves["mutual information"] = risk_coverage(-information, mean.argmax(-1) == labels)
    rows.append({"method": "mutual information", "aurc": float(curve.mean())})
    title = f"{len(test)} sentences"
    table = Table("method", "accuracy", "NLL", "ECE", "mean risk over coverages", title=title)
    for row in rows:
        cells = (f"{row[key]:.3f}" if key in row else "" for key in ("accuracy", "nll", "ece", "aurc"))
        table.add_row(row["method"], *cells)
    shared.say(table)
    shared.say("one model: the differences between its rows are as uncertain as one draw of 200 labels is")
    shared.save_json(options, rows)
    plot(curves)


def fit(model, tokenizer, train) -> None:
    shared.freeze(model, FROZEN)  # their dropout stays, to be sampled
    shared.say(regraft.apply(model, {"Dropout": f"dropout(p={options.rate})"}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    model.train()
    for step in range(options.steps):
        batch, labels = padded(tokenizer, random.Random(step).sample(train, BATCH))
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def risk_coverage(certainty: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of the k most certain predictions, for every k, the part that is wrong."""
    wrong = ~right[np.argsort(-certainty, kind="stable")]
    return wrong.cumsum() / np.arange(1, len(wrong) + 1)


def plot(curves: dict[str, np.ndarray]) -> None:
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
    pairs = shared.shuffled(shared.reviews())[: APART + options.test + LABELS]
    rows = [dict(tokenizer(text, truncation=True, max_length=LENGTH), labels=label) for text, label in pairs]
    return rows[:APART], rows[APART : APART + options.test], rows[APART + options.test :]


if __name__ == "__main__":
    numbers = {"steps": STEPS, "rate": RATE, "passes": PASSES, "test": HELD_OUT}
    options = shared.parse(shared.parser(__doc__, {}, **numbers))
    main()

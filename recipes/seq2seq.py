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

import re

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, T5Config, Trainer

import regraft

SENTENCES, HELD_OUT, LENGTH = 4000, 200, 64  # to learn, to test; bytes of each
STEPS, BATCH, LEARNING_RATE = 400, 32, 3e-3
ALPHA = 1.0  # weight of R-Drop's KL beside the mean of the cross-entropies
PAD, END, FIRST = 0, 1, 3  # byte b is token b + 3, as in ByT5
SMALL = T5Config(
    vocab_size=FIRST + 256, d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.1,
    decoder_start_token_id=PAD, feed_forward_proj="gated-gelu",
)  # fmt: skip


def main() -> None:
    texts = shared.shuffled([text.lower() for text, _ in shared.reviews()])[: options.test + options.train]
    rows = [{"input_ids": encode(re.sub("[aeiou]", "", text)), "labels": encode(text)} for text in texts]
    test, train = rows[: options.test], rows[options.test :]
    results = []
    for name in ("baseline", "R-Drop"):
        transformers.set_seed(0)
        make = AutoModelForSeq2SeqLM
        model = make.from_pretrained(options.model) if options.model else make.from_config(SMALL)
        if name == "R-Drop":
            regraft.rdrop(model, alpha=ALPHA, ce="mean")
        loss = fit(model, train, test)
        written = [write(model, row) for row in test[:3]]
        results.append({"arm": name, "held-out loss": loss, "written": written})
        shared.say(f"{name}: loss {loss:.3f} on held-out sentences")
        for row, text in zip(test, written, strict=False):
            shared.say(f"  {decode(row['input_ids'])!r}\n  -> {text.strip()!r}", markup=False)
    regraft.revert(model).save_pretrained(options.output / "model")
    shared.save_json(options, results)


def fit(model, train, test) -> float:
    arguments = shared.trainer_arguments(
        options, learning_rate=options.lr, per_device_train_batch_size=BATCH, per_device_eval_batch_size=50
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=test, data_collator=collate
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def collate(rows) -> dict[str, torch.Tensor]:
    ids, mask = shared.padded([row["input_ids"] for row in rows], PAD)
    labels, _ = shared.padded([row["labels"] for row in rows], -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def write(model, row) -> str:
    ids = torch.tensor([row["input_ids"]], device=model.device)
    return decode(model.eval().generate(ids, max_new_tokens=LENGTH, do_sample=False)[0].tolist())


def encode(text: str) -> list[int]:
    return [FIRST + byte for byte in text.encode()[:LENGTH]] + [END]


def decode(ids: list[int]) -> str:
    return bytes(each - FIRST for each in ids if FIRST <= each < FIRST + 256).decode(errors="replace")


if __name__ == "__main__":
    texts = {"model": "a byte-level T5 of the hub; default: a small one from nothing"}
    numbers = {"train": SENTENCES, "test": HELD_OUT, "steps": STEPS, "lr": LEARNING_RATE}
    options = shared.parse(shared.parser(__doc__, texts, **numbers))
    main()

"""R-Drop for token classification: one line before an ordinary Trainer.

    pip install -e ".[recipes]"
    python recipes/token_classification.py           # offline, some minutes on 2 cores
    python recipes/token_classification.py --model bert-base-uncased

The task needs no labels but the text itself: given a film review in lower case, say which words began with a
capital. The KL of R-Drop is taken at the positions that have a label, so padding and the later pieces of
words (-100) count in neither term. One run of each arm shows how it is done; it ranks nothing.
"""

from __future__ import annotations

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import numpy as np
import transformers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
)

import regraft

REVIEWS, HELD_OUT, LENGTH = 200, 200, 64  # to learn, to test; tokens of each
STEPS, BATCH, LEARNING_RATE = 60, 16, 3e-4
FROZEN = 4  # lower layers that keep their weights, with the embeddings
RATE, ALPHA = 0.3, 2.0  # of the dropout; weight of R-Drop's KL beside the mean of the cross-entropies


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = shared.shuffled([text.replace("<br />", " ") for text, _ in shared.reviews("imdb")])
    rows = [labelled(text, tokenizer) for text in texts[: options.test + options.train]]
    test, train = rows[: options.test], rows[options.test :]
    results = []
    for name in ("baseline", "R-Drop"):
        transformers.set_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(options.model, num_labels=2)
        off = shared.freeze(model, options.frozen)
        rule = {"Dropout": f"dropout(p={RATE})"} if name == "R-Drop" else {}
        if rule or off:
            regraft.apply(model, rule | off)
        if name == "R-Drop":
            regraft.rdrop(model, alpha=ALPHA, ce="mean")
        made = fit(model, tokenizer, train, test)
        results.append({"arm": name, **made})
        shared.say(f"{name}: capitals found with F1 {made['f1']:.3f}, NLL {made['loss']:.3f}")
    regraft.revert(model).save_pretrained(options.output / "model")
    shared.save_json(options, results)


def fit(model, tokenizer, train, test) -> dict[str, float]:
    arguments = shared.trainer_arguments(
        options, learning_rate=LEARNING_RATE, per_device_train_batch_size=BATCH, per_device_eval_batch_size=50
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=test,
        data_collator=DataCollatorForTokenClassification(tokenizer), compute_metrics=f1,
    )  # fmt: skip
    trainer.train()
    made = trainer.evaluate()
    return {"loss": made["eval_loss"], "f1": made["eval_f1"]}


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


if __name__ == "__main__":
    texts = {"model": "a hub name or a folder; default: the packaged MiniLM"}
    numbers = {"train": REVIEWS, "test": HELD_OUT, "steps": STEPS, "frozen": FROZEN}
    options = shared.parse(shared.parser(__doc__, texts, **numbers))
    options.model = options.model or shared.minilm()
    main()

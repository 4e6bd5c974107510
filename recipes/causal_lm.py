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

import shared  # first: without --model or --dataset it keeps to what is installed

# isort: split
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, Trainer

import regraft

PRETRAIN = 300  # steps of the small Llama on reviews
SENTENCES, HELD_OUT, LENGTH = 200, 400, 96  # of the fine-tuning; bytes or tokens of each
STEPS, BATCH, LEARNING_RATE = 150, 16, 2e-3  # high for LoRA, since the model is small
RANK, TARGETS = 8, ["q_proj", "v_proj", "up_proj", "down_proj"]
RATE = 0.1  # of the inserted dropout
RULES = {"after:*@**.mlp": f"dropout(p={RATE})", "after:*@**.self_attn": f"dropout(p={RATE})"}
SMALL = LlamaConfig(
    vocab_size=257, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=256, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def main() -> None:
    encode, pad, create = shared.causal_model(options, SMALL, LENGTH)
    few = shared.shuffled([encode(text) for text, _ in shared.reviews()])
    test, train = few[: options.test], few[options.test : options.test + options.train]
    arms = {"no dropout": {}, "LoRA's own dropout": {}, "inserted": shared.rules(options.rules, RULES)}
    rows = []
    for name, rules in arms.items():
        transformers.set_seed(0)
        own = RATE if name == "LoRA's own dropout" else 0.0
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=own)
        model = get_peft_model(create(), lora)
        if rules:
            shared.say(regraft.apply(model, rules))
        trainer = fit(model, train, pad)
        held_out = trainer.evaluate([{"input_ids": row} for row in test])["eval_loss"]
        own_loss = trainer.evaluate([{"input_ids": row} for row in train])["eval_loss"]
        rows.append({"arm": name, "held-out loss": held_out, "training loss": own_loss})
        shared.say(f"{name}: loss {held_out:.4f} on held-out sentences, {own_loss:.4f} on those it learned")
    regraft.revert(model)
    model.save_pretrained(options.output / "lora")  # the LoRA weights alone, as PEFT names them
    loaded = type(model).from_pretrained(create(), options.output / "lora")
    batch = {"input_ids": torch.tensor(test[:1])}
    with torch.no_grad():
        same = torch.equal(loaded.eval()(**batch).logits, model.cpu().eval()(**batch).logits)
    shared.say(f"LoRA weights in {options.output / 'lora'} load without regraft, same logits: {same}")
    shared.save_json(options, rows)


def fit(model, train, pad: int) -> Trainer:
    def collate(rows):
        ids, mask = shared.padded([row["input_ids"] for row in rows], pad)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    arguments = shared.trainer_arguments(
        options, learning_rate=options.lr, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64, remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"input_ids": row} for row in train]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


if __name__ == "__main__":
    texts = {"model": "a causal model of the hub; default: a small Llama, trained here"}
    parser = shared.parser(
        __doc__, texts, train=SENTENCES, test=HELD_OUT, steps=STEPS, pretrain=PRETRAIN, lr=LEARNING_RATE
    )
    parser.add_argument("--rules", nargs="+", help=f"what is inserted; default: {RULES}")
    options = shared.parse(parser)
    main()

"""What is interrupted: operations on five small models of real architectures."""

from __future__ import annotations

from functools import partial

import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft

RULES = {"Dropout": "gaussian(p=0.2)"}
TOKENS = torch.ones(2, 4, dtype=torch.long)


class LSTMLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 20)

    def forward(self, input_ids):
        return self.head(self.drop(self.lstm(self.embedding(input_ids))[0]))


class UNet(nn.Module):
    """Down, up and a skip, with a channel dropout and a functional one."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout2d(0.1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        deep = F.dropout(self.drop(self.norm(self.deep(self.down(x)))), 0.2, self.training)
        return self.out(torch.cat([x, self.up(deep)], 1))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_local_experts=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
    )
    return MixtralForCausalLM(config)


MODELS = {
    "bert": (partial(tiny.bert, layers=1), {"input_ids": TOKENS}),
    "vit": (tiny.vit, {"x": tiny.images(2)}),
    "lstm": (LSTMLanguageModel, {"input_ids": TOKENS}),
    "mixtral": (mixtral, {"input_ids": TOKENS}),
    "unet": (UNet, {"x": torch.ones(2, 3, 8, 8)}),
}


def apply(model, inputs):
    regraft.apply(model, RULES, inputs=inputs)


def revert(model, inputs):
    regraft.revert(model)


def inspect(model, inputs):
    regraft.inspect(model, inputs=inputs)


def grafted(model, inputs):
    with regraft.grafted(model, RULES, inputs=inputs):
        pass


def schedule(model, inputs):
    regraft.schedule(model, p={"start": 0.0, "end": 0.1, "steps": 9}, inputs=inputs)


def rdrop(model, inputs):
    regraft.rdrop(model, alpha=1.0, criterion=F.cross_entropy, inputs=inputs)


def max_norm(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regraft.max_norm(
        model,
        {("Linear" if any(type(m) is nn.Linear for m in model.modules()) else "Conv2d"): 3.0},
        optimizer,
        inputs=inputs,
    ).remove()


def mc_predict(model, inputs):
    task = "regression"
    regraft.mc_predict(model, 2, task=task, **inputs)


OPERATIONS = (apply, revert, inspect, grafted, schedule, rdrop, max_norm, mc_predict)
GRAFTED = (revert, schedule)
"""Operations whose models have grafts already."""


def case(operation, name):
    """An operation on a model, and what makes the model."""
    build, inputs = MODELS[name]

    def made():
        model = build()
        if operation in GRAFTED:
            apply(model, inputs)
        return model

    return partial(operation, inputs=inputs), made

"""What a page's snippets take for granted: the reader's own model, batch, loader. Small, and real."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regraft


def _readme():
    bert = tiny.bert()
    return {
        "model": bert,
        "new_model": tiny.bert(),
        "policy": tiny.bert(),
        "criterion": nn.CrossEntropyLoss(),
    }


def _passes():
    bert = tiny.bert(layers=10)
    batch = tiny.tokens(4)
    return {"regraft": regraft, "model": bert, "batch": batch, "labels": torch.tensor([0, 1, 1, 0])}


def _many_gpus():
    rows = [
        {"input_ids": row, "labels": torch.tensor(k % 2)} for k, row in enumerate(tiny.tokens(8)["input_ids"])
    ]
    return {"model": tiny.bert(), "train": rows}


class Labelled(nn.Module):
    """A loss under other names, as nanoGPT has it, and labels of two kinds, as in question answering."""

    def __init__(self):
        super().__init__()
        self.body = tiny.mlp()

    def forward(self, x, targets=None, start_positions=None, end_positions=None):
        logits = self.body(x)
        return logits, None if targets is None else nn.functional.cross_entropy(logits, targets)


def _trl():
    from transformers import Trainer, TrainingArguments

    ids = tiny.tokens(4)["input_ids"]
    return {
        "model": tiny.llama(),
        "SFTTrainer": Trainer,  # TRL's is a subclass that takes the same arguments
        "args": TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True),
        "data": [{"input_ids": row, "labels": row} for row in ids],
    }


def _loader():
    data = TensorDataset(torch.randn(8, 6), torch.arange(8) % 3)
    return {"model": tiny.mlp(), "nn": nn, "loader": DataLoader(data, batch_size=4)}


_RDROP = [
    lambda: {"regraft": regraft, "model": tiny.bert()},
    _loader,
    lambda: {"model": Labelled()},
    _trl,
    lambda: {"model": tiny.mlp(), "train_loss_fn": nn.CrossEntropyLoss()},
    lambda: {"model": Labelled()},
    lambda: {"model": tiny.mlp()},
]
"""docs/rdrop.md speaks of a model in each block."""


def _files():
    """A whole model in a file, as the commands of the page read it."""
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2)), "model.pt")
    return {}


GIVEN = {
    "README.md": [dict, _readme],
    "docs/api/cli.md": [_files],
    "docs/passes.md": [_passes],
    "docs/many-gpus.md": [_many_gpus],
    "docs/rdrop.md": _RDROP,
}


def given(page):
    """For each block of a page in turn, the names that it takes for granted beside those of the blocks above."""
    yield {"__name__": "project.train"}
    # None: the block is not run.
    yield from (build() for build in GIVEN.get(page, []))

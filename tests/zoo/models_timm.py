"""timm architectures: the smallest one or two of every family, with all rates at 0.1."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .entry import RATE, Entry, Inputs

NAMES = Path(__file__).parent / "timm_names.txt"
RATES = (
    "drop_rate",
    "drop_path_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "drop_block_rate",
)


def entries() -> Iterator[Entry]:
    """Every line of the list: a name, the rates its constructor takes, the image size, further arguments."""
    for line in NAMES.read_text().splitlines():
        name, rates, size, extra = line.split("\t")
        options = {rate: RATE for rate in rates.split(",") if rate} | json.loads(extra)
        yield Entry("timm", name, functools.partial(_make, name, options, int(size)))


def _make(name: str, options: dict[str, object], size: int) -> tuple[nn.Module, Inputs]:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    channels = model.pretrained_cfg["input_size"][0]
    return model, (torch.randn(2, channels, size, size),)

"""Hugging Face architectures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hf_inputs
from .entry import Entry, Inputs
from .hf_configs import Shrink
from .hf_extra import EXTRA

NAMES = Path(__file__).parent / "hf_names.txt"
HEADS = (
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "CTC", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION", "DEPTH_ESTIMATION", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "PRETRAINING",
)


def make(model_type: str, class_name: str, shrink: Shrink, way: str = "main", cap: float = 2e7
         ) -> tuple[nn.Module, Inputs]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, class_name)
    config = shrink.config(CONFIG_MAPPING[model_type], EXTRA.get(model_type))
    config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > cap:
        raise MemoryError(f"{size / 1e6:.0f} M parameters")
    model = cls(config)
    return model, hf_inputs.made(model, way)


def entries() -> Iterator[Entry]:
    """Every line of the list: a model type, its class, how far it is shrunk, what its forward needs."""
    for line in NAMES.read_text().splitlines():
        model_type, class_name, widths, image, layers, way = line.split("\t")
        shrink = functools.partial(Shrink, widths == "tiny", int(image) or None, int(layers))
        yield Entry("hf", model_type, functools.partial(_made, model_type, class_name, shrink, way))


def _made(model_type: str, class_name: str, shrink: Callable[[], Shrink], way: str) -> tuple[nn.Module, Inputs]:
    return make(model_type, class_name, shrink(), way, cap=float("inf"))

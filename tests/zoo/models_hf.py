"""Hugging Face architectures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from . import hf_inputs
from .entry import Entry, Inputs
from .hf_configs import Shrink
from .hf_extra import EXTRA

NAMES = Path(__file__).parent / "hf_names.txt"


def make(
    model_type: str, class_name: str, shrink: Shrink, way: str = "main", cap: float | None = None
) -> tuple[nn.Module, Inputs]:
    """One architecture and its inputs.

    Args:
        model_type: the key of the configuration.
        class_name: the class to build.
        shrink: how far.
        way: what its forward needs beyond the main input.
        cap: the number of parameters that is too many, asked before they are made.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, class_name)
    config = shrink.config(CONFIG_MAPPING[model_type], EXTRA.get(model_type))
    config.use_cache = False
    if cap is not None:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > cap:
            raise MemoryError(f"{size / 1e6:.0f} M parameters")
    model = cls(config)
    return model, hf_inputs.made(model, way)


def entries() -> Iterator[Entry]:
    """Every line of the list: a model type, its class, how far it is shrunk, what its forward needs."""
    for line in NAMES.read_text().splitlines():
        model_type, class_name, widths, image, layers, way = line.split("\t")
        shrink = functools.partial(Shrink, widths == "tiny", int(image) or None, int(layers))
        yield Entry("hf", model_type, functools.partial(_fresh, model_type, class_name, shrink, way))


def _fresh(model_type: str, name: str, shrink: Callable[[], Shrink], way: str) -> tuple[nn.Module, Inputs]:
    return make(model_type, name, shrink(), way)  # a Shrink hands out token ids, so each model gets its own

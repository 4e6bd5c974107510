"""Inputs for a Hugging Face model, made from its forward's signature and its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

BATCH, TEXT = 2, 12


def made(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one forward of `model`."""
    parameters = inspect.signature(model.forward).parameters
    config = model.config
    main = model.main_input_name
    main = main[0] if isinstance(main, (list, tuple)) else main
    names = [main] if main in parameters else []
    names += [n for n, one in parameters.items() if n not in names and _required(one)]
    inputs = {name: _MAKERS[name](config) for name in names if name in _MAKERS}
    if "decoder_input_ids" in parameters and "decoder_input_ids" not in inputs and find(config, "is_encoder_decoder"):
        inputs["decoder_input_ids"] = _ids(config)
    if "input_ids" in inputs and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "text_encoder", "backbone_config",
          "thinker_config", "audio_encoder_config", "encoder_config", "decoder_config", "speech_encoder")


def find(config: Any, name: str, default: Any = None) -> Any:
    """A setting of the configuration or of one of its parts."""
    value = getattr(config, name, None)
    for part in _PARTS:
        if value is not None:
            return value
        inner = getattr(config, part, None)
        if inner is not None and not isinstance(inner, (dict, str)):
            value = find(inner, name)
    return default if value is None else value


def _ids(config: Any) -> torch.Tensor:
    vocabulary = min(find(config, "vocab_size", 100), 100)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (BATCH, TEXT))
    special = {v for k, v in vars(config).items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    for token in special:
        ids[ids == token] = min(4, vocabulary - 1)
    end = find(config, "eos_token_id")
    end = end[0] if isinstance(end, (list, tuple)) else end
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _pixels(config: Any) -> torch.Tensor:
    size = find(config, "image_size", find(config, "input_size", 224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = find(config, "num_channels", find(config, "in_channels", 3))
    return torch.randn(BATCH, channels if isinstance(channels, int) else 3, height, width)


def _video(config: Any) -> torch.Tensor:
    pixels = _pixels(config)
    frames = find(config, "num_frames", find(config, "frames_per_clip", 4))
    return pixels[:, None].repeat(1, frames, 1, 1, 1)


def _waves(config: Any) -> torch.Tensor:
    return torch.randn(BATCH, 4_000)


def _features(config: Any) -> torch.Tensor:
    bins = find(config, "num_mel_bins", find(config, "feature_projection_input_dim", 80))
    frames = 2 * find(config, "max_source_positions", 32)
    return torch.randn(BATCH, bins, frames)


_MAKERS = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_values": _waves,
    "input_features": _features,
    "attention_mask": lambda config: torch.ones(BATCH, TEXT, dtype=torch.long),
}

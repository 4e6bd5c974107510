"""Inputs for a Hugging Face model, made from its forward's signature and its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

BATCH, TEXT = 2, 16


WAYS = ("main", "images", "transposed", "video", "patches")
"""What a forward may need beyond its main input; which one a model needs is in the list of names."""


def made(model: nn.Module, way: str = "main") -> dict[str, Any]:
    """Keyword arguments for one forward of `model`."""
    parameters = inspect.signature(model.forward).parameters
    config = model.config
    main = model.main_input_name
    main = main[0] if isinstance(main, (list, tuple)) else main
    names = [main] if main in parameters else []
    names += [n for n, one in parameters.items() if n not in names and _required(one)]
    if way == "images":
        both = ("input_ids", "pixel_values", "bbox", "input_features")
        names += [name for name in both if name in parameters and name not in names]
    inputs = {name: _MAKERS[name](config) for name in names if name in _MAKERS}
    if "decoder_input_ids" in parameters and find(config, "is_encoder_decoder"):
        inputs.setdefault("decoder_input_ids", _ids(config))
    if "input_ids" in inputs and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if way == "transposed":
        for name in inputs.keys() & {"input_features", "input_values"}:
            inputs[name] = inputs[name].transpose(1, 2) if inputs[name].dim() > 2 else inputs[name][:, None]
    if way == "video" and "pixel_values" in inputs:
        inputs["pixel_values"] = _video(config)
    if model.config.model_type in _OWN:
        inputs |= _OWN[model.config.model_type](config)
    if way == "patches":
        inputs |= _patches(config, main, parameters)
    return inputs


def _patches(config: Any, main: str, parameters: Any) -> dict[str, Any]:
    """Images as a flat list of patches with a grid, as Qwen2-VL's vision tower takes them."""
    size = find(config, "patch_size", 14)
    depth = find(config, "in_channels", find(config, "in_chans", find(config, "num_channels", 3)))
    width = depth * find(config, "temporal_patch_size", 1) * size * size
    grid = next((name for name in ("image_grid_thw", "grid_hws") if name in parameters), "grid_thw")
    first = next((name for name in ("pixel_values", "hidden_states") if name in parameters), main)
    made = {first: torch.randn(32, width), grid: torch.tensor([[1, 4, 4], [1, 4, 4]])}
    if "merge_sizes" in parameters:
        made["merge_sizes"] = torch.tensor([1, 1])
    return made


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


_PARTS = (
    "text_config",
    "vision_config",
    "audio_config",
    "encoder",
    "decoder",
    "text_encoder",
    "backbone_config",
    "thinker_config",
    "audio_encoder_config",
    "encoder_config",
    "decoder_config",
    "speech_encoder",
)


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
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            ids[ids == value] = min(4, vocabulary - 1)  # no placeholder of an image that is not there
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


def _decisions(config: Any) -> dict[str, Any]:
    steps, many = torch.arange(6).repeat(BATCH, 1), (BATCH, 6)
    return {
        "states": torch.randn(*many, config.state_dim),
        "actions": torch.randn(*many, config.act_dim),
        "rewards": torch.randn(*many, 1),
        "returns_to_go": torch.randn(*many, 1),
        "timesteps": steps,
        "attention_mask": torch.ones(many, dtype=torch.long),
    }


def _regions(config: Any) -> dict[str, Any]:
    return {
        "visual_feats": torch.randn(BATCH, 6, config.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 6, 4),
    }


def _naflex(config: Any) -> dict[str, Any]:
    part = getattr(config, "vision_config", config)
    width = part.num_channels * part.patch_size**2
    return {
        "pixel_values": torch.randn(BATCH, 16, width),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }


_OWN = {
    "audio-spectrogram-transformer": lambda config: {"input_values": torch.randn(BATCH, 64, 32)},
    "decision_transformer": _decisions,
    "seggpt": lambda config: {
        "pixel_values": torch.randn(BATCH, 3, 32, 32),
        "prompt_pixel_values": torch.randn(BATCH, 3, 32, 32),
        "prompt_masks": torch.randn(BATCH, 3, 32, 32),
    },
    "lxmert": _regions,
    "siglip2": _naflex,
    "siglip2_vision_model": _naflex,
    "blip_2_qformer": lambda config: {
        "encoder_hidden_states": torch.randn(BATCH, 4, config.encoder_hidden_size)
    },
    "dia": lambda config: {"decoder_input_ids": torch.randint(0, 9, (BATCH, 6, 9))},
    "xclip": lambda config: {"pixel_values": torch.randn(BATCH, 8, 3, 32, 32)},
    "tvp": lambda config: {"pixel_values": torch.randn(BATCH, 1, 3, 448, 448)},
    "lightglue": lambda config: {"pixel_values": torch.randn(1, 2, 1, 64, 64)},
}
"""Models whose main input stands for several."""


def _series(config: Any) -> torch.Tensor:
    length = find(config, "context_length", 16) + max(find(config, "lags_sequence", [0]))
    channels = find(config, "num_input_channels", find(config, "input_size", 1))
    flat = channels == 1 and find(config, "lags_sequence")
    return torch.randn(BATCH, length) if flat else torch.randn(BATCH, length, channels)


_MAKERS = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_values": _waves,
    "input_features": _features,
    "bbox": lambda config: torch.ones(BATCH, TEXT, 4, dtype=torch.long),
    "input_features_mask": lambda config: torch.ones(BATCH, _features(config).shape[-1], dtype=torch.long),
    "qformer_input_ids": _ids,
    "query_embeds": lambda config: torch.randn(BATCH, 8, find(config, "hidden_size")),
    "task_inputs": lambda config: torch.randint(0, 99, (BATCH, find(config, "task_seq_len", 8))),
    "past_values": _series,
    "past_observed_mask": lambda config: torch.ones_like(_series(config)),
    "past_time_features": lambda config: torch.randn(
        *_series(config).shape[:2], find(config, "num_time_features", 1)
    ),
    "inputs_embeds": lambda config: torch.randn(BATCH, TEXT, find(config, "hidden_size")),
    "freq": lambda config: torch.zeros(BATCH, 1, dtype=torch.long),
    "attention_mask": lambda config: torch.ones(BATCH, TEXT, dtype=torch.long),
}

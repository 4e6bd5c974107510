"""Keyword arguments for the forward of a Hugging Face model, read from its signature and its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_TEXT = 8
_BATCH = 2
_FRAMES = 4
_GRID = 4
_MODALITIES = ("input_ids", "pixel_values", "bbox", "input_features", "input_values")
Kwargs = dict[str, Any]


def says_what_it_takes(model: nn.Module) -> bool:
    """Has it a config and the name of its main input, as models of Transformers have?"""
    main = getattr(model, "main_input_name", None)
    return getattr(model, "config", None) is not None and isinstance(main, (str, list, tuple))


def from_config(model: nn.Module) -> Iterator[Kwargs]:
    """Arguments to be tried, the fullest first: what is left out leaves modules out."""
    config, parameters = model.config, _parameters(model)
    main = getattr(model, "main_input_name", "")
    main = main if isinstance(main, str) else main[0]
    needed = [main] if main in parameters else []
    needed += [name for name, one in parameters.items() if name not in needed and _is_required(one)]
    wide = [*needed, *(name for name in _MODALITIES if name in parameters and name not in needed)]
    known = [name for name in parameters if name in _BUILDERS and name not in _RARE]
    chosen = [_built(names, config, parameters) for names in (wide, needed, [*wide, *known])]
    gridded: list[Kwargs] = [{}] if any(name in parameters for name in _GRIDS) else []
    for kwargs in [*_distinct(chosen)] or gridded:
        yield from _shaped(kwargs, config, parameters)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Of the forward that names its arguments: a wrapper such as PEFT's passes on whatever it gets."""
    for module in model.modules():
        found = dict(inspect.signature(module.forward).parameters)
        if any(one.kind not in _VARIABLE for one in found.values()):
            return found
    return {}


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in _VARIABLE


def _built(names: list[str], config: Any, parameters: Kwargs) -> Kwargs:
    made = {name: _BUILDERS[name](config) for name in names if name in _BUILDERS}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _ids(config)
    if "input_ids" in made and "attention_mask" in parameters:
        made["attention_mask"] = torch.ones(_BATCH, _TEXT, dtype=torch.long)
    return made


def _distinct(chosen: list[Kwargs]) -> Iterator[Kwargs]:
    seen: list[set[str]] = []
    for kwargs in chosen:
        if kwargs and set(kwargs) not in seen:
            seen.append(set(kwargs))
            yield kwargs


def _shaped(kwargs: Kwargs, config: Any, parameters: Kwargs) -> Iterator[Kwargs]:
    """The same arguments in each of the layouts that models use for them."""
    if any(name in parameters for name in _GRIDS):
        yield {**kwargs, **_flat_patches(config, parameters)}
    if "spatial_shapes" in parameters:
        yield {**kwargs, **_padded_patches(config)}
    if kwargs:
        yield kwargs
    images = kwargs.get("pixel_values")
    if images is not None:
        for frames in dict.fromkeys((_find(config, "num_frames", _FRAMES), _FRAMES, 1)):
            yield {**kwargs, "pixel_values": images[:, None].repeat(1, frames, 1, 1, 1)}
    for name in kwargs.keys() & {"input_features", "input_values"}:
        sound: Tensor = kwargs[name]
        if sound.dim() == 3:
            yield {**kwargs, name: sound.transpose(1, 2)}
        else:
            bins = _find(config, "num_mel_bins", 64)
            yield {**kwargs, name: sound[:, None]}
            yield {**kwargs, name: torch.zeros(_BATCH, _find(config, "max_length", 128), bins)}


def _ids(config: Any) -> Tensor:
    # Models for classification look for the end token (BART) or count padding, so neither is absent.
    vocabulary = max(int(_find(config, "vocab_size", 100)), 1)
    ids = torch.arange(3, 3 + _BATCH * _TEXT).remainder(vocabulary).view(_BATCH, _TEXT)
    special = [_special(config, name) for name in ("eos_token_id", "pad_token_id")]
    plain = next(token for token in range(3, vocabulary + 4) if token % vocabulary not in special)
    for placeholder in _placeholders(config):
        ids[ids == placeholder] = plain % vocabulary  # of an image or a sound that is not there
    end = special[0]
    if end is not None and 0 <= end < vocabulary:
        ids[ids == end] = plain % vocabulary
        ids[:, -1] = end
    return ids


def _special(config: Any, name: str) -> int | None:
    value = _find(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else None


def _placeholders(config: Any) -> list[int]:
    ends = ("_token_id", "_token_index")
    named = vars(config).items()
    return [value for name, value in named if name.endswith(ends) and isinstance(value, int)]


def _pixels(config: Any) -> Tensor:
    size = _find(config, "image_size", None) or _find(config, "input_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.zeros(_BATCH, _channels(config), int(height), int(width))


def _channels(config: Any) -> int:
    for name in ("num_channels", "in_channels", "in_chans"):
        value = _find(config, name, None)
        if isinstance(value, int):
            return value
    return 3


_GRIDS = ("grid_thw", "image_grid_thw", "grid_hws")


def _flat_patches(config: Any, parameters: Kwargs) -> Kwargs:
    """All images as one list of patches, and the grid that each of them has."""
    side = _find(config, "patch_size", 14)
    depth = _channels(config) * int(_find(config, "temporal_patch_size", 1))
    patches = torch.zeros(_BATCH * _GRID**2, depth * side * side)
    values = next((name for name in ("pixel_values", "hidden_states") if name in parameters), "pixel_values")
    grid = next(name for name in _GRIDS if name in parameters)
    size = [_GRID, _GRID] if grid == "grid_hws" else [1, _GRID, _GRID]
    made = {values: patches, grid: torch.tensor([size] * _BATCH)}
    return made | (
        {"merge_sizes": torch.ones(_BATCH, dtype=torch.long)} if "merge_sizes" in parameters else {}
    )


def _padded_patches(config: Any) -> Kwargs:
    """Each image as a list of patches, padded to one length, and the grid it had."""
    side = _find(config, "patch_size", 16)
    return {
        "pixel_values": torch.zeros(_BATCH, _GRID**2, _channels(config) * side * side),
        "pixel_attention_mask": torch.ones(_BATCH, _GRID**2, dtype=torch.long),
        "spatial_shapes": torch.tensor([[_GRID, _GRID]] * _BATCH),
    }


def _waves(_: Any) -> Tensor:
    return torch.zeros(_BATCH, 16_000)


def _features(config: Any) -> Tensor:
    bins = _find(config, "num_mel_bins", None) or _find(config, "feature_projection_input_dim", 80)
    frames = 2 * int(_find(config, "max_source_positions", 500))
    return torch.zeros(_BATCH, int(bins), frames)


def _series(config: Any) -> Tensor:
    lags = _find(config, "lags_sequence", None) or [0]
    length = int(_find(config, "context_length", 16)) + max(lags)
    channels = _find(config, "num_input_channels", None) or _find(config, "input_size", 1)
    return torch.ones(_BATCH, length) if channels == 1 and max(lags) else torch.ones(_BATCH, length, channels)


def _hidden(config: Any) -> Tensor:
    return torch.zeros(_BATCH, _TEXT, int(_find(config, "hidden_size", 64)))


def _find(config: Any, name: str, default: Any) -> Any:
    """A setting of the config or, where it is a composite, of the first of its parts that has it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            value = _find(part, name, None)
            if value is not None:
                return value
    return default


_BUILDERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "qformer_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": lambda config: _pixels(config)[:, None].repeat(1, _FRAMES, 1, 1, 1),
    "input_values": _waves,
    "input_features": _features,
    "bbox": lambda _: torch.ones(_BATCH, _TEXT, 4, dtype=torch.long),
    "attention_mask": lambda _: torch.ones(_BATCH, _TEXT, dtype=torch.long),
    "inputs_embeds": _hidden,
    "query_embeds": _hidden,
    "encoder_hidden_states": lambda config: torch.zeros(
        _BATCH, _TEXT, int(_find(config, "encoder_hidden_size", _find(config, "hidden_size", 64)))
    ),
    "past_values": _series,
    "past_observed_mask": lambda config: torch.ones_like(_series(config)),
    "past_time_features": lambda config: torch.zeros(
        *_series(config).shape[:2], int(_find(config, "num_time_features", 1))
    ),
    "future_values": lambda config: torch.ones(_BATCH, int(_find(config, "prediction_length", 4))),
    "future_time_features": lambda config: torch.zeros(
        _BATCH, int(_find(config, "prediction_length", 4)), int(_find(config, "num_time_features", 1))
    ),
    "visual_feats": lambda config: torch.zeros(_BATCH, 4, int(_find(config, "visual_feat_dim", 2048))),
    "visual_pos": lambda config: torch.zeros(_BATCH, 4, int(_find(config, "visual_pos_dim", 4))),
    "task_inputs": lambda config: torch.ones(
        _BATCH, int(_find(config, "task_seq_len", 77)), dtype=torch.long
    ),
    "states": lambda config: torch.zeros(_BATCH, _TEXT, int(_find(config, "state_dim", 17))),
    "actions": lambda config: torch.zeros(_BATCH, _TEXT, int(_find(config, "act_dim", 4))),
    "rewards": lambda _: torch.zeros(_BATCH, _TEXT, 1),
    "returns_to_go": lambda _: torch.zeros(_BATCH, _TEXT, 1),
    "timesteps": lambda _: torch.arange(_TEXT).repeat(_BATCH, 1),
    "prompt_pixel_values": _pixels,
    "prompt_masks": _pixels,
}
_RARE = ("inputs_embeds", "encoder_hidden_states", "decoder_input_ids", "pixel_values_videos")
"""Arguments that stand in the place of others, so that giving them too is an error in most models."""

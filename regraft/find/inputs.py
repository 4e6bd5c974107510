"""Inputs for the probe: the user's own, or made from what a model says of itself.

Hugging Face models carry a `config`, timm's a `pretrained_cfg`; both are read as plain attributes, so
neither library is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError

_TEXT = 8
_BATCH = 2


@dataclass(frozen=True)
class Inputs:
    """Arguments for one forward."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def given_inputs(model: nn.Module, inputs: Any) -> Inputs:
    """A tensor, a tuple of arguments or a dict of keyword arguments, as arguments.

    Raises:
        InputsError: they do not fit the forward's signature.
    """
    if isinstance(inputs, Mapping):
        made = Inputs((), dict(inputs))
    elif isinstance(inputs, (tuple, list)):
        made = Inputs(tuple(inputs))
    elif isinstance(inputs, Tensor):
        made = Inputs((inputs,))
    else:
        raise InputsError(
            f"inputs is a {type(inputs).__name__}",
            where=_written(model),
            remedy="a tensor, a tuple of arguments or a dict of keyword arguments",
        )
    try:
        inspect.signature(model.forward).bind(*made.args, **made.kwargs)
    except TypeError as error:
        raise InputsError(
            f"the inputs do not fit: {error}", where=_written(model), remedy="tried " + describe(made)
        ) from None
    return made


def describe(inputs: Inputs) -> str:
    """The inputs in one line: names, shapes and dtypes."""
    named = [("", value) for value in inputs.args] + [(f"{key}=", v) for key, v in inputs.kwargs.items()]
    return "(" + ", ".join(name + _shown(value) for name, value in named) + ")"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _written(model: nn.Module) -> str:
    return f"{type(model).__name__}.forward{inspect.signature(model.forward)}"


def made_inputs(model: nn.Module) -> Inputs | None:
    """Inputs for a Hugging Face or a timm model; None for a model that does not say what it takes."""
    if getattr(model, "config", None) is not None and isinstance(
        getattr(model, "main_input_name", None), str
    ):
        return _from_config(model)
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = _setting(settings, "input_size")
    if size:
        return Inputs((torch.zeros(_BATCH, *_timm_size(model, size)),))
    return None


def _timm_size(model: nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    # The configuration is the pretrained one's; the model may have been built for other images.
    embed = getattr(model, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    first = next((p for p in model.parameters() if p.dim() == 4 and p.shape[1] <= 16), None)
    channels = size[0] if first is None else first.shape[1]
    return (channels, *(own if own else size[1:]))


def _setting(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _from_config(model: nn.Module) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    names = [main] if main in parameters else []
    names += [n for n, one in parameters.items() if n not in names and _is_required(one) and n in _BUILDERS]
    kwargs = {name: _BUILDERS[name](model.config) for name in names if name in _BUILDERS}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = _ids(model.config)
    if "input_ids" in kwargs and "attention_mask" in parameters:
        kwargs["attention_mask"] = torch.ones(_BATCH, _TEXT, dtype=torch.long)
    return Inputs((), kwargs)


def _is_required(parameter: inspect.Parameter) -> bool:
    variable = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in variable


def _ids(config: Any) -> Tensor:
    # Models for classification look for the end token (BART) or count padding, so neither is absent.
    vocabulary = int(_find(config, "vocab_size", 100))
    ids = torch.arange(3, 3 + _BATCH * _TEXT).remainder(max(vocabulary, 1)).view(_BATCH, _TEXT)
    end = _find(config, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids = torch.where(ids == end, (end + 1) % vocabulary, ids)
        ids[:, -1] = end
    return ids


def _pixels(config: Any) -> Tensor:
    size = _find(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return torch.zeros(_BATCH, int(_find(config, "num_channels", 3)), int(height), int(width))


def _waves(_: Any) -> Tensor:
    return torch.zeros(_BATCH, 16_000)


def _features(config: Any) -> Tensor:
    bins = int(_find(config, "num_mel_bins", 80))
    frames = 2 * int(_find(config, "max_source_positions", 500))
    return torch.zeros(_BATCH, bins, frames)


def _find(config: Any, name: str, default: Any) -> Any:
    """A setting of the config or, where it is a composite, of one of its parts."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for part in ("text_config", "vision_config", "encoder", "decoder", "backbone_config"):
        value = getattr(getattr(config, part, None), name, None)
        if value is not None:
            return value
    return default


_BUILDERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
}

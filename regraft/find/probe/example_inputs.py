"""Inputs for the probe: the user's own, or made from what a model says of itself.

Hugging Face models carry a `config`, timm's a `pretrained_cfg`; both are read as plain attributes, so
neither library is imported.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputsError, nearest
from regraft.find.probe.example_inputs_hf import from_config, says_what_it_takes

_BATCH = 2
_IMAGE_SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)


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
        raise _misfit(model, made, str(error)) from None
    _check_names(model, made)
    return made


def _check_names(model: nn.Module, inputs: Inputs) -> None:
    """Raise for a misspelt name that the forward would take as one of any number of others."""
    parameters = inspect.signature(model.forward).parameters
    for name in inputs.kwargs:
        near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.85)
        if name not in parameters and near and near[0] not in inputs.kwargs:
            raise _misfit(model, inputs, f"got an unexpected keyword argument {name!r}")


def _misfit(model: nn.Module, inputs: Inputs, why: str) -> InputsError:
    parameters = list(inspect.signature(model.forward).parameters)
    unknown = [name for name in inputs.kwargs if name not in parameters]
    close = [hint for name in unknown if (hint := nearest(name, parameters, most=1))]
    return InputsError(
        f"the inputs do not fit: {why}",
        where=_written(model),
        remedy="; ".join([*close, "tried " + describe(inputs)]),
    )


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


def made_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Inputs for a Hugging Face or a timm model, the likeliest first; none for a model that is neither.

    No configuration says all of what a forward takes, so there are several to be tried.
    """
    if says_what_it_takes(model):
        for kwargs in from_config(model):
            yield Inputs((), kwargs)
        return
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size: Any = (
        settings.get("input_size") if isinstance(settings, Mapping) else getattr(settings, "input_size", None)
    )
    if not size:
        yield from _of_torchvision(model)
    else:
        for shape in _image_shapes(model, tuple(size)):
            yield Inputs((torch.zeros(_BATCH, *shape),))


def _of_torchvision(model: nn.Module) -> Iterator[Inputs]:
    """Images, pairs of images or videos for a model of torchvision; detectors need targets too."""
    home = type(model).__module__
    if not home.startswith("torchvision.models.") or ".detection" in home:
        return
    if ".optical_flow" in home:
        yield Inputs((torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128)))
        return
    frames = (16,) if ".video" in home else ()
    own = getattr(model, "image_size", None)
    for side in [own] if isinstance(own, int) else [112, 224] if frames else [224, 299]:
        yield Inputs((torch.zeros(_BATCH, 3, *frames, side, side),))


def _image_shapes(model: nn.Module, size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The pretrained model's image size may not be this one's, which was built for another, or others."""
    convolution = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    channels = [size[0]] if convolution is None else [convolution.in_channels, size[0]]
    own = [getattr(module, "img_size", None) for module in model.modules()]
    sizes = [one for one in own if isinstance(one, tuple) and len(one) == 2]
    sides = [*sizes[:1], size[1:], *sizes[1:], *((side, side) for side in _IMAGE_SIZES)]
    for depth in dict.fromkeys(channels):
        for height, width in dict.fromkeys(sides):
            yield depth, height, width

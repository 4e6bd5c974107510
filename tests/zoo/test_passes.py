"""On real architectures a shared pass is a pass of the model: with the same noise it gives the same numbers.

The noise is put in by a hook behind the first layer, and the model is in eval, or grafted with "off", so that
it draws nothing by itself. What the passes drew is drawn once more from the same seed, and given to plain
forwards.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import NoMatchError

from .check import quiet
from .entries import entry
from .entry import forward, tensors

LAYERS = (nn.Embedding, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHOSEN = "hf:bert hf:llama hf:wav2vec2 hf:mixtral timm:test_vit timm:test_efficientnet torchvision:vit_b_32"
APART = """hf:autoformer hf:dac hf:grounding-dino hf:inkling2 hf:jetmoe hf:longcat_flash hf:mm-grounding-dino
    hf:oneformer hf:openai_privacy_filter hf:qwen3_5_moe hf:switch_transformers"""
"""Where a module runs once for each pass."""
MORE = """hf:bart hf:t5 hf:deberta-v2 hf:swin hf:whisper hf:mamba hf:rwkv hf:detr hf:xlnet hf:clip hf:lfm3_vl
    timm:test_convnext timm:test_byobnet torchvision:densenet121 torchvision:maxvit peft:lora-bert"""
MODELS = [
    *CHOSEN.split(),
    *(pytest.param(name, marks=pytest.mark.slow) for name in (*APART.split(), *MORE.split())),
]

STEADY = [name for name in APART.split() if name not in ("hf:dac", "hf:switch_transformers")]
"""Those that draw by dropout alone: one drops quantizers, the other jitters."""
IN_TRAINING = [
    "hf:bert",
    *(pytest.param(name, marks=pytest.mark.slow) for name in [*STEADY, "hf:lfm3_vl", "hf:mamba"]),
]


class Noise:
    """Behind the first layer that runs: `1 + noise / 5` times its output."""

    def __init__(self, model: nn.Module) -> None:
        self.given: torch.Tensor | None = None
        self.shape: torch.Size | None = None
        self.done = False
        model.register_forward_pre_hook(self._begin)
        for layer in model.modules():
            if isinstance(layer, LAYERS):
                layer.register_forward_hook(self._behind)

    def _begin(self, *_: object) -> None:
        self.done = False

    def _behind(self, _: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        if self.done or not isinstance(output, torch.Tensor):
            return output
        self.done, self.shape = True, output.shape
        noise = torch.rand(output.shape, dtype=output.dtype) if self.given is None else self.given
        return output * (1 + noise / 5)


def doubled(inputs):
    def of(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    if isinstance(inputs, dict):
        return {name: of(value) for name, value in inputs.items()}
    return tuple(map(of, inputs))


def settled(name, training=False):
    """The model without draws of its own; a head that begins at 0 would hide what comes before it."""
    model, inputs = entry(name).build()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.1)
    for family in ("Dropout", "DropPath") if training else ():
        with contextlib.suppress(NoMatchError):
            regraft.apply(model, {family: "off"}, inputs=inputs)
    return model.train(training), inputs


def in_double(name, training):
    """The model in float64, unless it makes tensors of its own in float32."""
    model, inputs = settled(name, training)
    try:
        with torch.no_grad():
            forward(model.double(), doubled(inputs))
    except RuntimeError:
        return settled(name, training)
    return model, doubled(inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_pass_is_a_pass_of_the_model(name):
    compare(*in_double(name, training=False))


@pytest.mark.parametrize("name", IN_TRAINING)
def test_it_is_in_training_too(name):
    compare(*in_double(name, training=True))


def compare(model, inputs):
    quiet()
    noise = Noise(model)

    def passes(n, strategy):
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        torch.manual_seed(7)
        with torch.no_grad():
            return tensors(regraft.stochastic_passes(model, n, *args, strategy=strategy, **kwargs))

    shared = passes(2, "shared")
    torch.manual_seed(7)
    dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
    for number, given in enumerate(torch.rand((2, *noise.shape), dtype=dtype)):
        noise.given = given
        for one, expected in zip(shared, passes(1, "loop"), strict=True):
            close = 1e-10 if dtype == torch.float64 else 1e-4
            size = expected.abs().max().item() if expected.is_floating_point() and expected.numel() else 0.0
            torch.testing.assert_close(one[number], expected[0], rtol=0, atol=close * size)
    assert any(not torch.equal(one[0], one[1]) for one in shared)

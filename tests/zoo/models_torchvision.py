"""torchvision architectures, built without weights, with dropout and stochastic depth at 0.1."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from .entry import RATE, Entry, Inputs

CLASSIFIERS: dict[str, int] = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_b1": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "inception_v3": 299,
    "mnasnet0_5": 32,
    "mnasnet1_0": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_large": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "vit_b_16": 32,
    "vit_b_32": 64,
    "wide_resnet50_2": 32,
}
SEGMENTERS = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
VIDEO: dict[str, tuple[int, int]] = {
    "mc3_18": (4, 32),
    "r2plus1d_18": (4, 32),
    "r3d_18": (4, 32),
    "s3d": (16, 224),
    "swin3d_t": (4, 64),
}
DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)
RATES = ("dropout", "attention_dropout", "stochastic_depth_prob", "drop_rate")


def entries() -> Iterator[Entry]:
    """Classifiers, segmentation, video and detection."""
    for name, size in CLASSIFIERS.items():
        yield Entry("torchvision", name, functools.partial(_classifier, name, size))
    for name in SEGMENTERS:
        yield Entry("torchvision", name, functools.partial(_segmenter, name))
    for name, (frames, size) in VIDEO.items():
        yield Entry("torchvision", name, functools.partial(_video, name, frames, size))
    yield Entry("torchvision", "maxvit", _maxvit)
    yield Entry("torchvision", "mvit", _mvit)
    for name in DETECTORS:
        yield Entry("torchvision", name, functools.partial(_detector, name))


def _rates(build: object) -> dict[str, float]:
    """Which rates the class takes: the builders hand on what they do not know."""
    import torchvision

    taken = set(inspect.signature(build).parameters)
    source = inspect.getmodule(build)
    named = inspect.get_annotations(build).get("return")
    cls = named if isinstance(named, type) else getattr(source, str(named), None)
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
        taken |= set(inspect.signature(cls).parameters)
    assert torchvision
    return {rate: RATE for rate in RATES if rate in taken}


def _set(model: nn.Module) -> nn.Module:
    """What no argument reaches: the rates written into a constructor."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = RATE
    return model


def _classifier(name: str, size: int) -> tuple[nn.Module, Inputs]:
    from torchvision import models

    build = models.get_model_builder(name)
    options: dict[str, object] = dict(_rates(build))
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False}
    if name.startswith("vit_"):
        options |= {"image_size": size}
    for _ in range(len(options) + 1):
        try:
            model = build(weights=None, num_classes=10, **options)
            break
        except TypeError as error:  # a builder that gives the same rate itself
            taken = next((key for key in options if f"'{key}'" in str(error)), None)
            if taken is None:
                raise
            options.pop(taken)
    return _set(model), (torch.randn(2, 3, size, size),)


def _segmenter(name: str) -> tuple[nn.Module, Inputs]:
    from torchvision import models

    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    return _set(model), (torch.randn(2, 3, 32, 32),)


def _video(name: str, frames: int, size: int) -> tuple[nn.Module, Inputs]:
    from torchvision import models

    build = models.get_model_builder(name)
    options = {"dropout": RATE} if name == "s3d" else {}
    return _set(build(weights=None, num_classes=5, **options)), (torch.randn(1, 3, frames, size, size),)


def _maxvit() -> tuple[nn.Module, Inputs]:
    from torchvision.models.maxvit import MaxVit

    rates = {"stochastic_depth_prob": RATE, "attention_dropout": RATE, "mlp_dropout": RATE}
    model = MaxVit(
        (64, 64),
        16,
        4,
        [16, 32],
        [1, 1],
        8,
        num_classes=10,
        squeeze_ratio=0.25,
        expansion_ratio=4,
        mlp_ratio=4,
        **rates,
    )
    return _set(model), (torch.randn(2, 3, 64, 64),)


def _mvit() -> tuple[nn.Module, Inputs]:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    ones = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_q": [1, 1, 1], "stride_kv": [1, 2, 2]}
    blocks = [MSBlockConfig(num_heads=2, input_channels=16, output_channels=16, **ones) for _ in range(3)]
    rates = {"dropout": RATE, "attention_dropout": RATE, "stochastic_depth_prob": RATE}
    model = MViT((32, 32), 4, blocks, True, True, True, True, num_classes=5, **rates)
    return _set(model), (torch.randn(2, 3, 4, 32, 32),)


def _detector(name: str) -> tuple[nn.Module, Inputs]:
    from torchvision import models

    sizes = {} if "320" in name and "ssd" in name else {"min_size": 64, "max_size": 64}
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **sizes)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    return _set(model), ([torch.rand(3, 64, 64)] * 2, [target] * 2)

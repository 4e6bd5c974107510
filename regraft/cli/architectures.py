"""Architectures by name: built on the meta device, or for real, without a weight downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.output import reason
from regraft.errors import FileError, ModelError, NoMatchError, OptionError, nearest

if TYPE_CHECKING:
    from torch import nn


def need(package: str) -> Any:
    """The package, or an error that says how to install it."""
    if importlib.util.find_spec(package) is None:
        extra = package if package in ("timm", "transformers") else ""
        remedy = f'pip install "regraft[{extra}]"' if extra else f"pip install {package}"
        raise FileError(f"{package} is not installed", remedy=remedy)
    return importlib.import_module(package)


def is_architecture(name: str) -> bool:
    """Is this a name with a source, or a folder with a config?"""
    if name.partition(":")[0] in SOURCES:
        return True
    try:
        return (Path(name) / "config.json").is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def build(name: str, *, real: bool = False) -> nn.Module:
    """The architecture of a name: on the meta device, or `real`, with fresh weights on the CPU."""
    source, colon, rest = name.partition(":")
    if colon and source in SOURCES:
        return SOURCES[source](rest, real)
    if Path(name).is_dir():
        return _hugging_face(name, real)
    if colon:
        return _from_factory(source, rest)
    raise FileError(
        "not an architecture",
        where=name,
        remedy="timm:NAME, torchvision:NAME, hf:NAME, a folder with a config.json, or package.module:factory",
    )


def inputs_for(name: str, shape: str) -> Any:
    """The input of this shape; without one, that of torchvision, for which `inspect` makes none."""
    if shape:
        sizes = shape.replace(",", "x").split("x")
        if not all(size.strip().isdigit() for size in sizes):
            raise OptionError(f"{shape!r} is no shape", remedy="for example --shape 2x3x224x224")
        return need("torch").zeros([int(size) for size in sizes])
    source, _, rest = name.partition(":")
    if source != "torchvision":
        return None
    torch, models = need("torch"), need("torchvision").models
    kind = models.get_model_builder(rest).__module__
    if ".video" in kind:
        return torch.zeros(2, 3, 16, 224, 224)
    if ".optical_flow" in kind:
        return torch.zeros(2, 3, 128, 128), torch.zeros(2, 3, 128, 128)
    size = 299 if "inception" in kind else 224
    return torch.zeros(2, 3, size, size)


def _build(make: Callable[[], nn.Module], real: bool) -> nn.Module:
    torch = need("torch")
    if real:
        return make()
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):  # it reads numbers of its own tensors, as RegNets do
        return make().to("meta")


def _timm(name: str, real: bool) -> nn.Module:
    timm = need("timm")
    if name.partition(".")[0] not in timm.list_models():
        raise NoMatchError(f"timm has no model {name!r}", remedy=nearest(name, timm.list_models()))
    return _build(lambda: timm.create_model(name, pretrained=False), real)


def _torchvision(name: str, real: bool) -> nn.Module:
    models = need("torchvision").models
    if name not in models.list_models():
        raise NoMatchError(f"torchvision has no model {name!r}", remedy=nearest(name, models.list_models()))
    # By default a detector downloads the weights of its backbone.
    takes = inspect.signature(models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
    return _build(lambda: models.get_model(name, weights=None, **backbone), real)


def config_of(folder: str | Path) -> tuple[Any, Any]:
    """The config of a Hugging Face folder, and the class that it names, else AutoModel."""
    transformers = need("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = [name for name in config.architectures or [] if hasattr(transformers, str(name))]
    return config, getattr(transformers, names[0] if names else "AutoModel")


def _hugging_face(folder: str, real: bool) -> nn.Module:
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise FileError(
            "the folder has no config.json", where=folder, remedy="give a Hugging Face model folder"
        )
    try:
        config, cls = config_of(folder)
        if hasattr(cls, "from_config"):
            return _build(lambda: cls.from_config(config, trust_remote_code=False), real)
        return _build(lambda: cls(config), real)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"the config cannot be read: {reason(error)}", where=folder) from None


def _from_factory(module: str, factory: str) -> nn.Module:
    from torch import nn

    where = f"{module}:{factory}"
    if "" not in sys.path:
        sys.path.insert(0, "")  # a package beside where the command is given, as `python -m` finds it
    try:
        value: Any = importlib.import_module(module)
        for part in factory.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise FileError(f"the factory cannot be found: {error}", where=where) from None
    if callable(value) and not isinstance(value, nn.Module):
        try:
            value = value()
        except Exception as error:
            raise ModelError(f"the factory raised {type(error).__name__}: {error}", where=where) from error
    if not isinstance(value, nn.Module):
        raise ModelError(f"the factory returned a {type(value).__name__}, no module", where=where)
    return value


SOURCES = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}

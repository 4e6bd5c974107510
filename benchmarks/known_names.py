"""Writes regraft/files/known_names.txt: the names of which loading a file is known to be harmless.

    python benchmarks/known_names.py

It imports torch, timm, transformers, torchvision, PEFT, accelerate and NumPy, and lists, per module: classes
whose objects are made without a call of their own; classes and functions that may be called with what a file
gives them; functions and members of Enums that may be referred to. What stands below was read before.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn

from regraft.files.verdicts import shortened

OUTPUT = Path(__file__).parents[1] / "regraft" / "files" / "known_names.txt"
PACKAGES = str.split(
    "torch.nn torch.optim torch.ao.nn torch.ao.quantization.stubs timm.layers timm.models timm.optim "
    "timm.loss torchvision.models torchvision.ops torchvision.transforms peft transformers accelerate.state "
    "accelerate.utils.dataclasses"
)
TRANSFORMERS = ("models", "generation", "integrations")
"""Subpackages of transformers of which models are made."""
VALUES = {
    "builtins": "set frozenset list dict tuple int float complex bool str bytes bytearray slice range type "
    "getattr",
    "collections": "OrderedDict defaultdict Counter deque",
    "copyreg": "_reconstructor __newobj__ __newobj_ex__",
    "_codecs": "encode",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "partial",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "types": "SimpleNamespace",
    "torch": "Size device",
    "torch._tensor": "_rebuild_from_type _rebuild_from_type_v2",
    "torch.nn.parameter": "Parameter Buffer UninitializedParameter UninitializedBuffer",
    "torch.serialization": "_get_layout",
    "torch.storage": "_load_from_bytes",
    "numpy": "dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    "numpy.random.bit_generator": "SeedlessSeedSequence",
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "regraft.graft.classes": "_make _make_by",
    "regraft.graft.weights": "_ForwardLock",
    "regraft.record": "read_layer read_slot",
}
ELEMENTWISE = str.split(
    "relu relu_ tanh sigmoid selu celu rrelu prelu softmax log_softmax erf sin cos exp square abs log "
    "sqrt rsqrt clamp dropout alpha_dropout feature_dropout conv1d conv2d conv3d matmul bmm mm add mul "
    "sub div mean sum cat stack threshold hardshrink layer_norm rms_norm batch_norm group_norm"
)
OBJECTS = {"argparse": "Namespace", "joblib.numpy_pickle": "NumpyArrayWrapper"}
REFERENCES = {
    "builtins": "object NotImplemented Ellipsis",
    "torch": "Tensor",
    "torch._tensor": "Tensor",
    "torch.storage": "TypedStorage UntypedStorage",
    "torch._C": "_VariableFunctionsClass "
    + " ".join(f"_VariableFunctionsClass.{name}" for name in ELEMENTWISE),
    "torch._C._nn": "gelu silu silu_ mish hardswish hardsigmoid hardtanh elu softplus softshrink leaky_relu "
    "relu6 log_sigmoid glu linear scaled_dot_product_attention",
    "numpy": "ndarray float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool bool_ "
    "str_ complex64 complex128",
}
SET_STATE = {
    "torch.nn.modules.module.Module",
    "torch.nn.modules.activation.MultiheadAttention",
    "torch.nn.modules.activation.Softmax",
    "torch.nn.modules.rnn.RNNBase",
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torch.nn.modules.transformer.TransformerDecoderLayer",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.upsampling.Upsample",
    "torch.nn.modules.activation.Softmin",
    "torch.nn.modules.activation.LogSoftmax",
    "torch.nn.modules.pooling.AvgPool3d",
}
"""Their `__setstate__` was read: it takes the dictionary, and fills in what older versions did not have."""
PLAIN = ("timm.models", "timm.layers", "torchvision.models", "torchvision.ops", "transformers.models")
"""Where classes that are no modules may be parts of models (the anchors of a detector)."""
FUNCTIONS = tuple(
    str.split(
        "torch.nn.functional timm.layers torchvision.ops transformers.modeling_rope_utils "
        "transformers.activations transformers.optimization"
    )
)
LOADS = tuple(str.split("load from_ download import exec eval save open get_pretrained register export"))
"""How the names of functions begin that may not even be referred to."""


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        names.append(package)
        paths = getattr(importlib.import_module(package), "__path__", [])
        for info in pkgutil.walk_packages(paths, f"{package}.", onerror=lambda _: None):
            parts = info.name.split(".")
            if package == "transformers" and len(parts) > 2:
                kept = parts[1] in TRANSFORMERS
                if parts[1] == "models":
                    kept = len(parts) > 3 and not parts[-1].startswith(
                        ("image_", "video_", "feature_", "modular_")
                    )
                if not kept:
                    continue
            if not any(
                part.startswith(("convert", "tokenization", "processing", "testing")) for part in parts
            ):
                names.append(info.name)
    return names


def state_setter(cls: type) -> str:
    owner = next((base for base in cls.__mro__ if "__setstate__" in vars(base)), None)
    return f"{owner.__module__}.{owner.__qualname__}" if owner else ""


def is_harmless_object(cls: type, kinds: tuple[type, ...]) -> bool:
    """Is an object of this class made by `object.__new__`, and given its state as a dictionary?"""
    plain = cls.__module__.startswith(PLAIN) and not hasattr(cls, "__getattr__")
    data = dataclasses.is_dataclass(cls) and cls.__module__.partition(".")[0] != "torch"
    wanted = issubclass(cls, kinds) or data or plain
    setter = state_setter(cls)
    return (
        wanted
        and cls.__new__ is object.__new__
        and type(cls) in (type, abc.ABCMeta)
        and not hasattr(cls, "__del__")
        and not issubclass(cls, (dict, list, tuple, torch.jit.ScriptModule))
        and not cls.__module__.startswith("torch.fx")
        and (not setter or setter in SET_STATE or (issubclass(cls, torch.optim.Optimizer)))
    )


def written(columns: tuple[set[str], ...]) -> str:
    """The three columns; what the names of most objects begin with stands once, in front."""
    texts = [" ".join(sorted(names)) for names in columns]
    starts = Counter(name[:end] for name in columns[0] for end in range(3, len(name) + 1))
    prefix, count = max(starts.items(), key=lambda item: (item[1] - 1) * (len(item[0]) - 1), default=("", 0))
    if count > 2:
        names = (f"~{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in columns[0])
        texts[0] = f"{prefix}={' '.join(sorted(names))}"
    return ";".join(texts).rstrip(";")


def main() -> None:
    warnings.simplefilter("ignore")
    roles: dict[str, tuple[set[str], set[str], set[str]]] = defaultdict(lambda: (set(), set(), set()))
    for column, fixed in enumerate((OBJECTS, VALUES, REFERENCES)):
        for module, names in fixed.items():
            roles[module][column].update(names.split())
    for name in dir(torch._utils):
        if name.startswith("_rebuild_"):
            roles["torch._utils"][1].add(name)
    for name, value in vars(torch).items():
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)):
            roles["torch"][2].add(name)
    from transformers import PretrainedConfig

    kinds = (nn.Module, PretrainedConfig, torch.optim.Optimizer)
    kinds += (importlib.import_module("transformers.generation.configuration_utils").GenerationConfig,)
    kinds += (importlib.import_module("accelerate.state").PartialState,)
    refused: dict[str, list[str]] = defaultdict(list)
    failed = []
    for name in modules():
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            failed.append(f"{name}: {type(error).__name__}")
            continue
        objects, values, references = roles[name]
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != name or getattr(value, "__qualname__", "") != key:
                continue
            if inspect.isclass(value):
                if issubclass(value, enum.Enum):
                    values.add(key)
                    references.update(f"{key}.{member}" for member in value.__members__)
                elif is_harmless_object(value, kinds):
                    objects.add(key)
                    for attribute, inner in vars(value).items():
                        if isinstance(inner, staticmethod) and not attribute.lstrip("_").startswith(LOADS):
                            references.add(f"{key}.{attribute}")
                elif issubclass(value, kinds):
                    refused[state_setter(value) or type(value).__name__].append(f"{name}.{key}")
            elif (
                inspect.isfunction(value)
                and not key.lstrip("_").startswith(LOADS)
                and name.startswith(FUNCTIONS)
            ):
                references.add(key)
    lines = [
        f"{shortened(module)}:" + written(columns)
        for module, columns in sorted(roles.items())
        if any(columns)
    ]
    versions = " ".join(
        f"{name} {sys.modules[name].__version__}"
        for name in ("torch", "timm", "transformers", "torchvision", "peft", "accelerate")
    )
    head = f"# Written by benchmarks/known_names.py from {versions}: module:objects;values;references"
    OUTPUT.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    count = sum(len(names) for columns in roles.values() for names in columns)
    print(f"{OUTPUT}: {len(lines)} modules, {count} names")
    for why, names in refused.items():
        print(f"not listed ({why}): {' '.join(names)}")
    print(f"not imported: {failed}")


if __name__ == "__main__":
    main()

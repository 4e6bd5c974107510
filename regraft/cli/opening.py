"""Opening models: an architecture by name, on the meta device, or a file. Nothing in a file is ever run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import FileError, ModelError, NoMatchError, nearest

if TYPE_CHECKING:
    from torch import nn

_FILES = (".pt", ".pth", ".bin")
_HARMLESS = (
    "torch",
    "collections",
    "transformers",
    "timm",
    "torchvision",
    "numpy",
    "builtins set",
    "__builtin__ set",
)
_MOST_PICKLE = 64 * 2**20


def open_model(name: str, arch: str = "") -> nn.Module:
    """The model that a name or a file stands for, without weights where that is possible.

    Raises:
        FileError: a file that is missing, unreadable, or would have to be run to be read.
        NoMatchError: no such architecture.
    """
    source, colon, rest = name.partition(":")
    if colon and source in _SOURCES:
        return _SOURCES[source](rest)
    path = Path(name)
    if path.is_dir():
        return _open_hf(name)
    if path.suffix in _FILES:
        return _open_file(path, arch)
    if colon and not path.exists():
        return _open_factory(source, rest)
    raise FileError(
        "this is no model that can be opened" if path.exists() else "there is no such file or folder",
        where=name,
        remedy="timm:NAME, torchvision:NAME, hf:FOLDER, a folder with a config.json, package.module:factory, "
        "or a .pt, .pth or .bin file",
    )


def _need(package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise FileError(f"{package} is not installed", remedy=f'pip install "regraft[{package}]"')
    return importlib.import_module(package)


def _open_timm(name: str) -> nn.Module:
    timm, torch = _need("timm"), _need("torch")
    if name.partition(".")[0] not in timm.list_models():
        raise NoMatchError(f"timm has no model {name!r}", remedy=nearest(name, timm.list_models()))
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _open_torchvision(name: str) -> nn.Module:
    models, torch = _need("torchvision").models, _need("torch")
    if name not in models.list_models():
        raise NoMatchError(f"torchvision has no model {name!r}", remedy=nearest(name, models.list_models()))
    backbone = {"weights_backbone": None} if "rcnn" in name or name.startswith(("fcn", "deeplab")) else {}
    with torch.device("meta"):
        model: nn.Module = models.get_model(name, weights=None, **backbone)
    return model


def _open_hf(folder: str) -> nn.Module:
    transformers, torch = _need("transformers"), _need("torch")
    file = Path(folder) / "config.json"
    if Path(folder).is_dir() and not file.is_file():
        raise FileError(
            "the folder has no config.json", where=folder, remedy="give a Hugging Face model folder"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise FileError(f"the config cannot be read: {str(error).splitlines()[0]}", where=folder) from None
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    with torch.device("meta"):
        if names:
            model: nn.Module = getattr(transformers, names[0])(config)
        else:
            model = transformers.AutoModel.from_config(config)
    return model


def _open_factory(module: str, factory: str) -> nn.Module:
    from torch import nn

    try:
        made: Any = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise FileError(f"the factory cannot be found: {error}", where=f"{module}:{factory}") from None
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"the factory returned a {type(made).__name__}, no module", where=f"{module}:{factory}"
        )
    return made


def _open_file(path: Path, arch: str) -> nn.Module:
    if not path.is_file():
        raise FileError("there is no such file", where=str(path))
    _refuse_code(path)
    torch = _need("torch")
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        why = str(error).strip().split("\n")[0][:160]
        raise FileError(f"the file cannot be read as weights: {why}", where=str(path)) from None
    if arch:
        return open_model(arch)
    from regraft.cli.weights import layers_of_weights

    return layers_of_weights(loaded, str(path))


def _refuse_code(path: Path) -> None:
    """Refuse a file that names code beyond what weights need; it is read as a list of names, never run."""
    try:
        names = _names_in(_pickle_of(path))
    except OSError as error:
        raise FileError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None
    except Exception as error:
        why = str(error).split("\n")[0][:120]
        raise FileError(f"the file is damaged, or no PyTorch file: {why}", where=str(path)) from None
    strange = sorted(name for name in names if not name.startswith(_HARMLESS))
    if any(name.split(" ")[0].split(".")[0] in _DANGEROUS for name in strange):
        suspicious = FileError(
            f"suspicious content: the file names {', '.join(repr(name) for name in strange[:5])}",
            where=str(path),
            remedy="nothing was run; do not load this file with torch.load(weights_only=False)",
        )
        suspicious.suspicious = True
        raise suspicious
    if any(" " in name and name.split(" ")[0].startswith("torch.nn.modules") for name in names) or strange:
        raise FileError(
            "the file is a pickled module, which loading would run as code; it was not run",
            where=str(path),
            remedy="save a state dict, torch.save(model.state_dict(), …), and give --arch; or inspect the "
            "model in Python: regraft.inspect(model)",
        )


_DANGEROUS = frozenset(
    [
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "shutil",
        "socket",
        "runpy",
        "pty",
        "importlib",
        "ctypes",
        "webbrowser",
        "builtins",
        "__builtin__",
        "commands",
        "pickle",
        "code",
        "codeop",
        "pdb",
        "timeit",
    ]
)


def _pickle_of(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(_MOST_PICKLE)
    with zipfile.ZipFile(path) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(entry) as file:
            return file.read(_MOST_PICKLE)


def _names_in(stream: bytes) -> set[str]:
    """`module name` of everything that unpickling would import."""
    names: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif opcode.name == "STACK_GLOBAL":
            names.add(" ".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return names


_SOURCES = {"timm": _open_timm, "torchvision": _open_torchvision, "hf": _open_hf}

"""Loading a model with its weights; the grafts that were saved beside it are put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import build, is_architecture, need
from regraft.cli.file_view import PLAN, Files, plan_beside
from regraft.cli.progress import working
from regraft.errors import FileError, LossError, MisfitError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from regraft.files.skeleton import FileModel


@dataclass
class Loaded:
    """A model with its weights, and the form that it came in.

    Attributes:
        form: "module", "weights", "safetensors", "folder" or "fresh" (an architecture by name).
        container: of weights in a checkpoint, the checkpoint.
        key: where in it they stand.
        folder: of a Hugging Face folder, where it is.
    """

    model: nn.Module
    form: str
    container: Any = None
    key: str = ""
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


def load(name: str, arch: str = "", *, trust: bool = False, allow: Sequence[str] = ()) -> Loaded:
    """The model that a name stands for, with its weights; grafts that were saved beside it are put back.

    Raises:
        FileError: it cannot be loaded: without `trust` nothing is, but plain weights.
    """
    path = Path(name)
    if not path.exists():
        with working(f"building {name}"):
            note = f"{name} was built with fresh weights: none are downloaded"
            return Loaded(build(name, real=True), "fresh", notes=[note])
    with working(f"reading {path.name}"):
        files = Files(path, allow)
    folder = is_architecture(name)
    files.check(model=not folder)
    if folder:
        return _folder(path)
    read = files.model
    if read.form == "module":
        if not trust:
            raise FileError(
                "the file is a whole module, and loading that runs the code that it names",
                where=name,
                remedy="--trust, if you know who made it; or save a state dict and give --arch",
            )
        return Loaded(load_module(read), "module", notes=_only_inside(read))
    if not arch:
        raise FileError(
            "the file holds weights alone, no layers",
            where=name,
            remedy="--arch timm:NAME, --arch hf:FOLDER, …",
        )
    return _weights(read, arch)


def load_module(read: FileModel) -> nn.Module:
    """The module of a trusted file, for which its code is run.

    Raises:
        FileError: it cannot be loaded, for one because its classes are not installed.
    """
    import torch

    with working(f"loading {read.path.name}"):
        try:
            value = torch.load(read.path, map_location="cpu", weights_only=False)
        except Exception as error:
            why = next(iter(str(error).strip().splitlines()), "")
            raise FileError(
                f"the file cannot be loaded: {type(error).__name__}: {why[:200]}", where=str(read.path)
            ) from error
    for part in read.key.split(".") if read.key else ():
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value  # type: ignore[no-any-return]


def _only_inside(read: FileModel) -> list[str]:
    return [f"the checkpoint's {read.key!r} alone is written, not the rest of it"] if read.key else []


def _folder(path: Path) -> Loaded:
    transformers = need("transformers")
    transformers.utils.logging.disable_progress_bar()
    with working(f"loading {path.name}"):
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            names = [name for name in config.architectures or [] if hasattr(transformers, str(name))]
            cls = getattr(transformers, names[0]) if names else transformers.AutoModel
            model = cls.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            why = next(iter(str(error).strip().splitlines()), "")
            raise FileError(f"the folder cannot be loaded: {why[:200]}", where=str(path)) from None
    new, notes = _graft_again(model, path)
    weights = path / "model.safetensors"
    if new and weights.is_file():
        state = need("safetensors.torch").load_file(weights)
        model.load_state_dict({key: state[key] for key in new if key in state}, strict=False)
    return Loaded(model, "folder", folder=path, notes=notes)


def _weights(read: FileModel, arch: str) -> Loaded:
    with working(f"building {arch}"):
        model = build(arch, real=True)
    _, notes = _graft_again(model, read.path)
    path, container, key = read.path, None, ""
    with working(f"loading {path.name}"):
        if path.suffix == ".json" or _is_safetensors(path):
            form, state = "safetensors", _tensors(path)
        else:
            torch = need("torch")
            form, key = "weights", read.key
            try:
                state = container = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                why = next(iter(str(error).strip().splitlines()), "")
                raise FileError(f"the weights cannot be loaded: {why[:200]}", where=str(path)) from None
            for part in key.split(".") if key else ():
                state = state[part]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise FileError(
            f"the weights do not fit the architecture: {' '.join(lines)[:300]}", where=str(path)
        ) from None
    return Loaded(model, form, container, key, notes=notes)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{"


def _tensors(path: Path) -> dict[str, Any]:
    import json

    load_file = need("safetensors.torch").load_file
    if path.suffix != ".json":
        return dict(load_file(path))
    shards = dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return {key: tensor for shard in shards for key, tensor in load_file(path.parent / shard).items()}


def _graft_again(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Put back the grafts that a plan beside the weights tells of; returns the keys they add, and notes."""
    import regraft
    from regraft.graft.save import load_plan as load_grafts

    plan = plan_beside(path)
    if not plan.is_file() and not path.is_dir():
        plan = path.parent / PLAN  # its name before each file had a plan of its own
    if not plan.is_file():
        return [], []
    try:
        return regraft.load_plan(model, plan).state_keys, []
    except MisfitError:
        return [], [f"{plan} is the plan of another model: none of its grafts were put back"]
    except (LossError, OptionError) as error:  # a criterion or an optimizer, which no file can hold
        return load_grafts(model, plan).state_keys, [f"{error.what}: only the grafts were put back"]

"""Loading a model with its weights, and writing it in the form it came in, with `regraft.json` beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import build, is_architecture, need
from regraft.cli.opening import loaded
from regraft.cli.progress import working
from regraft.cli.reading.files import read_file
from regraft.errors import FileError, MisfitError

if TYPE_CHECKING:
    from torch import nn

    from regraft.cli.reading.model import ReadModel
    from regraft.report.view import View

PLAN = "regraft.json"
Pairs = list[tuple[str, str | None]]


@dataclass
class Loaded:
    """A model with its weights, and the form that it came in.

    Attributes:
        form: "module", "weights", "safetensors", "folder" or "fresh" (an architecture by name).
        container: of weights in a checkpoint, the checkpoint.
        key: where in it they stand.
    """

    model: nn.Module
    form: str
    container: Any = None
    key: str = ""
    notes: list[str] = field(default_factory=list)


def load(name: str, arch: str = "", *, trust: bool = False) -> Loaded:
    """The model that a name stands for, with its weights; grafts that were saved beside it are put back.

    Raises:
        FileError: it cannot be loaded: without `trust` nothing is, but plain weights.
    """
    path = Path(name)
    if path.is_dir() and is_architecture(name):
        return _folder(path)
    if not path.exists() or is_architecture(name):
        with working(f"building {name}"):
            note = f"{name} was built with fresh weights: none are downloaded"
            return Loaded(build(name, real=True), "fresh", notes=[note])
    read = read_file(path)
    if read.form == "module":
        if not trust:
            raise FileError(
                "the file is a whole module, and loading that runs the code that it names",
                where=name,
                remedy="--trust, if you know who made it; or save a state dict and give --arch",
            )
        return Loaded(loaded(read), "module", notes=_only_inside(read))
    if read.form != "weights":
        raise FileError(read.notes[0], where=name)
    if not arch:
        raise FileError(
            "the file holds weights alone, no layers",
            where=name,
            remedy="--arch timm:NAME, --arch hf:FOLDER, …",
        )
    return _weights(read, arch)


def _only_inside(read: ReadModel) -> list[str]:
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
    new = _graft_again(model, path)
    weights = path / "model.safetensors"
    if new and weights.is_file():
        state = need("safetensors.torch").load_file(weights)
        model.load_state_dict({key: state[key] for key in new if key in state}, strict=False)
    return Loaded(model, "folder")


def _weights(read: ReadModel, arch: str) -> Loaded:
    with working(f"building {arch}"):
        model = build(arch, real=True)
    _graft_again(model, read.path.parent)
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
    return Loaded(model, form, container, key)


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


def _graft_again(model: nn.Module, folder: Path) -> list[str]:
    """Put back the grafts that a plan beside the weights tells of; returns the keys they add."""
    import regraft

    if not (folder / PLAN).is_file():
        return []
    try:
        return regraft.load_plan(model, folder).state_keys
    except MisfitError:
        return []  # the plan of another model in the same folder


def apply_to_file(
    name: str, rules: Pairs, output: Path, arch: str, trust: bool, safe: bool, force: bool
) -> View:
    """Load, graft, write; returns the report."""
    import regraft

    _check_free(output, force)
    found = load(name, arch, trust=trust)
    with working("grafting"):
        report = regraft.apply(found.model, rules)
    report.notes.extend([*found.notes, *write(found, output, safe)])
    return report


def revert_file(
    name: str, output: Path, selector: str, arch: str, trust: bool, safe: bool, force: bool
) -> View:
    """Load, revert, write; returns what has changed."""
    import regraft

    _check_free(output, force)
    found = load(name, arch, trust=trust)
    before = regraft.inspect(found.model) if found.form == "fresh" else _looked(found.model)
    regraft.revert(found.model, selector or None)
    made = regraft.diff(before, _looked(found.model))
    made.notes.extend([*found.notes, *write(found, output, safe, grafted=bool(selector))])
    return made


def _looked(model: nn.Module) -> Any:
    from regraft.find.difference import side_of

    return side_of(model)


def _check_free(output: Path, force: bool) -> None:
    places = (output, output / PLAN if output.is_dir() or not output.suffix else output.parent / PLAN)
    taken = [
        place for place in places if place.exists() and not (place.is_dir() and not any(place.iterdir()))
    ]
    if taken and not force:
        raise FileError("there is something already", where=str(taken[0]), remedy="another -o, or --force")
    if not output.parent.is_dir():
        raise FileError("there is no such folder to write to", where=str(output.parent))


def write(found: Loaded, output: Path, safe: bool, *, grafted: bool = True) -> list[str]:
    """Write the model as it came, and its plan beside it; returns notes on what was written."""
    import regraft

    try:
        with working(f"writing {output.name}"):
            if found.form == "folder":
                found.model.save_pretrained(output)  # type: ignore[operator]
                folder = output
            else:
                _write_file(found, output, safe)
                folder = output.parent
            plan = folder / PLAN if grafted else None
            if plan:
                regraft.save_plan(found.model, plan)
    except OSError as error:
        raise FileError(
            f"the model cannot be written: {error.strerror or error}", where=str(output)
        ) from None
    return [f"written to {output}" + (f", its grafts to {plan}" if plan else "")]


def _write_file(found: Loaded, output: Path, safe: bool) -> None:
    if output.is_dir():
        raise FileError("this is a folder; the model came as a file", where=str(output), remedy="-o FILE.pt")
    torch: Any = need("torch")
    if safe or found.form == "safetensors":
        if output.suffix != ".safetensors":
            raise FileError(
                "weights written as safetensors end so", where=str(output), remedy="-o NAME.safetensors"
            )
        need("safetensors.torch").save_model(found.model, str(output))
    elif found.form == "weights":
        torch.save(_with_weights(found), output)
    else:
        torch.save(found.model, output)


def _with_weights(found: Loaded) -> Any:
    """The checkpoint as it was, with the model's weights in it."""
    state = found.model.state_dict()
    if not found.key:
        return state
    *parents, last = found.key.split(".")
    place = found.container
    for part in parents:
        place = place[part]
    place[last] = state
    return found.container

"""Writing a model in the form it came in, grafted or plain again, with `regraft.json` beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import need
from regraft.cli.loading import PLAN, Loaded, load
from regraft.cli.progress import working
from regraft.errors import FileError

if TYPE_CHECKING:
    from torch import nn

    from regraft.report.view import View

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot")
Pairs = list[tuple[str, str | None]]


def apply_to_file(
    name: str,
    rules: Pairs,
    output: Path,
    arch: str,
    trust: bool,
    safe: bool,
    force: bool,
    inputs: Any = None,
) -> View:
    """Load, graft, write; returns the report."""
    import regraft

    _check_free(output, force)
    found = load(name, arch, trust=trust)
    with working("grafting"):
        report = regraft.apply(found.model, rules, inputs)
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
    from regraft.find.diff import side_of

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
                _take_along(found.folder, output)
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


def _take_along(source: Path | None, output: Path) -> None:
    """What else is in the folder (the tokenizer, the README) belongs to the model too."""
    for path in source.iterdir() if source else ():
        place = output / path.name
        if place.exists() or path.name == PLAN or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, place)
        elif path.is_file():
            shutil.copy2(path, place)


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

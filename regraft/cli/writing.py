"""Writing a model in the form it came in, grafted or plain again, with its plan beside it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import need
from regraft.cli.file_view import PLAN, plan_beside
from regraft.cli.opening import Loaded
from regraft.cli.output import working
from regraft.errors import FileError

if TYPE_CHECKING:
    from regraft.report.view import View

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot")


def applied(loaded: Loaded, rules: list[tuple[str, str | None]], inputs: Any, out: Path, safe: bool) -> View:
    """Graft a model and write it; returns the report."""
    import regraft

    with working("grafting"):
        report = regraft.apply(loaded.model, rules, inputs)
    report.notes.extend([*loaded.notes, *write(loaded, out, safe)])
    return report


def reverted(loaded: Loaded, selector: str, out: Path, safe: bool) -> View:
    """Undo the grafts of a model and write it; returns what has changed."""
    import regraft
    from regraft.find.diff import side_of

    before: Any = regraft.inspect(loaded.model) if loaded.form == "fresh" else side_of(loaded.model)
    regraft.revert(loaded.model, selector or None)
    after: Any = side_of(loaded.model)
    difference = regraft.diff(before, after)
    difference.notes.extend([*loaded.notes, *write(loaded, out, safe, grafted=bool(selector))])
    return difference


def check_free(output: Path, force: bool) -> None:
    """Raise FileError if something stands where the model or its plan is to be written, unless `force`."""
    taken = [
        place
        for place in (output, plan_beside(output))
        if place.exists() and not (place.is_dir() and not any(place.iterdir()))
    ]
    if taken and not force:
        raise FileError("there is something already", where=str(taken[0]), remedy="another -o, or --force")
    if not output.parent.is_dir():
        raise FileError("there is no such folder to write to", where=str(output.parent))


def write(loaded: Loaded, output: Path, safe: bool, *, grafted: bool = True) -> list[str]:
    """Write the model as it came, and its plan beside it; returns notes on what was written.

    All of it is written beside `output` first, then moved there: after an error nothing is left behind.
    """
    import regraft

    folder = loaded.form == "folder"
    safe = safe or loaded.form == "safetensors"
    if output.is_dir() and not folder:
        raise FileError("this is a folder; the model came as a file", where=str(output), remedy="-o FILE.pt")
    if safe and output.suffix != ".safetensors" and not folder:
        raise FileError(
            "weights written as safetensors end so", where=str(output), remedy="-o NAME.safetensors"
        )
    notes = []
    try:
        with (
            working(f"writing {output.name}"),
            tempfile.TemporaryDirectory(prefix=".regraft-", dir=output.parent) as place,
        ):
            draft = Path(place) / output.name
            if folder:
                loaded.model.save_pretrained(draft)  # type: ignore[operator]
                notes += _take_along(loaded.folder, draft)
            elif safe:
                need("safetensors.torch").save_model(loaded.model, str(draft))
            else:
                need("torch").save(_content(loaded), draft)
            if grafted:
                regraft.save_plan(loaded.model, plan_beside(draft))
            plan = plan_beside(output) if not folder else output / PLAN
            if not grafted:
                plan.unlink(missing_ok=True)  # that of a model which was written over
            _move(draft, output)
            if grafted and not folder:
                plan_beside(draft).replace(plan)
    except OSError as error:
        raise FileError(
            f"the model cannot be written: {error.strerror or error}", where=str(output)
        ) from None
    return [f"written to {output}" + (f", its grafts to {plan}" if grafted else ""), *notes]


def _move(draft: Path, output: Path) -> None:
    if not draft.is_dir() or not output.is_dir():
        draft.replace(output)
        return
    for path in draft.iterdir():
        _move(path, output / path.name)


def _take_along(source: Path | None, output: Path) -> list[str]:
    """Copy what else is in the folder (the tokenizer, the README); returns a note on what was left out.

    A link is followed within the folder, or to the blobs of the Hugging Face cache that it is a snapshot in.
    """
    if source is None:
        return []
    inside = [source.resolve()]
    if source.resolve().parent.name == "snapshots":
        inside.append(source.resolve().parent.parent / "blobs")
    left: list[str] = []

    def outside(folder: str, names: list[str]) -> list[str]:
        paths = [Path(folder, name) for name in names]
        out = [
            path
            for path in paths
            if not any(path.resolve().is_relative_to(place) for place in inside)
            or (path.is_symlink() and path.is_dir())
            or not (path.is_file() or path.is_dir())
        ]
        left.extend(str(path.relative_to(source)) for path in out)
        return [path.name for path in out]

    ignored = outside(str(source), [path.name for path in source.iterdir()])
    for path in source.iterdir():
        place = output / path.name
        if path.name in ignored or place.exists() or path.name == PLAN or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, place, ignore=outside)
        else:
            shutil.copy2(path, place)
    return [f"not taken along, since links lead out of the folder: {', '.join(sorted(left))}"] if left else []


def _content(loaded: Loaded) -> Any:
    """The module; or the checkpoint as it was, with the model's weights in it."""
    if loaded.form != "weights":
        return loaded.model
    state = loaded.model.state_dict()
    if not loaded.key:
        return state
    *parents, last = loaded.key.split(".")
    place = loaded.container
    for part in parents:
        place = place[part]
    place[last] = state
    return loaded.container

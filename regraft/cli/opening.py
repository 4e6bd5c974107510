"""What MODEL stands for: a view of it for `inspect`, `plan` and `diff`, a loaded model for the rest."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import build, config_of, inputs_for, is_architecture, need
from regraft.cli.file_view import (
    PLAN,
    Facts,
    Files,
    command,
    inspection_of,
    no_model,
    plan_beside,
    with_verdicts,
)
from regraft.cli.output import MODELS, Opening, reason, working
from regraft.errors import FileError, LossError, MisfitError, OptionError
from regraft.files.formats import NoModelError, shards_of
from regraft.files.verdicts import KNOWN

if TYPE_CHECKING:
    from torch import nn

    from regraft.files.skeleton import FileModel
    from regraft.report.view import View


def view_of(name: str, how: Opening, shape: str = "") -> View:
    """The inspection of what a name stands for; a file is read and not run, unless it is trusted."""
    import regraft

    files = _files(name, how)
    error = files.reports[0].error if files and not files.folder else None
    if files and files.verdicts.verdict == KNOWN and isinstance(error, NoModelError):
        return no_model(files, error)
    model = _model_for(files, name, how)
    if files and model is None:
        return inspection_of(files.model, files)
    with working(f"probing {how.arch or name}"):
        inspection = regraft.inspect(model, inputs_for(how.arch or name, shape))
    view = _in_commands(inspection, name, how)
    if files is None:
        return view
    return with_verdicts(
        view, files, _fit(files.model, model) if how.arch and not is_architecture(name) else ()
    )


def _in_commands(view: View, name: str, how: Opening) -> View:
    """An inspection that speaks of options and commands, not of Python, where they do it."""
    from regraft.find.probe.run import UNKNOWN

    facts = view.to_dict()
    if facts["probe"]["reason"] == UNKNOWN:
        facts["probe"] = {
            **facts["probe"],
            "reason": "regraft does not know this model's inputs; give --shape",
        }
    said = facts["summary"]
    options = [f"--rule={selector}={variant}" for selector, variant in said["rules"]]
    options += [f"--arch={how.arch}"] * bool(how.arch) + ["--trust"] * how.trust
    if said["rules"] or said["paste"].startswith("regraft.revert"):
        paste = command("apply" if said["rules"] else "revert", name, *options)
    else:
        paste = said["paste"] and f"{said['paste']}  # where you train it"
    return Facts({**facts, "summary": {**said, "paste": paste}})


def planned(name: str, rules: list[tuple[str, str | None]], how: Opening, shape: str = "") -> View:
    """The plan of rules for what a name stands for."""
    from regraft import plan

    files = _files(name, how)
    model = _model_for(files, name, how)
    if files and model is None:
        view = _plan_unseen(files.model, rules)
    else:
        with working("probing"):
            view = plan(model, rules, inputs_for(how.arch or name, shape))
    return with_verdicts(view, files) if files else view


def _plan_unseen(read: FileModel, rules: list[tuple[str, str | None]]) -> Any:
    """A plan for a tree that was read: what can be seen without a forward."""
    from regraft.files.skeleton import torch_modules
    from regraft.find.inspect import look
    from regraft.find.probe.run import Probe
    from regraft.planning.plan import plan_of
    from regraft.planning.rules import read_rules

    probe = Probe(reason="the file was read, not run")
    return plan_of(replace(look(torch_modules(read)), notes=list(read.notes), probe=probe), read_rules(rules))


def side_of(name: str, how: Opening) -> Any:
    """What a name stands for, to be compared: a model where it can be loaded, else what is read of it."""
    if is_architecture(name) and not Path(name).is_dir():
        with working(f"building {name}"):
            return build(name)
    files = _files(name, how)
    if files is None:
        return build(name)
    if is_architecture(name) or (how.trust if files.model.form == "module" else how.arch):
        return _load(files, name, how).model
    files.check()
    return inspection_of(files.model, files)


def _files(name: str, how: Opening) -> Files | None:
    """The files that a name stands for, read; None for an architecture that is no folder."""
    path = Path(name)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if exists:
        with working(f"reading {path.name}"):
            files = Files(path, how.allow)
        if "torch" not in sys.modules:  # whose own objects must be freed at the end
            gc.freeze()  # what was read stays: the collector need not look at it again and again
        return files
    if is_architecture(name) or (":" in name and "/" not in name.partition(":")[0]):
        return None
    raise FileError("there is no such file or folder", where=name, remedy=f"MODEL is {MODELS}")


def _model_for(files: Files | None, name: str, how: Opening) -> Any:
    """The model to probe; None if a file was read that holds modules or weights and is not to be loaded."""
    if files is None or is_architecture(name):
        if files:  # a Hugging Face folder: its files are judged, its config is built
            files.check(names=False, model=False)
        with working(f"building {name}"):
            return build(name)
    read = files.model
    if how.trust and read.form == "module":
        files.check()
        return _load_module(read)
    with working(f"building {how.arch}"):
        return build(how.arch) if how.arch else None


def _fit(read: FileModel, model: nn.Module) -> list[str]:
    """Whether weights are those of the architecture that was given for them."""
    if read.form != "weights":
        return []
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = sorted(own.keys() | read.shapes.keys())
    differ = [name for name in names if own.get(name) != read.shapes.get(name)]
    if not differ:
        return [f"all {len(own):,} tensors of {read.path.name} fit the architecture"]
    listed = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
    return [f"{len(differ):,} tensors of {read.path.name} do not fit the architecture: {listed}"]


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


def load(name: str, how: Opening) -> Loaded:
    """The model that a name stands for, with its weights; grafts that were saved beside it are put back."""
    files = _files(name, how)
    if files:
        return _load(files, name, how)
    with working(f"building {name}"):
        note = f"{name} was built with fresh weights: none are downloaded"
        return Loaded(build(name, real=True), "fresh", notes=[note])


def _load(files: Files, name: str, how: Opening) -> Loaded:
    folder = is_architecture(name)
    files.check(model=not folder)
    if folder:
        return _load_folder(files.path)
    read = files.model
    if read.form == "module":
        if not how.trust:
            raise FileError(
                "the file is a whole module, and loading that runs the code that it names",
                where=name,
                remedy="--trust, if you know who made it; or save a state dict and give --arch",
            )
        alone = [f"the checkpoint's {read.key!r} alone is written, not the rest of it"] if read.key else []
        return Loaded(_load_module(read), "module", notes=alone)
    if not how.arch:
        raise FileError(
            "the file holds weights alone, no layers",
            where=name,
            remedy="--arch timm:NAME, --arch hf:FOLDER, …",
        )
    return _load_weights(read, how.arch)


def _load_module(read: FileModel) -> nn.Module:
    """The module of a trusted file, for which its code is run."""
    import torch

    with working(f"loading {read.path.name}"):
        try:
            value = torch.load(read.path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise FileError(f"the file cannot be loaded: {reason(error)}", where=str(read.path)) from error
    for part in read.key.split(".") if read.key else ():
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value  # type: ignore[no-any-return]


def _load_folder(path: Path) -> Loaded:
    need("transformers").utils.logging.disable_progress_bar()
    with working(f"loading {path.name}"):
        try:
            model = config_of(path)[1].from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise FileError(f"the folder cannot be loaded: {reason(error)}", where=str(path)) from None
    new, notes = _graft_again(model, path)
    weights = path / "model.safetensors"
    if new and weights.is_file():
        state = need("safetensors.torch").load_file(weights)
        model.load_state_dict({key: state[key] for key in new if key in state}, strict=False)
    return Loaded(model, "folder", folder=path, notes=notes)


def _load_weights(read: FileModel, arch: str) -> Loaded:
    with working(f"building {arch}"):
        model = build(arch, real=True)
    path = read.path
    _, notes = _graft_again(model, path)
    with working(f"loading {path.name}"), path.open("rb") as file:
        if path.suffix == ".json" or file.read(9)[8:9] == b"{":
            load_file = need("safetensors.torch").load_file
            shards = shards_of(path) if path.suffix == ".json" else [path]
            state = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
            loaded = Loaded(model, "safetensors", notes=notes)
        else:
            try:
                state = need("torch").load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise FileError(f"the weights cannot be loaded: {reason(error)}", where=str(path)) from None
            loaded = Loaded(model, "weights", state, read.key, notes=notes)
            for part in read.key.split(".") if read.key else ():
                state = state[part]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise FileError(f"the weights do not fit the architecture: {lines[:300]}", where=str(path)) from None
    return loaded


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

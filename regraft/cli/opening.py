"""What MODEL stands for: a view of it for `inspect` and `diff`, a model for everything else."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import build, is_architecture, usual_input
from regraft.cli.file_view import Facts, Files, command, inspection_of, no_model, with_verdicts
from regraft.cli.loading import load, load_module
from regraft.cli.output import MODELS
from regraft.cli.progress import working
from regraft.errors import FileError, OptionError
from regraft.files.formats import NoModelError
from regraft.files.verdicts import KNOWN

if TYPE_CHECKING:
    from torch import nn

    from regraft.files.skeleton import FileModel
    from regraft.report.view import View


def view_of(
    name: str, arch: str = "", shape: str = "", *, trust: bool = False, allow: Sequence[str] = ()
) -> View:
    """The inspection of what a name stands for; a file is read and not run, unless it is trusted.

    Raises:
        FileError: what cannot be read, or would run what no model needs.
        NoMatchError: no such architecture.
    """
    import regraft

    files = _files(name, allow)
    error = files.reports[0].error if files and not files.folder else None
    if files and files.verdicts.verdict == KNOWN and isinstance(error, NoModelError):
        return no_model(files, error)
    model = _model_for(files, name, arch, trust=trust)
    if model is None:
        assert files is not None
        return inspection_of(files.model, files)
    with working(f"probing {arch or name}"):
        inspection = regraft.inspect(model, inputs_for(arch or name, shape))
    view = _in_commands(inspection, name, arch, trust)
    if files is None:
        return view
    return with_verdicts(
        view, files, _unlike(files.model, model) if arch and not is_architecture(name) else ()
    )


def _in_commands(view: View, name: str, arch: str, trust: bool) -> View:
    """An inspection whose line to paste is a command, not Python, where a command does it."""
    facts = view.to_dict()
    said = facts["summary"]
    options = [f"--rule={selector}={variant}" for selector, variant in said["rules"]]
    options += [f"--arch={arch}"] * bool(arch) + ["--trust"] * trust
    if said["rules"] or said["paste"].startswith("regraft.revert"):
        paste = command("apply" if said["rules"] else "revert", name, *options)
    else:
        paste = said["paste"] and f"{said['paste']}  # where you train it"
    return Facts({**facts, "summary": {**said, "paste": paste}})


def _model_for(files: Files | None, name: str, arch: str, *, trust: bool) -> nn.Module | None:
    """The model to probe; None if a file was read that holds modules or weights and is not to be loaded."""
    if files is None or is_architecture(name):
        if files:  # a Hugging Face folder: its files are judged, its config is built
            files.check(names=False, model=False)
        with working(f"building {name}"):
            return build(name)
    read = files.model
    if trust and read.form == "module":
        files.check()
        return load_module(read)
    with working(f"building {arch}"):
        return build(arch) if arch else None


def side_of(name: str, arch: str = "", *, trust: bool = False, allow: Sequence[str] = ()) -> Any:
    """What a name stands for, to be compared: a model where it can be loaded, else what is read of it.

    Raises:
        RegraftError: as `view_of`.
    """
    if is_architecture(name) and not Path(name).is_dir():
        with working(f"building {name}"):
            return build(name)
    files = _files(name, allow)
    if files is None or is_architecture(name):
        return load(name, arch, trust=trust, allow=allow).model if files else build(name)
    read = files.model
    if (read.form == "module" and trust) or (read.form == "weights" and arch):
        return load(name, arch, trust=trust, allow=allow).model
    files.check()
    return inspection_of(read, files)


def planned(
    name: str,
    rules: list[tuple[str, str | None]],
    arch: str = "",
    shape: str = "",
    *,
    trust: bool = False,
    allow: Sequence[str] = (),
) -> View:
    """The plan of rules for what a name stands for.

    Raises:
        RegraftError: as `view_of`, and all problems of the rules.
    """
    from regraft import plan

    files = _files(name, allow)
    model = _model_for(files, name, arch, trust=trust)
    if model is None:
        assert files is not None
        view: View = _plan_unseen(files.model, rules)
    else:
        with working("probing"):
            view = plan(model, rules, inputs_for(arch or name, shape))
    return with_verdicts(view, files) if files else view


def _plan_unseen(read: FileModel, rules: list[tuple[str, str | None]]) -> View:
    """A plan for a tree that was read: what can be seen without a forward."""
    from dataclasses import replace

    from regraft.files.skeleton import torch_modules
    from regraft.find.inspect import look
    from regraft.find.probe.run import Probe
    from regraft.planning.plan import plan_of
    from regraft.planning.rules import read_rules

    seen = look(torch_modules(read))
    read_only = replace(seen, notes=list(read.notes), probe=Probe(reason="the file was read, not run"))
    return plan_of(read_only, read_rules(rules))


def _files(name: str, allow: Sequence[str]) -> Files | None:
    """The files that a name stands for, read; None for an architecture that is no folder."""
    path = Path(name)
    if is_architecture(name) and not _exists(path):
        return None
    if _exists(path):
        with working(f"reading {path.name}"):
            files = Files(path, allow)
        if "torch" not in sys.modules:  # whose own objects must be freed at the end
            gc.freeze()  # what was read stays: the collector need not look at it again and again
        return files
    if ":" in name and "/" not in name.partition(":")[0]:
        return None
    raise FileError("there is no such file or folder", where=name, remedy=f"MODEL is {MODELS}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def inputs_for(name: str, shape: str) -> Any:
    """The input of the shape that was given, or the architecture's usual one, or none.

    Raises:
        OptionError: this is no shape.
    """
    if not shape:
        return usual_input(name)
    import torch

    sizes = shape.replace(",", "x").split("x")
    if not all(size.strip().isdigit() for size in sizes):
        raise OptionError(f"{shape!r} is no shape", remedy="for example --shape 2x3x224x224")
    return torch.zeros([int(size) for size in sizes])


def _unlike(read: FileModel, model: nn.Module) -> list[str]:
    """Whether weights are those of the architecture that was given for them."""
    if read.form != "weights":
        return []
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differ = sorted(
        name for name in own.keys() | read.shapes.keys() if own.get(name) != read.shapes.get(name)
    )
    if not differ:
        return [f"all {len(own):,} tensors of {read.path.name} fit the architecture"]
    listed = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
    return [f"{len(differ):,} tensors of {read.path.name} do not fit the architecture: {listed}"]

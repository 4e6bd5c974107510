"""What MODEL stands for: a view of it for `inspect` and `diff`, a model for everything else."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.architectures import build, is_architecture, usual_input
from regraft.cli.loading import load, loaded
from regraft.cli.output import MODELS
from regraft.cli.progress import working
from regraft.cli.reading.files import read_file
from regraft.cli.reading.inspection import FileInspection
from regraft.errors import FileError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from regraft.cli.reading.model import ReadModel
    from regraft.report.view import View


def view_of(name: str, arch: str = "", shape: str = "", *, trust: bool = False) -> View:
    """The inspection of what a name stands for; a file is read and not run, unless it is trusted.

    Raises:
        FileError: what cannot be read, or (`suspicious`) names what no model needs.
        NoMatchError: no such architecture.
    """
    read = _read(name)
    if read is None:
        with working(f"building {name}"):
            model = build(name)
        return _inspected(model, name, shape)
    if trust and read.form == "module":
        return _inspected(loaded(read), name, shape)
    if arch:
        with working(f"building {arch}"):
            model = build(arch)
        made: Any = _inspected(model, arch, shape)
        made.notes.extend(_unlike(read, model))
        return made  # type: ignore[no-any-return]
    return FileInspection(read)


def side_of(name: str, arch: str = "", *, trust: bool = False) -> Any:
    """What a name stands for, to be compared: a model where it can be loaded safely, else what is read of it.

    Raises:
        RegraftError: as `view_of`.
    """
    read = _read(name)
    if read is None and not Path(name).is_dir():
        with working(f"building {name}"):
            return build(name)
    if read is None or (read.form == "module" and trust) or (read.form == "weights" and arch):
        return load(name, arch, trust=trust).model
    return FileInspection(read)


def planned(
    name: str, rules: list[tuple[str, str | None]], arch: str = "", shape: str = "", *, trust: bool = False
) -> View:
    """The plan of rules for what a name stands for.

    Raises:
        RegraftError: as `view_of`, and all problems of the rules.
    """
    import regraft

    read = _read(name)
    if read is None or arch or (trust and read.form == "module"):
        with working(f"building {arch or name}"):
            model = build(arch or name) if read is None or arch else loaded(read)
        with working("probing"):
            return regraft.plan(model, rules, inputs_for(arch or name, shape))
    if read.form in ("script", "program"):
        raise FileError(read.notes[0], where=name)
    return _plan_unseen(read, rules)


def _plan_unseen(read: ReadModel, rules: list[tuple[str, str | None]]) -> View:
    """A plan for a tree that was read: what can be seen without a forward."""
    from dataclasses import replace

    from regraft.cli.reading.skeleton import skeleton
    from regraft.find.inspect import look
    from regraft.find.probe.run import Probe
    from regraft.planning.plan import plan_of
    from regraft.planning.rules import read_rules

    seen = look(skeleton(read))
    read_only = replace(seen, notes=list(read.notes), probe=Probe(reason="the file was read, not run"))
    return plan_of(read_only, read_rules(rules))


def _read(name: str) -> ReadModel | None:
    """The file that a name stands for, read; None for an architecture."""
    path = Path(name)
    if is_architecture(name):
        return None
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if there:
        with working(f"reading {path.name}"):
            read = read_file(path)
        if "torch" not in sys.modules:  # whose own objects must be freed at the end
            gc.freeze()  # what was read stays: the collector need not look at it again and again
        return read
    if ":" in name and "/" not in name.partition(":")[0]:
        return None
    raise FileError("there is no such file or folder", where=name, remedy=f"MODEL is {MODELS}")


def _inspected(model: nn.Module, name: str, shape: str = "") -> View:
    import regraft

    with working(f"probing {name}"):
        return regraft.inspect(model, inputs_for(name, shape))


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


def _unlike(read: ReadModel, model: nn.Module) -> list[str]:
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

"""TorchScript: the modules of the archive, and the constants of their classes, from its code as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from regraft.cli.reading.archive import Archive
from regraft.cli.reading.follow import read
from regraft.cli.reading.limits import STREAM_BYTES
from regraft.cli.reading.model import NOT_RUN, ReadModel
from regraft.cli.reading.stream import Stream
from regraft.cli.reading.tensors import tensor_of
from regraft.cli.reading.tree import ReadModule
from regraft.cli.reading.values import Made, Named
from regraft.errors import FileError

_CODE_BYTES = 16 * 2**20
_CLASS = re.compile(r"^class (\w+)\(Module\):$", re.MULTILINE)
_CONSTANT = re.compile(r"^  (\w{1,40}) : Final\[(?:int|float|bool)\] = ([\w.+-]{1,40})$", re.MULTILINE)
_MANGLED = re.compile(r"\.?___torch_mangle_\d+")
_HOME = "__torch__."
_SIMPLE = (str, int, float, bool)


def read_script(path: Path, archive: Archive) -> ReadModel:
    """The modules of a TorchScript archive.

    Raises:
        FileError: it is damaged.
    """
    found = archive.members("/data.pkl")
    if not found:
        raise FileError("the TorchScript archive has no modules in it")
    stream = Stream(archive.read(found[0], STREAM_BYTES))
    value = read(stream)
    if not _is_module(value):
        raise FileError("the TorchScript archive holds no module")
    constants = _constants(archive)
    made: dict[int, ReadModule] = {}
    root = made[id(value)] = _bare(value, constants)
    todo = [value]
    while todo:
        one = todo.pop()
        for name, entry in one.state.items():
            if not isinstance(name, str):
                continue
            if _is_module(entry):
                if id(entry) not in made:
                    made[id(entry)] = _bare(entry, constants)
                    todo.append(entry)
                made[id(one)].children[name] = made[id(entry)]
            elif tensor := tensor_of(entry):
                made[id(one)].tensors[name] = tensor
    note = (
        f"{NOT_RUN}: this is compiled TorchScript, in which no graft takes effect; "
        "graft the Python model, then script or trace it"
    )
    return ReadModel(path, "script", root, [note])


def _is_module(value: Any) -> bool:
    named = (
        isinstance(value, Made)
        and isinstance(value.callee, Named)
        and value.callee.module.startswith(_HOME[:-1])
    )
    return named and isinstance(value.state, dict)


def _bare(value: Made, constants: dict[str, dict[str, Any]]) -> ReadModule:
    full = value.callee.full
    attributes = {
        name: one for name, one in value.state.items() if isinstance(name, str) and type(one) in _SIMPLE
    }
    home = _MANGLED.sub("", value.callee.module).removeprefix(_HOME)
    return ReadModule(value.callee.name, home, attributes | constants.get(full, {}))


def _constants(archive: Archive) -> dict[str, dict[str, Any]]:
    """The constants of each class, by its whole name: TorchScript keeps a rate there and not in its data."""
    found: dict[str, dict[str, Any]] = {}
    room = _CODE_BYTES
    for member in archive.members(".py"):
        _, inside, file = member.name.partition("/code/")
        if not inside or member.size > room:
            continue
        room -= member.size
        text = archive.read(member, _CODE_BYTES).decode("utf-8", "replace")
        pieces = _CLASS.split(text)
        home = file.removesuffix(".py").replace("/", ".")
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            found[f"{home}.{name}"] = {key: _value(text) for key, text in _CONSTANT.findall(body)}
    return found


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return None

"""The tree of modules that a file describes: names, classes, attributes, shapes; nothing that could run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from regraft.cli.reading.limits import DEPTH, NAME_LENGTH, NAMES, PATH_CHARACTERS
from regraft.cli.reading.tensors import ReadTensor, tensor_of
from regraft.cli.reading.values import Made, Named
from regraft.errors import FileError

_REBUILDERS = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)
_EDIT = ("kind", "op", "before", "after")
_GRAFTED = "regraft.graft.classes"


@dataclass(eq=False, slots=True)
class ReadModule:
    """A module of a file.

    Attributes:
        type: the name of its class.
        home: the Python module of the class, as the file has it.
        attributes: all of them, as the file has them: look at the type before the value.
        tensors: its own parameters and buffers, by name.
        children: by name.
        paths: all its names in the model; filled in by `walk`.
        grafts: what regraft says of each of its grafts there, if it was saved with them.
    """

    type: str
    home: str = ""
    attributes: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, ReadTensor] = field(default_factory=dict)
    children: dict[str, ReadModule] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    grafts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def training(self) -> bool:
        return self.attributes.get("training", True) is not False


def is_module(value: Any) -> bool:
    """Does this value describe an `nn.Module`?"""
    state = _state(value)
    return isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict)


def read_tree(value: Made) -> ReadModule:
    """The tree below a value that describes a module."""
    made: dict[int, ReadModule] = {}
    tensors: dict[int, ReadTensor | None] = {}
    todo = [value]
    root = made[id(value)] = _bare(value)
    while todo:
        one = todo.pop()
        module = made[id(one)]
        state = module.attributes
        for entries in (state.get("_parameters"), state.get("_buffers")):
            for name, tensor in _entries(entries) if entries else ():
                if id(tensor) not in tensors:
                    tensors[id(tensor)] = tensor_of(tensor)
                read = tensors[id(tensor)]
                if read is not None:
                    module.tensors[name] = read
        children = state.get("_modules")
        for name, child in _entries(children) if children else ():
            if not is_module(child):
                continue
            if id(child) not in made:
                made[id(child)] = _bare(child)
                todo.append(child)
            module.children[name] = made[id(child)]
    return root


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            if entry is not None:
                yield _name(name), entry


def _name(key: Any) -> str:
    if isinstance(key, str) and len(key) > NAME_LENGTH:
        raise FileError(f"a module's name is {len(key):,} characters long: {key[:40]!r}...")
    return key if isinstance(key, str) else repr(key) if isinstance(key, (int, bytes)) else "(no name)"


def _state(value: Any) -> dict[Any, Any]:
    state = value.state if isinstance(value, Made) else None
    if type(state) is tuple and state and isinstance(state[0], dict):
        state = state[0]
    if state is None and isinstance(value, Made) and _called(value).endswith(".reduce_graph_module"):
        state = value.arguments[0] if type(value.arguments) is tuple and value.arguments else None
    return state if isinstance(state, dict) else {}


def _called(value: Made) -> str:
    return value.callee.full if isinstance(value.callee, Named) else ""


def _bare(value: Made) -> ReadModule:
    """The module without what is in it."""
    cls: Any = value.callee
    arguments = value.arguments if type(value.arguments) is tuple else ()
    called = _called(value)
    if called == f"{_GRAFTED}._make_by" and len(arguments) > 1 and type(arguments[1]) is tuple:
        called, arguments = "copyreg.__newobj__", arguments[1]
    if (called in _REBUILDERS or called == f"{_GRAFTED}._make") and arguments:
        cls = arguments[0]
    if called.endswith(".reduce_graph_module"):
        cls = Named("torch.fx.graph_module", "GraphModule", -1)
    state = _state(value)
    name, home = (cls.name, cls.module) if isinstance(cls, Named) else ("Module", "")
    module = ReadModule(name.rpartition(".")[2] or "Module", home, state)
    if "_regraft" in state:
        _see_past_grafts(module, state["_regraft"])
    return module


def _see_past_grafts(module: ReadModule, record: Any) -> None:
    """What regraft itself wrote into the module, if it was saved with its grafts."""
    for graft in record.values() if isinstance(record, dict) else ():
        state = _state(graft)
        edit, saved = state.get("edit"), state.get("saved")
        if isinstance(edit, dict) and all(isinstance(edit.get(name), str) for name in _EDIT):
            module.grafts.append(edit)
        if isinstance(saved, dict):
            module.attributes = {**module.attributes, **saved}


class Planted:
    """A tree that grows by the names of what is in it.

    Raises:
        FileError: from `at`, when it grows beyond any model.
    """

    def __init__(self, root: ReadModule) -> None:
        self.root = root
        self.count = 0

    def at(self, path: str) -> ReadModule:
        """The module of this name, made with all above it if it is not there."""
        place = self.root
        for part in path.split(".") if path else ():
            if part not in place.children:
                self.count += 1
                if self.count > NAMES:
                    raise FileError(f"the names in the file lead to more than {NAMES:,} modules")
                place.children[part] = ReadModule(self.root.type)
            place = place.children[part]
        return place


def walk(root: ReadModule) -> list[ReadModule]:
    """All modules once, in the order of registration, with all of their paths.

    Raises:
        FileError: the tree is deeper than Python's own, or its modules have more names than can be told.
    """
    found: dict[int, ReadModule] = {}
    above: set[int] = set()
    stack: list[tuple[ReadModule, str, bool]] = [(root, "", False)]
    names = characters = 0
    while stack:
        module, path, leaving = stack.pop()
        if leaving:
            above.discard(id(module))
            continue
        if id(module) in above:
            continue  # a module inside itself
        names += 1
        characters += len(path)
        if names > NAMES or characters > PATH_CHARACTERS:
            raise FileError(f"the modules of the file have more than {NAMES:,} names, or too long ones")
        if len(above) > DEPTH:
            raise FileError(f"the modules of the file are nested more than {DEPTH:,} deep")
        found.setdefault(id(module), module).paths.append(path)
        if module.children:
            above.add(id(module))
            stack.append((module, path, True))
            start = f"{path}." if path else ""
            stack += [(child, start + name, False) for name, child in reversed(module.children.items())]
    return list(found.values())

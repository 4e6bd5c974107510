"""The tree of modules that a file describes: names, classes, attributes, shapes; nothing that could run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import FileError
from regraft.files.tensors import FileTensor, tensor_of
from regraft.files.unpickler import Budget
from regraft.files.values import Call, Name
from regraft.report.document import visible

if TYPE_CHECKING:
    import torch
    from torch import nn

_DEPTH = 1_000
"""Of a tree of modules: Python itself could not save a deeper one."""
_NAME_LENGTH = 1_000
STEPS = 25
"""What one more name of a module costs its reader, in opcodes."""
_REBUILDERS = ("copyreg._reconstructor", "copyreg.__newobj_ex__")
_GRAFTED = "regraft.graft."
_EDIT = ("kind", "op", "before", "after")
_KEPT = str.split(
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Linear Embedding Identity "
    "MultiheadAttention LSTM GRU RNN Sequential ModuleList ModuleDict ReLU GELU LayerNorm"
)
"""Classes of torch.nn that a plan tells apart."""
_LINEAR = "NonDynamicallyQuantizableLinear"
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


@dataclass(eq=False, slots=True)
class FileModule:
    """A module of a file.

    Attributes:
        home: the Python module of the class, as the file has it.
        attributes: all of them, as the file has them: look at the type before the value.
        tensors: its own parameters and buffers, by name.
        paths: all its names in the model.
        grafts: what regraft says of each of its grafts there, if it was saved with them.
    """

    type: str
    home: str = ""
    attributes: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    children: dict[str, FileModule] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    grafts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def training(self) -> bool:
        return self.attributes.get("training", True) is not False


@dataclass(eq=False)
class FileModel:
    """A model as its file describes it.

    Attributes:
        form: "module", or "weights" alone.
        root: the tree of modules; of weights alone, what they must belong to.
        modules: all of them, in the order of registration.
        key: where in a checkpoint dictionary it stands, "" if it is the whole file.
        shapes: of weights alone, all of them.
    """

    form: str
    root: FileModule
    modules: list[FileModule]
    notes: list[str] = field(default_factory=list)
    key: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    path: Path = Path()


def is_module(value: Any) -> bool:
    """Does this value describe an `nn.Module`?"""
    state = _state(value)
    return isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict)


def module_model(value: Any, key: str, budget: Budget) -> FileModel:
    """The model that a value describes, without the wrappers around it."""
    root, notes = _tree(value), ["read from the file, not run: which sites run is not known"]
    while (inside := _WRAPPERS.get(root.type)) and inside in root.children:
        notes.append(f"looked inside {root.type}: paths begin at the model it wraps")
        root = root.children[inside]
    return FileModel("module", root, walk(root, budget), notes, key)


def _tree(value: Any) -> FileModule:
    modules: dict[int, FileModule] = {}
    tensors: dict[int, FileTensor | None] = {}
    todo = [value]
    root = modules[id(value)] = _bare(value)
    while todo:
        described = todo.pop()
        module = modules[id(described)]
        for entries in (module.attributes.get("_parameters"), module.attributes.get("_buffers")):
            for name, tensor in _entries(entries):
                if id(tensor) not in tensors:
                    tensors[id(tensor)] = tensor_of(tensor)
                if (read := tensors[id(tensor)]) is not None:
                    module.tensors[name] = read
        for name, child in _entries(module.attributes.get("_modules")):
            if is_module(child):
                if id(child) not in modules:
                    modules[id(child)] = _bare(child)
                    todo.append(child)
                module.children[name] = modules[id(child)]
    return root


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    for key, entry in value.items() if isinstance(value, dict) else ():
        if entry is not None:
            if isinstance(key, str) and len(key) > _NAME_LENGTH:
                raise FileError(f"a module's name is {len(key):,} characters long: {visible(key[:40])!r}...")
            yield key if isinstance(key, str) else repr(key) if type(key) is int else "(no name)", entry


def _state(value: Any) -> dict[Any, Any]:
    state = value.state if type(value) is Call else None
    if type(state) is tuple and state:
        state = state[0]
    return state if isinstance(state, dict) else {}


def _bare(value: Call) -> FileModule:
    """The module without what is in it."""
    cls, arguments = value.callee, value.arguments
    full = cls.full if type(cls) is Name else ""
    if full.startswith(_GRAFTED) and full.endswith("._make_by") and len(arguments) > 1:
        full, arguments = _REBUILDERS[0], arguments[1] if type(arguments[1]) is tuple else ()
    if arguments and (full in _REBUILDERS or (full.startswith(_GRAFTED) and full.endswith("._make"))):
        cls = arguments[0]
    state = _state(value)
    name, home = (cls.name, cls.module) if type(cls) is Name else ("Module", "")
    module = FileModule(name.rpartition(".")[2] or "Module", home, state)
    record = state.get("_regraft")
    for graft in record.values() if isinstance(record, dict) else ():
        edit, saved = _state(graft).get("edit"), _state(graft).get("saved")
        if isinstance(edit, dict) and all(isinstance(edit.get(name), str) for name in _EDIT):
            module.grafts.append(edit)
        if isinstance(saved, dict):
            module.attributes = {**module.attributes, **saved}
    return module


def walk(root: FileModule, budget: Budget) -> list[FileModule]:
    """All modules once, in the order of registration, with all of their paths."""
    seen: dict[int, FileModule] = {}
    above: set[int] = set()
    stack: list[tuple[FileModule, str, bool]] = [(root, "", False)]
    while stack:
        module, path, leaving = stack.pop()
        if leaving:
            above.discard(id(module))
            continue
        if id(module) in above:
            continue  # a module inside itself
        budget.charge(STEPS + len(path) // 8)
        if len(above) > _DEPTH:
            raise FileError(f"the modules of the file are nested more than {_DEPTH:,} deep")
        seen.setdefault(id(module), module).paths.append(path)
        if module.children:
            above.add(id(module))
            stack.append((module, path, True))
            start = f"{path}." if path else ""
            stack += [(child, start + name, False) for name, child in reversed(module.children.items())]
    return list(seen.values())


def torch_modules(model: FileModel) -> nn.Module:
    """The tree as torch modules on the meta device: for finding sites and planning, not for a forward.

    Classes come from torch.nn, or are new and empty: nothing is looked up by what a file says.
    """
    from torch import nn

    own = {name: getattr(nn, name) for name in _KEPT}
    own[_LINEAR] = getattr(nn.modules.linear, _LINEAR)
    classes: dict[tuple[str, str], type[nn.Module]] = {}
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules:
        key = (module.home, module.type)
        if key not in classes:
            known = own.get(module.type) if module.home.startswith("torch.nn.") else None
            # Of a name that Python would not have, the letters that it would.
            name = "".join(mark for mark in module.type if mark.isalnum() or mark == "_") or "Module"
            classes[key] = known or type(name, (nn.Module,), {"__module__": module.home or __name__})
        new = modules[id(module)] = classes[key].__new__(classes[key])
        nn.Module.__init__(new)
        for name, value in module.attributes.items():
            simple = isinstance(value, (str, int, float, type(None)))
            if isinstance(name, str) and simple and not name.startswith("_") and name != "forward":
                new.__dict__[name] = value
        new.training = module.training
        for name, tensor in module.tensors.items():
            empty = tensors.setdefault(id(tensor), _empty_tensor(tensor))
            own_tensors: dict[str, Any] = new._parameters if isinstance(empty, nn.Parameter) else new._buffers
            own_tensors[name] = empty
    for module in model.modules:
        children = {name: modules[id(child)] for name, child in module.children.items()}
        modules[id(module)]._modules.update(children)
    return modules[id(model.root)]


def _empty_tensor(tensor: FileTensor) -> torch.Tensor:
    import torch

    dtype = getattr(torch, tensor.dtype or "float32", torch.float32)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    if tensor.trainable and (dtype.is_floating_point or dtype.is_complex):
        return torch.nn.Parameter(empty)
    return empty

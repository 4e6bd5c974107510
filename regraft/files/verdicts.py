"""What loading a file would import and call, judged by what is known to be harmless.

Each name has a role. `known_names.txt` (written by `benchmarks/known_names.py`, which imports the packages)
lists three of them:

- `object`: a class whose objects are made without a call of its own (`__newobj__`), then given their state.
- `value`: a class or a function that may be called with literals and known objects, or as `_RULES` says.
- `reference`: a function, or a member of an Enum, that may be referred to, but not called.

Every other name is `unknown`, or `dangerous` if it belongs to the standard library or leads to a loader.
`allowed` are unknown names that the caller vouched for.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from regraft.errors import FileError
from regraft.files.values import Call, Long, Name, Ordered, StatedOrdered, shown
from regraft.report.document import visible

KNOWN, UNKNOWN, DANGEROUS = "known", "unknown", "dangerous"
_LISTED = 20
_IMPORTABLE = re.compile(r"[\w.-]+")
_MODEL_FILE = re.compile(r"transformers\.models\.(\w+)\.(modeling|configuration)_\1")
_TENSORS = frozenset(
    ["torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"]
)
_STORAGES = ("torch", "torch.cuda", "torch.storage")
_SPECIAL = frozenset(["__overloads__", "__constants__", "__annotations__", "__doc__", "__objclass__"])
"""Special attributes that nothing calls; others, like `__setstate__`, are, by the next step of a pickle."""
_BASES = frozenset(f"builtins.{name}" for name in str.split("object dict list tuple set int float str"))
_CONTAINERS = frozenset(
    [f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")]
    + [f"builtins.{name}" for name in ("set", "frozenset", "list", "dict")]
    + ["copyreg._reconstructor"]
)
_LOADERS = str.split(
    "torch.load torch.hub torch.jit torch.serialization torch.package torch.export torch.ops torch._ops "
    "torch.classes torch.library torch.testing torch.fx torch.distributed torch.multiprocessing "
    "torch._dynamo torch._inductor torch.utils.cpp_extension torch.utils._config_module "
    "torch.utils.collect_env torch.utils.bottleneck torch.utils.data.datapipes torchvision.datasets.utils "
    "transformers.utils.hub transformers.dynamic_module_utils numpy.load numpy.lib numpy.testing "
    "numpy.f2py numpy.ctypeslib numpy.distutils numpy.fromfile numpy.memmap numpy.save numpy.loadtxt "
    "numpy.genfromtxt pandas.eval pandas.io pandas.read_pickle joblib.load joblib.parallel dill "
    "cloudpickle pip setuptools pkg_resources requests httpx aiohttp urllib3 IPython jupyter_client "
    "pexpect paramiko fabric cffi win32api win32com"
)
"""Of packages that models do name, what runs or loads that which it is given."""
_INSIDE = frozenset(
    str.split(
        "os posix nt sys subprocess builtins importlib ctypes socket shutil pty runpy system popen eval exec "
        "__import__ __globals__ __builtins__ __subclasses__ __code__ __loader__ __spec__ __class__ __base__ "
        "__mro__ __dict__ __init__ __call__ __reduce__"
    )
)
"""What no other name may lead to: `torch.serialization.os.system`."""
_ONE_FILE = frozenset(
    str.split(
        "code trace profile platform resource glob types ast dis site token tokenize calendar cmd select "
        "signal statistics string struct queue random copy this"
    )
)
"""Modules of the standard library without submodules, so `code.models.Net` is somebody's own."""


def shortened(module: str) -> str:
    """How the list writes the name of a module: `<bert` for `transformers.models.bert.modeling_bert`."""
    if match := _MODEL_FILE.fullmatch(module):
        return ("<" if match[2] == "modeling" else ">") + match[1]
    return module


@cache
def _list() -> dict[str, str]:
    """Per module, a line `Bert=~Layer ~Model Other; name; name`: of role object, value and reference."""
    text = (files("regraft.files") / "known_names.txt").read_text(encoding="utf-8")
    lines = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {module: names for module, _, names in lines}


@cache
def _listed(module: str) -> dict[str, str]:
    roles = ("object", "value", "reference")
    prefix, equals, rest = _list().get(shortened(module), "").rpartition("=")
    columns = rest.replace("~", prefix if equals else "").split(";")
    return {name: role for role, column in zip(roles, columns, strict=False) for name in column.split()}


def role_of(module: str, name: str) -> str:
    """The role of a name (see above), without regard to what the caller allows."""
    if role := _listed(module).get(name):
        return role
    if (
        module.startswith("torch")
        and name.endswith("Storage")
        and name.isidentifier()
        and module in _STORAGES
    ):
        return "reference"
    root, *inside = [*module.split("."), *name.split(".")]
    if _INSIDE.intersection(inside) or not all(inside):
        return "dangerous"
    full = f"{module}.{name}"
    if root == "regraft" and "." not in name:
        # Our own classes hold what a graft is told; they open and run nothing. A `Layer` holds a function
        # that is called later, and a pickle of ours has it by `read_layer`.
        known = full in _RULES or (name[:1].isupper() and full != "regraft.record.Layer")
        return "unknown" if not known else "object" if name[:1].isupper() else "value"
    if root in sys.stdlib_module_names and (module == root or root not in _ONE_FILE):
        return "dangerous"
    if root.startswith("_") and root != "__main__":  # Python's own too, if not of this version
        return "dangerous"
    return "dangerous" if any(f"{full}.".startswith(f"{loader}.") for loader in _LOADERS) else "unknown"


class Verdicts:
    """The verdicts on one file, or on all files of a folder.

    Attributes:
        unknown: names that are neither known nor dangerous, and how often they are used.
        dangerous: what would be run, in words, and where.
        imports: the packages that loading would import.
        nested: bytes that `torch.load` would be called with, once each; to be read as files.
        has_arrays: whether joblib wrote arrays into a pickle, which other readers do not skip.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self.allow = tuple(allow)
        self.unknown: Counter[str] = Counter()
        self.dangerous: list[str] = []
        self.imports: set[str] = set()
        self.nested: list[bytes | Long] = []
        self.has_arrays = False
        self._nested: set[bytes | Long] = set()
        self._encoded: dict[str, bytes] = {}
        self.where: Callable[[], str] = str
        self._odd: Counter[str] = Counter()
        self._danger_names: dict[int, int] = {}

    @property
    def verdict(self) -> str:
        return DANGEROUS if self.dangerous else UNKNOWN if self.unknown else KNOWN

    def facts(self) -> dict[str, Any]:
        """The verdicts as plain JSON values."""
        return {
            "verdict": self.verdict,
            "dangerous": self.dangerous,
            "unknown": dict(self.unknown),
            "imports": sorted(self.imports),
        }

    def add(self, other: Verdicts, name: str = "") -> None:
        """Take the verdicts on another file in, which is called `name`."""
        self.unknown += other.unknown
        self.dangerous += [f"{name}: {what}" if name else what for what in other.dangerous]
        self.imports |= other.imports

    def danger(self, what: str) -> None:
        if len(self.dangerous) < _LISTED:
            self.dangerous.append(f"{visible(what)} ({visible(self.where())})")

    def unusual(self, what: str) -> None:
        """Note something that no pickler of a known class writes."""
        if len(self.unknown) < 10_000 or what in self.unknown:
            self.unknown[what] += 1

    def name(self, module: str, name: str) -> Name:
        """The name, with its role; to be called when it is first seen."""
        if module.startswith("__torch__."):
            return Name(module, name, "allowed")  # of TorchScript, whose classes no Python module holds
        role = role_of(module, name) if _IMPORTABLE.fullmatch(module) else "odd"
        if role == "unknown" and any(fnmatchcase(f"{module}.{name}", pattern) for pattern in self.allow):
            role = "allowed"
        known = Name(module, name, role)
        if role == "dangerous":
            self._danger_names[id(known)] = len(self.dangerous)
            self.danger(known.full)
        root = module.partition(".")[0]
        if root not in sys.stdlib_module_names:
            self.imports.add(root)
        self.again(known)
        return known

    def again(self, name: Name) -> None:
        """Count a name."""
        if name.role == "unknown":
            self.unusual(name.full)
        elif name.role == "odd":
            self._odd[name.full] += 1

    def whole(self) -> None:
        """A pickle ends as it should: then also names that no module has count; text is full of them."""
        self.unknown += self._odd
        self._odd.clear()

    def call(self, callee: Any, arguments: Any, *, new: bool = False) -> Any:
        """What a call would make, uncalled; the callee is judged with its arguments.

        If `new`, an object is made by `callee.__new__`.
        """
        if type(arguments) is list:
            arguments = tuple(arguments)
        elif type(arguments) is not tuple:
            self.danger(f"{shown(callee)} is called with arguments that are made by another call")
            arguments = ()
        if type(callee) is not Name:
            self.danger(f"what {shown(callee)} returns is called")
            return Call(callee, arguments)
        role = callee.role
        if role == "dangerous":
            at = self._danger_names.get(id(callee), _LISTED)
            if at < len(self.dangerous) and self.dangerous[at].startswith(f"{visible(callee.full)} ("):
                del self.dangerous[at]
                self.dangerous.insert(
                    at, f"{visible(callee.full + shown(arguments))} ({visible(self.where())})"
                )
        elif role == "value":
            # What is called may call a method of an object, and that can be anything in its state.
            for value in arguments:
                if type(value) is Call and getattr(value.callee, "role", "") == "object":
                    self.unusual(f"{callee.full}{shown(arguments)}")
                    break
            if rule := _RULES.get(callee.full):
                return rule(self, callee, arguments)
        elif role == "reference" or (role == "object" and not new):
            self.unusual(f"{callee.full}()")
        return Call(callee, arguments)

    def state(self, target: Any, state: Any) -> None:
        """Judge the state that an object is given."""
        if type(target) is Call and (
            type(target.callee) is not Name or target.callee.role not in ("object", "value")
        ):
            return  # judged already
        what = shown(target.callee) if type(target) is Call else "collections.OrderedDict"
        if type(target) is StatedOrdered or getattr(target, "state", None) is not None:
            self.danger(f"{what} is given a state twice")
        if type(state) is tuple and len(state) == 2 and isinstance(state[1], dict):
            if state[1]:
                self.danger(f"attributes of {what} are set by its slots")
            state = state[0]
        if isinstance(state, dict):
            special = [key for key in state if type(key) is not str or key[:2] == key[-2:] == "__"]
            if special and not _SPECIAL.issuperset(special):
                self.danger(f"the special attribute {shown(special[0])} of {what} is set")
        elif isinstance(target, Ordered) or (target.callee.role == "object" and state is not None):
            self.unusual(f"{what} with a state that is no dictionary")

    def filled(self, target: Call) -> None:
        """Judge that items are put into an object, by its methods."""
        if target.state is not None:
            self.danger(f"items are put into {shown(target.callee)} after its state")
        elif (
            type(target.callee) is Name
            and target.callee.role in ("object", "value")
            and target.callee.full not in _CONTAINERS
            and target.callee.name != "AttributeDict"
        ):
            self.unusual(f"{target.callee.full} with items")


class DangerousFileError(FileError):
    """A file that would run what no model needs, if it were loaded; exit code 3."""

    exit_code = 3

    def __init__(self, verdicts: Verdicts, where: str) -> None:
        listed, more = verdicts.dangerous[:5], len(verdicts.dangerous) - 5
        super().__init__(
            f"suspicious content: {'; '.join(listed)}" + (f", and {more} more" if more > 0 else ""),
            where=where,
            remedy="nothing was run; do not load this file with torch.load(weights_only=False) or pickle",
        )
        self.verdicts = verdicts


class UnknownNamesError(FileError):
    """A file with names that are not known to be harmless; exit code 4."""

    exit_code = 4

    def __init__(self, verdicts: Verdicts, where: str, error: FileError | None = None) -> None:
        listed = [
            visible(name) + (f" ({count} times)" if count > 1 else "")
            for name, count in verdicts.unknown.most_common(5)
        ]
        more = len(verdicts.unknown) - len(listed)
        what = f"unknown names: loading would import and call {', '.join(listed)}"
        what += f", and {more} more" if more > 0 else ""
        pattern = visible(next(iter(verdicts.unknown)).partition(".")[0]) + ".*"
        super().__init__(
            f"{what}; {error.what}" if error else what,
            where=where,
            remedy=f"nothing was run; if you know who made them: --allow '{pattern}'",
        )
        self.verdicts = verdicts


def _literal(value: Any) -> bool:
    return isinstance(value, (str, bytes, int, float, type(None), Long))


def _from_type(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: calls the function, then sets attributes."""
    function, cls, inner, state = (*arguments[:4], None, None, None, None)[:4]
    if type(inner) is not tuple or type(cls) is not Name:
        verdicts.danger(f"{callee.full}{shown(arguments)} calls what cannot be told")
        return Call(callee, arguments)
    if cls.full not in _TENSORS and cls.role not in ("unknown", "allowed", "dangerous"):
        verdicts.unusual(f"{callee.full}({cls.full})")
    verdicts.call(function, inner)
    verdicts.state(Call(callee, ()), state)
    return Call(callee, arguments)


def _argument_is_called(at: int, arguments_at: int | None) -> Callable[..., Any]:
    """A rule for functions that call the function in their argument `at`, with the arguments in another."""

    def rule(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
        if len(arguments) <= max(at, arguments_at or 0):
            verdicts.unusual(f"{callee.full} with {len(arguments)} arguments")
            return Call(callee, arguments)
        inner = arguments[1:] if arguments_at is None else arguments[arguments_at]
        if type(inner) is not tuple:
            verdicts.danger(f"{shown(arguments[at])} is called with arguments that are made by another call")
        else:
            made = verdicts.call(arguments[at], inner, new=arguments_at is None)
            return made if arguments_at is None else Call(callee, arguments)
        return Call(callee, arguments)

    return rule


def _argument_is_class(at: int, classes: frozenset[str] | None = None) -> Callable[..., Any]:
    """A rule for functions that make an object of the class in an argument."""

    def rule(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
        cls = arguments[at] if len(arguments) > at else None
        if type(cls) is not Name:
            verdicts.danger(f"{callee.full} is called with {shown(cls)} in the place of a class")
        elif (
            classes is not None
            and cls.full not in classes
            and cls.role not in ("unknown", "allowed", "dangerous")
        ):
            verdicts.unusual(f"{callee.full}({cls.full})")
        elif classes is None:
            verdicts.call(cls, (), new=True)
        return Call(callee, arguments)

    return rule


def _literals(allowed: Callable[[tuple[Any, ...]], bool]) -> Callable[..., Any]:
    def rule(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
        if not allowed(arguments):
            verdicts.unusual(f"{callee.full}{shown(arguments)}")
        return Call(callee, arguments)

    return rule


def _reconstructor(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    base = arguments[1] if len(arguments) > 1 else None
    if type(base) is not Name or base.full not in _BASES:
        verdicts.danger(f"{callee.full} is called with {shown(base)} in the place of a base")
    return _argument_is_class(0)(verdicts, callee, arguments)


def _attribute(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    owner, name = (*arguments[:2], None, None)[:2]
    if type(owner) is Name and type(name) is str and len(owner.full) + len(name) < 1_000:
        return verdicts.name(owner.module, f"{owner.name}.{name}")
    verdicts.unusual(f"{callee.full}({shown(owner, 1)}, {shown(name, 1)})")
    return Call(callee, arguments)


def _encode(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    """How protocol 2 writes bytes: `_codecs.encode(text, 'latin1')`."""
    text, codec = (*arguments[:2], None, None)[:2]
    if codec not in ("latin1", "latin-1"):
        verdicts.danger(f"{callee.full} is called with the codec {shown(codec)}")
        return Call(callee, arguments)
    if isinstance(text, Long):
        return text.encode()
    if not isinstance(text, str):
        return Call(callee, arguments)
    # The same bytes for the same text: a file could ask for them a million times.
    if text not in verdicts._encoded:
        verdicts._encoded[text] = text.encode("latin-1", "replace")
    return verdicts._encoded[text]


def _nested(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    data = arguments[0] if len(arguments) == 1 else None
    if not isinstance(data, (bytes, Long)):
        verdicts.danger(f"{callee.full} is called with {shown(data)} in the place of bytes")
    elif data not in verdicts._nested:
        verdicts._nested.add(data)
        verdicts.nested.append(data)
    return Call(callee, arguments)


_RULES: dict[str, Callable[..., Any]] = {
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_wrapper_subclass": _argument_is_class(0, _TENSORS),
    "torch.storage._load_from_bytes": _nested,
    **dict.fromkeys(
        ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        _argument_is_class(0, frozenset(["numpy.ndarray"])),
    ),
    **dict.fromkeys(
        ("regraft.record.read_slot", "regraft.record.read_layer"),
        _literals(lambda arguments: all(isinstance(value, (str, tuple)) for value in arguments)),
    ),
    "regraft.graft.weights._ForwardLock": _literals(lambda arguments: arguments == ()),
    "regraft.graft.classes._make": _argument_is_class(0),
    "regraft.graft.classes._make_by": _argument_is_called(0, 1),
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _argument_is_called(0, None),
    "copyreg.__newobj_ex__": _argument_is_class(0),
    "builtins.getattr": _attribute,
    "_codecs.encode": _encode,
    "builtins.type": _literals(lambda arguments: arguments == (None,)),
    **dict.fromkeys(
        ("builtins.bytes", "builtins.bytearray"),
        _literals(lambda arguments: all(isinstance(value, (str, bytes, Long, list)) for value in arguments)),
    ),
    **dict.fromkeys(
        [f"builtins.{name}" for name in ("list", "tuple", "dict", "set", "frozenset")],
        _literals(lambda arguments: all(isinstance(value, (list, tuple, dict)) for value in arguments)),
    ),
    **dict.fromkeys(
        [f"builtins.{name}" for name in ("complex", "float", "int", "str", "bool", "slice", "range")],
        _literals(lambda arguments: all(map(_literal, arguments))),
    ),
}

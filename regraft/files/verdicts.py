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


def shortened(module: str) -> str:
    """How the list writes the name of a module: `<bert` for `transformers.models.bert.modeling_bert`."""
    if match := _MODEL_FILE.fullmatch(module):
        return ("<" if match[2] == "modeling" else ">") + match[1]
    return module


def _table(name: str) -> list[tuple[str, str]]:
    lines = (files("regraft.files") / name).read_text(encoding="utf-8").splitlines()
    parts = (line.partition(":") for line in lines if not line.startswith("#"))
    return [(key, names) for key, _, names in parts]


@cache
def _tables() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The known names of each module, and the dangerous ones by the words that their list has for them.

    A line `Bert=~Layer ~Model Other; name; name` has the roles object, value and reference.
    """
    dangerous: dict[str, set[str]] = {}
    for kind, names in _table("dangerous_names.txt"):
        dangerous.setdefault(kind, set()).update(names.split())
    return dict(_table("known_names.txt")), dangerous


@cache
def _listed(module: str) -> dict[str, str]:
    roles = ("object", "value", "reference")
    prefix, equals, rest = _tables()[0].get(shortened(module), "").rpartition("=")
    columns = rest.replace("~", prefix if equals else "").split(";")
    return {name: role for role, column in zip(roles, columns, strict=False) for name in column.split()}


def role_of(module: str, name: str) -> str:
    """The role of a name (see above), without regard to what the caller allows."""
    if role := _listed(module).get(name):
        return role
    if module in _STORAGES and name.endswith("Storage") and name.isidentifier():
        return "reference"
    root, *inside = [*module.split("."), *name.split(".")]
    dangerous = _tables()[1]
    if dangerous["inside"].intersection(inside) or not all(inside):
        return "dangerous"
    full = f"{module}.{name}"
    if root == "regraft" and "." not in name:
        # Our own classes hold what a graft is told; they open and run nothing. A `Layer` holds a function
        # that is called later, and a pickle of ours has it by `read_layer`.
        known = full in _RULES or (name[:1].isupper() and full != "regraft.record.Layer")
        return "unknown" if not known else "object" if name[:1].isupper() else "value"
    if root in sys.stdlib_module_names and (module == root or root not in dangerous["one_file"]):
        return "dangerous"
    if root.startswith("_") and root != "__main__":  # Python's own too, if not of this version
        return "dangerous"
    loads = any(f"{full}.".startswith(f"{loader}.") for loader in dangerous["loaders"])
    return "dangerous" if loads else "unknown"


class Verdicts:
    """The verdicts on one file, or on all files of a folder.

    Attributes:
        unknown: names that are neither known nor dangerous, and how often they are used.
        dangerous: what would be run, in words, and where.
        imports: the packages that loading would import.
        nested: bytes that `torch.load` would be called with, and whether they were read as a file.
        has_arrays: whether joblib wrote arrays into a pickle, which other readers do not skip.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self.allow = tuple(allow)
        self.unknown: Counter[str] = Counter()
        self.dangerous: list[str] = []
        self.imports: set[str] = set()
        self.nested: dict[bytes | Long, bool] = {}
        self.has_arrays = False
        self.encoded: dict[str, bytes] = {}
        self.where: Callable[[], str] = str
        self._odd: Counter[str] = Counter()

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

    def danger(self, what: str, at: int | None = None) -> None:
        """Add to the list, or say more of what stands there already."""
        at = len(self.dangerous) if at is None else at
        if at < _LISTED:
            self.dangerous[at : at + 1] = [f"{visible(what)} ({visible(self.where())})"]

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
            known.at = len(self.dangerous)
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
            if callee.at >= 0:
                self.danger(callee.full + shown(arguments), callee.at)
                callee.at = -1
        elif role == "value":
            # What is called may call a method of an object, and that can be anything in its state.
            for value in arguments:
                if type(value) is Call and getattr(value.callee, "role", "") == "object":
                    self.unusual(f"{callee.full}{shown(arguments)}")
                    break
            rule = _RULES.get(callee.full)
            if rule and (result := rule(self, callee, arguments)) is not None:
                return result
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


class RefusedError(FileError):
    """A file that would run what no model needs (exit code 3), or whose names are not known (4)."""

    def __init__(self, verdicts: Verdicts, where: str, error: FileError | None = None) -> None:
        if verdicts.dangerous:
            listed, more = verdicts.dangerous[:5], len(verdicts.dangerous) - 5
            what, behind = "suspicious content: " + "; ".join(listed), ""
            remedy = "do not load this file with torch.load(weights_only=False) or pickle"
        else:
            names, more = verdicts.unknown.most_common(5), len(verdicts.unknown) - 5
            told = [visible(name) + (f" ({count} times)" if count > 1 else "") for name, count in names]
            what = "unknown names: loading would import and call " + ", ".join(told)
            behind = f"; {error.what}" if error else ""
            package = visible(next(iter(verdicts.unknown)).partition(".")[0])
            remedy = f"if you know who made them: --allow '{package}.*'"
        what += (f", and {more} more" if more > 0 else "") + behind
        super().__init__(what, where=where, remedy=f"nothing was run; {remedy}")
        self.verdicts, self.exit_code = verdicts, 3 if verdicts.dangerous else 4


def _from_type(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: calls the function, then sets attributes."""
    function, cls, inner, state = (*arguments[:4], None, None, None, None)[:4]
    _class(*_TENSORS)(verdicts, callee, (cls,))
    verdicts.call(function, inner)
    verdicts.state(Call(callee, ()), state)


def _new_object(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Any:
    """`__newobj__(class, *arguments)`."""
    if arguments:
        return verdicts.call(arguments[0], arguments[1:], new=True)
    verdicts.unusual(f"{callee.full} with 0 arguments")
    return None


def _function(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
    """`_make_by(function, arguments, ...)`."""
    if len(arguments) < 2:
        verdicts.unusual(f"{callee.full} with {len(arguments)} arguments")
    else:
        verdicts.call(*arguments[:2])


def _class(*classes: str) -> Callable[..., None]:
    """A rule for functions that make an object of the class that they are given: any one, or one of these."""

    def rule(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
        cls = arguments[0] if arguments else None
        if type(cls) is not Name:
            verdicts.danger(f"{callee.full} is called with {shown(cls)} in the place of a class")
        elif not classes:
            verdicts.call(cls, (), new=True)
        elif cls.full not in classes and cls.role not in ("unknown", "allowed", "dangerous"):
            verdicts.unusual(f"{callee.full}({cls.full})")

    return rule


def _takes(*types: type) -> Callable[..., None]:
    """A rule for functions that may be called with values of these types."""

    def rule(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
        if not all(isinstance(value, types) for value in arguments):
            verdicts.unusual(f"{callee.full}{shown(arguments)}")

    return rule


def _reconstructor(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
    base = arguments[1] if len(arguments) > 1 else None
    if type(base) is not Name or base.full not in _BASES:
        verdicts.danger(f"{callee.full} is called with {shown(base)} in the place of a base")
    _class()(verdicts, callee, arguments)


def _attribute(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> Name | None:
    owner, name = (*arguments[:2], None, None)[:2]
    if type(owner) is Name and type(name) is str and len(owner.full) + len(name) < 1_000:
        return verdicts.name(owner.module, f"{owner.name}.{name}")
    verdicts.unusual(f"{callee.full}({shown(owner, 1)}, {shown(name, 1)})")
    return None


def _encode(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> bytes | Long | None:
    """How protocol 2 writes bytes: `_codecs.encode(text, 'latin1')`."""
    text, codec = (*arguments[:2], None, None)[:2]
    if codec not in ("latin1", "latin-1"):
        verdicts.danger(f"{callee.full} is called with the codec {shown(codec)}")
    elif isinstance(text, Long):
        return text.encode()
    elif isinstance(text, str):
        # The same bytes for the same text: a file could ask for them a million times.
        if text not in verdicts.encoded:
            verdicts.encoded[text] = text.encode("latin-1", "replace")
        return verdicts.encoded[text]
    return None


def _file(verdicts: Verdicts, callee: Name, arguments: tuple[Any, ...]) -> None:
    """`torch.load` of bytes."""
    data = arguments[0] if len(arguments) == 1 else None
    if isinstance(data, (bytes, Long)):
        verdicts.nested.setdefault(data, False)
    else:
        verdicts.danger(f"{callee.full} is called with {shown(data)} in the place of bytes")


_RULES: dict[str, Callable[[Verdicts, Name, tuple[Any, ...]], Any]] = {
    **dict.fromkeys(("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"), _from_type),
    "torch._utils._rebuild_wrapper_subclass": _class(*_TENSORS),
    "torch.storage._load_from_bytes": _file,
    "numpy.core.multiarray._reconstruct": _class("numpy.ndarray"),
    "numpy._core.multiarray._reconstruct": _class("numpy.ndarray"),
    **dict.fromkeys(("regraft.record.read_slot", "regraft.record.read_layer"), _takes(str, tuple)),
    "regraft.graft.weights._ForwardLock": _takes(),
    "regraft.graft.classes._make": _class(),
    "regraft.graft.classes._make_by": _function,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _new_object,
    "copyreg.__newobj_ex__": _class(),
    "builtins.getattr": _attribute,
    "_codecs.encode": _encode,
    "builtins.type": _takes(type(None)),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), _takes(str, bytes, Long, list)),
    **{f"builtins.{name}": _takes(list, tuple, dict) for name in str.split("list tuple dict set frozenset")},
    **{
        f"builtins.{name}": _takes(str, bytes, int, float, type(None), Long)
        for name in str.split("complex float int str bool slice range")
    },
}
"""How a call of a `value` is judged with its arguments; what a rule returns stands for the call."""

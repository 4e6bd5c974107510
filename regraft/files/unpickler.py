"""An inert unpickler: the standard library's own, in which names, calls and states become notes.

Python has two unpicklers, one in C and one in Python, and they differ. `torch.load` runs the one in C. This
one accepts all that either does (frames in frames, octal integers, text after a NUL), and where both would
stop at a type it goes on: what would run is never behind the point at which it stops. Where a read crosses
the end of a frame, the one in C drops what is left of the frame if it reads from `io.BytesIO`, and keeps it
if it reads from bytes or from a file on disk: such a pickle is refused. So is one that ends within a frame,
behind which the one in C goes on; a frame that is longer than the file, which it refuses, is read.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

from regraft.errors import FileError
from regraft.files.tensors import ARRAY, array_bytes
from regraft.files.values import OPAQUE, SET, Call, Long, Name, Opaque, Ordered, StatedOrdered, Storage, shown
from regraft.files.verdicts import Verdicts

_NAME_LENGTH = 1_000
_NAME_STEPS = 25
"""What judging one more name costs, in opcodes."""
_LINE_LENGTH = 2**20
_INLINE = 2**16
"""Longer texts and bytes stay in the file; only where they are is noted."""
_INTEGER_BYTES = 512
_HASHES_ALIKE = 2**60
"""Integers above can be chosen so that all of them hash to the same number."""
_LITERALS = (dict, list, tuple, str, bytes, int, float, bool, type(None), Long)
_FOUR_BYTES = struct.Struct("<I").unpack
_DICT_KEYS = (str, bool, bytes, type(None))


class Budget:
    """The steps that reading one file may take: an opcode, a member of an archive or a module is some.

    A file of `size` bytes that is no trap needs fewer than `size`; the rest is for compressed archives.
    """

    def __init__(self, size: int) -> None:
        self.left = min(size, 30_000_000) + 300_000

    def charge(self, steps: int) -> None:
        """Raise FileError once the file has asked too much."""
        self.left -= steps
        if self.left < 0:
            raise FileError("the file asks for more work than any model of its size, so it was left")


_Unpickler: Any = vars(pickle)["_Unpickler"]
_Stop: Any = vars(pickle)["_Stop"]


class InertUnpickler(_Unpickler):  # type: ignore[misc]
    """Reads one pickle from `file` at its position; the verdicts on what it finds go to `verdicts`.

    With `arrays`, the arrays that joblib writes between the opcodes are skipped, as joblib does.
    """

    def __init__(
        self, file: Any, size: int, budget: Budget, verdicts: Verdicts, *, arrays: bool = True
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.file, self.size, self.budget, self.verdicts = file, size, budget, verdicts
        self.skips_arrays = arrays
        self.names: dict[tuple[str, str], Name] = {}

    def load(self) -> Any:
        """The value that the pickle describes; or FileError: it is cut short, no pickle, or asks too much."""
        self.read, self.readline = self.file.read, self._line
        self.frame_end = 0
        self.near: list[Any] = []  # the memo: a list of what stands in order, as nearly all does,
        self.far: dict[int, Any] = {}  # and the rest
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        dispatch, read, charge = self.dispatch, self.read, self.budget.charge
        try:
            while True:
                charge(64)
                for _ in range(64):
                    dispatch[read(1)[0]](self)
        except _Stop as stop:
            self.verdicts.whole()
            return stop.value
        except (FileError, OSError, MemoryError):
            raise
        except Exception as error:  # whatever Python's own unpickler and `struct` raise at what is no pickle
            end = self.file.tell() >= self.size
            what = "it ends before the model does" if end else "it is no whole pickle"
            raise FileError(f"the file is damaged, or no PyTorch file: {what}") from error
        finally:
            self.__dict__.clear()  # it refers to itself, and what is remembered can be a million values

    def _line(self) -> bytes:
        start = self.file.tell()
        line: bytes = self.file.readline(_LINE_LENGTH)
        if len(line) == _LINE_LENGTH:
            raise ValueError
        self._stay_in_frame(start, start + len(line))
        return line

    def _stay_in_frame(self, start: int, end: int) -> None:
        """Refuse a read that begins in a frame and ends behind it."""
        if start < self.frame_end < end:
            self.verdicts.danger("a pickle reads across the end of a frame, which readers do differently")
            raise ValueError

    def _read_in_frame(self, size: int) -> bytes:
        start = self.file.tell()
        self._stay_in_frame(start, start + size)
        data: bytes = self.file.read(size)
        return data

    def load_frame(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        start = self.file.tell()
        if start < self.frame_end:  # a frame in a frame, which C takes if it ends there
            self._stay_in_frame(start, start + length)
        else:
            self.frame_end = start + length
            self.read = self._read_in_frame  # pickles without frames read without this check

    def load_stop(self) -> None:
        # The next pickle may begin behind the frame.
        self._stay_in_frame(self.file.tell(), self.frame_end + 1)
        raise _Stop(self.stack.pop())

    def find_class(self, module: str, name: str) -> Name:
        if self.proto < 3:  # as CPython does: names of Python 2
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        known = self.names.get((module, name))
        if known is None:
            if len(module) + len(name) > _NAME_LENGTH:
                raise ValueError
            self.budget.charge(_NAME_STEPS)
            known = self.names[module, name] = self.verdicts.name(module, name)
            self.verdicts.has_arrays |= known.full == ARRAY
        else:
            self.verdicts.again(known)
        return known

    def load_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is str and type(module) is str:
            self.append(self.find_class(module, name))
        # Can a call have made a `str`, of which alone CPython makes a name? An object is none.
        elif any(
            type(part) is Call and getattr(part.callee, "role", "") not in ("object", "unknown")
            for part in (name, module)
        ):
            self.verdicts.danger("a name is imported that is made by a call")
            self.append(Name("computed", "name", "dangerous"))
        else:
            raise TypeError

    def get_extension(self, code: int) -> None:
        self.verdicts.unusual(f"whatever is registered as extension {code}")
        self.append(Name("extension", str(code), "unknown"))

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) > 1 and pid[0] == "module":
            return pid[1]  # a class, with the text of its source
        return Storage(pid)

    def load_reduce(self) -> None:
        stack = self.stack
        arguments, callee = stack.pop(), stack[-1]
        if type(callee) is Name and callee.full == "collections.OrderedDict" and arguments == ():
            stack[-1] = Ordered()  # a dozen in every module
        else:
            stack[-1] = self.verdicts.call(callee, arguments)

    def load_newobj(self) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        self.append(self.verdicts.call(callee, arguments, new=True))

    def load_newobj_ex(self) -> None:
        keywords, arguments, callee = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords:
            self.verdicts.unusual(f"{shown(callee)}.__new__ with keywords")
        self.append(self.verdicts.call(callee, arguments, new=True))

    def _instantiate(self, klass: Any, args: Any) -> None:  # INST and OBJ
        self.append(self.verdicts.call(klass, args, new=not args))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Name:
            self.verdicts.danger(f"{target.full} itself is changed")
        elif isinstance(target, Ordered):
            self.verdicts.state(target, state)
            target.__class__ = StatedOrdered
        elif type(target) is Call:
            self.verdicts.state(target, state)
            target.state = state
            if self.verdicts.has_arrays and self.skips_arrays and _is_array(target):
                self._skip_array(state)
        elif type(target) not in _LITERALS:
            self.verdicts.danger(f"{shown(target)} is given a state")

    def _skip_array(self, state: Any) -> None:
        self._stay_in_frame(self.file.tell(), self.frame_end + 1)
        try:
            size = array_bytes(state)
        except ValueError:
            self.verdicts.unusual("an array of joblib whose size cannot be told")
            raise
        if size is None:
            InertUnpickler(self.file, self.size, self.budget, self.verdicts, arrays=False).load()
            return
        padding = 0 if state.get("numpy_array_alignment_bytes") is None else self.file.read(1)[0]
        if self.file.seek(padding + size, io.SEEK_CUR) > self.size:
            raise EOFError

    def _items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif type(target) is Call:
            self.verdicts.filled(target)
            target.entries = target.entries or []
            target.entries.append(items)
        elif type(target) is Name and items:
            self.verdicts.danger(f"{target.full} itself is changed")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._items([key, value])

    def load_setitems(self) -> None:
        self._items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._items(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Call:
            self.verdicts.filled(target)
        elif isinstance(target, (Name, Ordered)) and items:
            self.verdicts.danger(f"a method of {shown(target)} is called by appending to it")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    load_additems = load_appends

    def load_empty_set(self) -> None:
        self.append(Call(SET, ()))

    def load_frozenset(self) -> None:
        self.append(Call(SET, (self.pop_mark(),)))

    def load_next_buffer(self) -> None:
        self.append(OPAQUE)

    def load_readonly_buffer(self) -> None:
        pass

    def _digits(self) -> bytes:
        """A line as the C unpickler takes numbers from it: up to the first NUL."""
        return self._line()[:-1].split(b"\0")[0]

    def _put(self, index: int) -> None:
        if index == len(self.near):
            self.near.append(self.stack[-1])
            self.far.pop(index, None)
        else:
            memo: Any = self.near if 0 <= index < len(self.near) else self.far
            memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.append(self.near[index] if 0 <= index < len(self.near) else self.far[index])

    def load_put(self) -> None:
        self._put(int(self._digits()))

    def load_binput(self) -> None:
        self._put(self.read(1)[0])

    def load_long_binput(self) -> None:
        (index,) = _FOUR_BYTES(self.read(4))
        if index == len(self.near) and not self.far:  # as nearly always: 2.5 million in a large file
            self.near.append(self.stack[-1])
        else:
            self._put(index)

    def load_memoize(self) -> None:
        self._put(len(self.near) + len(self.far))

    def load_get(self) -> None:
        self._get(int(self._digits()))

    def load_binget(self) -> None:
        index, near = self.read(1)[0], self.near
        self.append(near[index] if index < len(near) else self.far[index])

    def load_long_binget(self) -> None:
        self._get(_FOUR_BYTES(self.read(4))[0])

    def load_int(self) -> None:
        line = self._digits()
        self.append(line == b"01" if line in (b"00", b"01") else _number(int, line, 0))

    def load_long(self) -> None:
        self.append(_number(int, self._digits().removesuffix(b"L"), 0))

    def load_float(self) -> None:
        self.append(_number(float, self._digits()))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)


def _counted(width: int, convert: Callable[[bytes], Any]) -> Callable[[InertUnpickler], None]:
    """A step that pushes as many bytes as the next `width` bytes say, converted."""

    def load(self: InertUnpickler) -> None:
        size = int.from_bytes(self.read(width), "little")
        if size <= _INLINE:
            data = self.read(size)
            if len(data) != size:
                raise EOFError
            self.append(convert(data))
            return
        start = self.file.tell()
        if size > self.size - start:
            raise EOFError
        self._stay_in_frame(start, start + size)
        self.file.seek(size, io.SEEK_CUR)
        self.append(Long(self.file, start, size))

    return load


def _text(data: bytes) -> str:
    return str(data, "utf-8", "backslashreplace")


def _integer(data: bytes) -> Any:
    return int.from_bytes(data, "little", signed=True) if len(data) <= _INTEGER_BYTES else OPAQUE


for _name, _step in list(vars(InertUnpickler).items()):
    if _name.startswith("load_"):
        InertUnpickler.dispatch[getattr(pickle, _name[5:].upper())[0]] = _step
for _code, _width, _convert in (
    *((pickle.BINUNICODE, 4, _text), (pickle.SHORT_BINUNICODE, 1, _text), (pickle.BINUNICODE8, 8, _text)),
    *((pickle.BINSTRING, 4, _text), (pickle.SHORT_BINSTRING, 1, _text)),
    *((pickle.BINBYTES, 4, bytes), (pickle.SHORT_BINBYTES, 1, bytes), (pickle.BINBYTES8, 8, bytes)),
    *((pickle.BYTEARRAY8, 8, bytes), (pickle.LONG1, 1, _integer), (pickle.LONG4, 4, _integer)),
):
    InertUnpickler.dispatch[_code[0]] = _counted(_width, _convert)


def _number(convert: Callable[..., Any], line: bytes, *base: int) -> Any:
    try:
        return convert(line, *base) if len(line) <= _INTEGER_BYTES else OPAQUE
    except ValueError:
        return OPAQUE  # the C unpickler takes more


def _is_array(target: Call) -> bool:
    return ARRAY in [value.full for value in (target.callee, *target.arguments[:1]) if type(value) is Name]


def _key(value: Any) -> Any:
    """The value as a key: as it is where its hash is cheap, else a new one."""
    if type(value) in _DICT_KEYS or (type(value) is int and -_HASHES_ALIKE < value < _HASHES_ALIKE):
        return value
    return Opaque()

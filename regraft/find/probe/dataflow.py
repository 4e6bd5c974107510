"""Where values of a forward come from and where they go: sums, reads, and what each axis is.

A recorder of the ledger. Each operation of the training forward makes a `Value` of each tensor that it
returns: whether it is a sum that its operand is a term of, whether a later operation reads it, and which axes
it shares with what it was made of. So it is seen, and not guessed, that a block adds to its input, that a
result is added to something else, that nothing reads an output, and which axis holds the channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from regraft.find.probe.products import storage_of
from regraft.find.tensor_io import first_tensor

BATCH, CHANNEL, POSITION, PACKED = "batch", "channel", "position", "packed"
BLOCK, BRANCH = "block", "branch"
_ADDS = frozenset({"add", "add_", "sub", "sub_", "index_add", "index_add_", "_index_put_impl_", "index_put_"})
_SAME = frozenset({"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "copy_", "to", "fill"})
_SCALED = frozenset(
    f"{name}{mark}"
    for name in ("mul", "div", "neg", "native_dropout", "dropout", "masked_fill", "relu", "sum", "mean")
    for mark in ("", "_")
) | {"mm", "bmm", "index", "index_select", "gather", "where", "cat", "stack", "linear", "matmul"}
"""Operators whose result is zero where an operand is."""
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "linear": (0, 1), "_addmm_activation": (1, 2)}
_CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution")
_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten")
_SOFTMAX = ("_softmax", "softmax", "_safe_softmax")
_ROWS = ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "native_group_norm")
_LAYERS = {*_PRODUCTS, *_CONVOLUTIONS, "embedding", "bmm", "baddbmm"}
_MOVES = ("mean", "sum", "amax")


@dataclass(eq=False)
class Cell:
    """One axis, wherever it goes; axes that are found to be the same share a cell.

    Attributes:
        roles: what it is, as operations have treated it.
        split: into which axes a reshape split it, by their sizes.
    """

    roles: set[str] = field(default_factory=set)
    split: dict[tuple[int, ...], tuple[Cell, ...]] = field(default_factory=dict)
    _same: Cell | None = None

    def root(self) -> Cell:
        cell = self
        while cell._same is not None:
            cell = cell._same
        return cell

    def join(self, other: Cell) -> None:
        """Both are the same axis."""
        mine, others = self.root(), other.root()
        if mine is not others:
            others._same = mine
            mine.roles |= others.roles
            mine.split = {**others.split, **mine.split}


Atoms = tuple[tuple[Cell, int], ...]
"""What an axis is made of, each part with its size: several if it is flattened, none if its size is 1."""


@dataclass(eq=False)
class Value:
    """What one tensor held at one time.

    Attributes:
        axes: of each axis, what it is made of.
        inputs: the model's inputs that it depends on, by number.
        terms: what it is the sum of; itself in another place, if that is one value.
        summed: whether its terms are several.
        parents: values that it is zero with; `operands`, all that it is made of.
        read: whether an operation read it that does not add it to something else.
        added: what it was added to, itself or scaled.
        scores: whether it is made of products of two activations; `weights`, of a softmax of those,
            which is over the last axis if `keys_last`.
        attends: whether it is such weights, (..., queries, keys), that multiply values.
        channel: the axis that the nearest linear layer, convolution or table has made.
    """

    axes: tuple[Atoms, ...]
    inputs: frozenset[int] = frozenset()
    terms: tuple[Value, ...] = ()
    summed: bool = False
    parents: tuple[Value, ...] = ()
    operands: tuple[Value, ...] = ()
    read: bool = False
    added: list[Value] = field(default_factory=list)
    scores: bool = False
    weights: bool = False
    keys_last: bool = False
    attends: bool = False
    channel: Cell | None = None

    def use(self, other: Value | None = None) -> None:
        """An operation read it, or added it to `other`."""
        stack, seen = [self], set()
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if other is None:
                value.read = True
            else:
                value.added.append(other)
            stack += value.parents

    def sum_with(self, term: Value) -> bool:
        """Whether it is a sum of which `term` is one."""
        stack, seen = [(self, False)], set()
        while stack:
            value, summed = stack.pop()
            if value is term and summed:
                return True
            if (id(value), summed) not in seen:
                seen.add((id(value), summed))
                stack += [(part, summed or value.summed) for part in value.terms]
        return False

    def depends_on(self, other: Value) -> bool:
        """Whether it is made of `other`, among the rest."""
        stack, seen = [self], {id(self)}
        while stack:
            value = stack.pop()
            if value is other:
                return True
            fresh = [one for one in value.operands if id(one) not in seen]
            seen |= {id(one) for one in fresh}
            stack += fresh
        return False


@dataclass
class _Run:
    """One run of a module: what went in, what came out by field, and whether it wrote to what went in."""

    given: Value | None
    returned: dict[str, Value]
    wrote: bool = False


class Dataflow:
    """Records values; `fields` are parts of outputs that are asked for, beside the first ones."""

    def __init__(self, fields: Iterable[str] = ()) -> None:
        self.fields = {"", "0", "1", "2", *fields}
        self.start({})

    def start(self, state: Mapping[str, Tensor]) -> None:
        """A forward begins; forget an earlier one."""
        del state
        self._values: dict[Any, tuple[int, Value]] = {}
        self._writes: dict[StorageWeakRef, int] = {}
        self._entered: list[tuple[nn.Module, Value | None, StorageWeakRef | None, int]] = []
        self.runs: dict[int, list[_Run]] = {}
        self.calls: dict[tuple[int, str, str], list[Value]] = {}
        self.lookups: dict[int, list[Value]] = {}
        self.inputs: list[Value] = []
        self._unseen = False

    def add(self, part: Dataflow) -> None:
        """Take over what was recorded of a part of the model, run by itself."""
        self.runs |= part.runs
        self.calls |= part.calls
        self.lookups |= part.lookups
        self.inputs += part.inputs
        self._unseen |= part._unseen

    def begin(self, args: Any, kwargs: Any) -> None:
        """What the model is given."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                value = self.value(leaf)
                value.inputs = frozenset({len(self.inputs)})
                self.inputs.append(value)

    def end(self, returned: Any) -> None:
        """What the model returns is read."""
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self.value(leaf).use()
            elif leaf is not None and not isinstance(leaf, (int, float, str)):
                self._unseen = True  # what such an object holds is not seen

    def enter(self, module: nn.Module, given: Any) -> None:
        """A module's forward begins."""
        tensor = _first(given, "")
        value = None if tensor is None else self.value(tensor)
        storage = None if tensor is None else storage_of(tensor)
        writes = self._writes.get(storage, 0) if storage is not None else 0
        self._entered.append((module, value, storage, writes))

    def leave(self, module: nn.Module, given: Any, returned: Any) -> None:
        """It ends: from here on its output is a value of its own, of which later reads are counted."""
        while self._entered and self._entered[-1][0] is not module:
            self._entered.pop()
        if not self._entered:
            return
        _, value, storage, writes = self._entered.pop()
        wrote = storage is not None and self._writes.get(storage, 0) != writes
        results: dict[str, Value] = {}
        for name in self.fields if not isinstance(returned, Tensor) else ("",):
            tensor = _first(returned, name)
            if tensor is not None:
                old = self.value(tensor)
                same = next((one for one in results.values() if one is old), None)
                links = dict.fromkeys(("terms", "parents", "operands"), (old,))
                results[name] = same or self._set(tensor, self._like(old, **links))
        _declared(module, given, value, results.get(""))
        self.runs.setdefault(id(module), []).append(_Run(value, results, wrote))

    def call(self, owner: nn.Module, op: str, node: str, x: Any) -> None:
        """A function that drops is called on `x`."""
        if isinstance(x, Tensor):
            self.calls.setdefault((id(owner), op, node), []).append(self.value(x))

    def record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: nn.Module
    ) -> None:
        """One operation ran."""
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [self.value(tensor) for tensor in tensors]
        if name == "embedding":
            self.lookups.setdefault(id(module), []).append(values[1])
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not returned:
            for value in values:
                value.use()
            return
        made = [self._made(func, name, args, kwargs, values, tensor) for tensor in returned]
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                storage = storage_of(tensor)
                if storage is not None:
                    self._writes[storage] = self._writes.get(storage, 0) + 1
        for tensor, value in zip(returned, made, strict=True):
            self._set(tensor, value)
        self._note_uses(name, args, values, func)

    def _note_uses(self, name: str, args: tuple[Any, ...], values: list[Value], func: Any) -> None:
        if name in _ADDS and len(values) > 1:
            values[0].use(values[-1])
            values[-1].use(values[0])
        elif name in _ADDS and any(isinstance(one, (int, float)) and one == 0 for one in args[:2]):
            return  # sum() begins with 0
        elif name.startswith("new_") or name.endswith("_like"):
            return  # of the shape alone
        elif not (name in _SAME or name in _SCALED or func.is_view or name in _RESHAPES):
            for value in values:
                value.use()

    def _made(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: list[Value],
        result: Tensor,
    ) -> Value:
        inputs = frozenset().union(*(value.inputs for value in values))
        made = Value(_axes(func, name, args, values, result), inputs, operands=tuple(values))
        if not values:
            return made
        first = values[0]
        if name in _ADDS and len(values) > 1 and kwargs.get("alpha", 1) == 1:
            made.terms, made.summed = ((first,) if name.startswith("sub") else (first, values[-1])), True
        elif name == "copy_" and len(values) > 1:
            made.terms = made.parents = (values[-1],)
        elif name in _SAME or (func.is_view or name in _RESHAPES):
            whole = result.numel() == math.prod(_sizes(first.axes))
            made.terms, made.parents = ((first,) if whole else ()), (first,)
        elif name in _SCALED or name in _ADDS:
            made.parents = tuple(value for value in values if value.inputs)
        if name in _PRODUCTS or name in _CONVOLUTIONS or name == "embedding":
            axis = 1 if name in _CONVOLUTIONS else -1
            made.channel = made.axes[axis][0][0] if made.axes and made.axes[axis] else None
        elif name not in ("bmm", "baddbmm"):
            made.channel = next((value.channel for value in values if value.channel and value.inputs), None)
            pointwise = torch.Tag.pointwise in func.tags or func.is_view or name in (*_SAME, *_RESHAPES)
            softmax = name in _SOFTMAX
            passes = pointwise or "dropout" in name
            made.scores = any(value.scores for value in values) and passes
            made.weights = (softmax and first.scores) or (passes and any(value.weights for value in values))
            made.keys_last = softmax and args[1] in (-1, result.dim() - 1)
        else:
            made.scores = all(value.inputs for value in values[-2:])
            _note_attention(values[-2])
        return made

    def value(self, tensor: Tensor) -> Value:
        """What a tensor holds now."""
        key, storage = _key(tensor)
        writes = self._writes.get(storage, 0) if storage is not None else 0
        held = self._values.get(key)
        if held is not None and held[0] == writes:
            return held[1]
        if held is None:
            return self._set(tensor, Value(tuple(_atoms(size) for size in tensor.shape)))
        return self._set(tensor, self._like(held[1]))  # somebody wrote to its memory by another view

    def _set(self, tensor: Tensor, value: Value) -> Value:
        key, storage = _key(tensor)
        self._values[key] = (self._writes.get(storage, 0) if storage is not None else 0, value)
        return value

    def _like(self, old: Value, **other: Any) -> Value:
        return Value(
            old.axes, old.inputs, scores=old.scores, weights=old.weights, channel=old.channel, **other
        )

    # What is asked of a forward that was recorded.

    def role(self, module: nn.Module) -> str | None:
        """`BLOCK` of a module that adds to its input, `BRANCH` of one whose result is only added to others.

        None if neither was seen in all of its runs.
        """
        runs = self.runs.get(id(module), [])
        if runs and all(
            run.given is not None and "" in run.returned and run.returned[""].sum_with(run.given)
            for run in runs
        ):
            return BLOCK
        return BRANCH if runs and all(_is_branch(run) for run in runs) else None

    def wrote(self, module: nn.Module) -> bool:
        """Whether the module wrote to its input."""
        return any(run.wrote for run in self.runs.get(id(module), []))

    def unread(self, module: nn.Module, part: str) -> bool:
        """Whether no later operation read that part of the module's output."""
        results = [run.returned.get(part) for run in self.runs.get(id(module), [])]
        read = any(result is None or result.read or result.added for result in results)
        return bool(results) and not read and not self._unseen

    def read_parts(self, module: nn.Module) -> list[str]:
        """The parts of its output, of those asked for, that an operation read."""
        parts = {name for run in self.runs.get(id(module), []) for name in run.returned} - {""}
        return sorted(part for part in parts if not self.unread(module, part))

    def inputs_of(self, module: nn.Module) -> list[Value]:
        """What went into the module, at each run."""
        return [run.given for run in self.runs.get(id(module), []) if run.given is not None]

    def outputs_of(self, module: nn.Module, part: str = "") -> list[Value]:
        """What came out of it, at each run."""
        return [run.returned[part] for run in self.runs.get(id(module), []) if part in run.returned]

    def added_together(self, module: nn.Module, other: nn.Module) -> bool:
        """Whether the results of the two modules are terms of one sum."""
        others = self.outputs_of(other)
        return any(
            added.depends_on(result)
            for value in self.outputs_of(module)
            for added in value.added
            for result in others
        )

    def looks_up_input(self, module: nn.Module) -> bool:
        """Whether the module looks up the model's input as it is, and not numbers that are computed."""
        return any(_is_input(value, self.inputs) for value in self.lookups.get(id(module), []))


def _is_input(value: Value, inputs: Sequence[Value]) -> bool:
    while value not in inputs and len(value.terms) == 1:
        value = value.terms[0]
    return value in inputs


def _is_branch(run: _Run) -> bool:
    result = run.returned.get("")
    if result is None or result.read or not result.added:
        return False
    return all(other is not result and other.inputs & result.inputs for other in result.added)


def axes_of(values: list[Value]) -> dict[str, int] | None:
    """The axes of channels and of examples, where all values agree; None if the channels are not known.

    An axis that is known to hold positions, or a packed sequence's, is no axis of examples: then there is
    no `BATCH`.
    """
    found = [_axes_of(value) for value in values]
    return found[0] if found and all(one == found[0] for one in found) else None


def _axes_of(value: Value) -> dict[str, int] | None:
    roles = [set().union(*(cell.root().roles for cell, _ in atoms)) for atoms in value.axes]
    channels = [axis for axis, atoms in enumerate(value.axes) if CHANNEL in roles[axis]]
    nearest = value.channel.root() if value.channel else None
    own = [axis for axis, atoms in enumerate(value.axes) if nearest in [cell.root() for cell, _ in atoms]]
    chosen = own if len(own) == 1 else channels
    axes = {CHANNEL: chosen[0]} if len(chosen) == 1 else {}
    batch = [axis for axis in range(len(roles)) if BATCH in roles[axis]]
    if len(batch) == 1:
        axes[BATCH] = batch[0]
    elif roles and not batch and not {POSITION, PACKED} & roles[0] and axes.get(CHANNEL) != 0:
        axes[BATCH] = 0
    return axes or None


def _declared(module: nn.Module, given: Any, value: Value | None, result: Value | None) -> None:
    """What recurrent networks and attention say of their own axes."""
    if not isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or value is None or result is None:
        return
    packed = isinstance(given[0] if given else None, PackedSequence)
    if len(value.axes) != len(result.axes):
        return
    order = [PACKED] if packed else [POSITION]
    if len(value.axes) == 3:
        order = [BATCH, POSITION] if module.batch_first else [POSITION, BATCH]
    for at, role in enumerate(order):
        for (cell, _), (other, _) in zip(value.axes[at], result.axes[at], strict=False):
            cell.join(other)
            cell.root().roles.add(role)
    last = tuple((Cell({CHANNEL}), size) for _, size in result.axes[-1])
    result.axes = (*value.axes[: len(order)], last)
    result.channel = last[0][0] if last else None


def _axes(
    func: Any, name: str, args: tuple[Any, ...], values: list[Value], result: Tensor
) -> tuple[Atoms, ...]:
    """The axes of what an operation returns."""
    shape = tuple(result.shape)
    fresh = tuple(_atoms(size) for size in shape)
    if not values:
        return fresh
    first = values[0].axes
    if name in _LAYERS:
        return _of_a_layer(name, values, shape)
    if name in _RESHAPES:
        return _reshaped(first, shape)
    if name in _MOVES or func.is_view:
        axes = _moved(name, args, first, shape)
    elif torch.Tag.pointwise in func.tags or name in ("cat", "copy_"):
        axes = _joined(values, shape, fresh)
    else:
        if name in _ROWS and len(first) > 1:
            _mark(first[:1], BATCH)
            _mark(first[1:2], CHANNEL)
        elif name == "native_layer_norm" and len(args[1]) == 1:
            _mark(first[-1:], CHANNEL)
        axes = first
    return _resized(axes, shape) if len(axes) == len(shape) else fresh


def _of_a_layer(name: str, values: list[Value], shape: tuple[int, ...]) -> tuple[Atoms, ...]:
    """The axes after a product, of which one is new."""
    first = values[0].axes
    if name in _PRODUCTS:
        x = values[min(_PRODUCTS[name][0], len(values) - 2)].axes
        return (*x[:-1], _atoms(shape[-1], CHANNEL))
    if name == "embedding":
        return (*values[1].axes, _atoms(shape[-1], CHANNEL))
    if name in _CONVOLUTIONS:
        _mark(first[:1], BATCH)
        _mark(first[1:2], CHANNEL)
        places = tuple(_atoms(size, POSITION) for size in shape[2:])
        return (first[0], _atoms(shape[1], CHANNEL), *places)
    x, y = (value.axes for value in values[-2:])
    return (x[0], x[1], y[2])


def _moved(
    name: str, args: tuple[Any, ...], first: tuple[Atoms, ...], shape: tuple[int, ...]
) -> tuple[Atoms, ...]:
    """The axes in another order, or without those that an operation takes away."""
    rank = len(first)
    if name in ("permute", "transpose", "t"):
        return tuple(first[axis] for axis in _order(name, args, rank))
    if name == "expand":
        grown = (*((),) * (len(shape) - rank), *first)
        return tuple(atoms or _atoms(size) for atoms, size in zip(grown, shape, strict=True))
    if name in ("select", "unbind"):
        gone = {(args[1] if len(args) > 1 else 0) % rank}
    elif rank > len(shape) and len(args) > 1 and args[1]:
        gone = {axis % rank for axis in args[1]}  # sums and means
    else:
        return first
    return tuple(atoms for axis, atoms in enumerate(first) if axis not in gone)


def _resized(axes: tuple[Atoms, ...], shape: tuple[int, ...]) -> tuple[Atoms, ...]:
    """The same axes, of other sizes."""
    made: list[Atoms] = []
    for atoms, old, size in zip(axes, _sizes(axes), shape, strict=True):
        single = ((atoms[0][0], size),) if len(atoms) == 1 and size > 1 else _atoms(size)
        made.append(atoms if old == size else single)
    return tuple(made)


def _joined(values: list[Value], shape: tuple[int, ...], fresh: tuple[Atoms, ...]) -> tuple[Atoms, ...]:
    """The axes of what is made element by element: operands are aligned at the last axis."""
    made = list(fresh)
    for value in (one for one in values if one.inputs):
        for back, atoms in enumerate(reversed(value.axes), 1):
            if back > len(shape) or not atoms:
                continue
            if made[-back] is fresh[-back]:
                made[-back] = atoms
            elif len(made[-back]) == len(atoms) and _sizes([made[-back]]) == _sizes([atoms]):
                for (cell, _), (other, _) in zip(made[-back], atoms, strict=True):
                    cell.join(other)
    return tuple(made)


def _reshaped(axes: tuple[Atoms, ...], shape: tuple[int, ...]) -> tuple[Atoms, ...]:
    """The axes after a reshape: each keeps what it is made of, is merged with others, or split."""
    atoms = [atom for one in axes for atom in one]
    made: list[Atoms] = []
    for at, size in enumerate(shape):
        taken: list[tuple[Cell, int]] = []
        while math.prod(part for _, part in taken) < size and atoms:
            missing = size // math.prod(part for _, part in taken)
            cell, part = atoms.pop(0)
            if part <= missing:
                taken.append((cell, part))
                continue
            sizes = _split_sizes(part, shape[at:])
            if not sizes:
                return tuple(_atoms(one) for one in shape)
            cells = cell.root().split.setdefault(sizes, tuple(Cell() for _ in sizes))
            atoms[:0] = zip(cells, sizes, strict=True)
        made.append(tuple(taken))
    return tuple(made)


def _split_sizes(part: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes: list[int] = []
    for size in shape:
        if math.prod(sizes) == part:
            break
        sizes.append(size)
    kept = tuple(size for size in sizes if size > 1)
    return kept if math.prod(kept) == part and len(kept) > 1 else ()


def _order(name: str, args: tuple[Any, ...], rank: int) -> list[int]:
    if name == "permute":
        return [axis % rank for axis in args[1]]
    order = list(range(rank))
    if rank > 1:
        one, other = (args[1] % rank, args[2] % rank) if name == "transpose" else (0, 1)
        order[one], order[other] = order[other], order[one]
    return order


def _mark(axes: Sequence[Atoms], role: str) -> None:
    for atoms in axes:
        for cell, _ in atoms:
            cell.root().roles.add(role)


def _atoms(size: int, role: str = "") -> Atoms:
    return () if size == 1 else ((Cell({role} if role else set()), int(size)),)


def _note_attention(factor: Value) -> None:
    """The left factor of a product attends, at each stage since the softmax, if it is one's result."""
    stages, value = [], factor if factor.weights else None
    while value is not None:
        stages.append(value)
        value = next((one for one in value.operands if one.weights), None)
    for stage in stages if stages and stages[-1].keys_last else []:
        same = _sizes(stage.axes)[-2:] == _sizes(factor.axes)[-2:]
        stage.attends = same and len(stage.axes) in (3, 4)  # and in no blocks


def _sizes(axes: Sequence[Atoms]) -> tuple[int, ...]:
    return tuple(math.prod(size for _, size in atoms) for atoms in axes)


def _first(value: Any, part: str) -> Tensor | None:
    try:
        return first_tensor(value, part)
    except Exception:  # a module may return what nobody has foreseen
        return None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    given = [*args, *(kwargs[one.name] for one in func._schema.arguments[len(args) :] if one.name in kwargs)]
    changed = [
        value
        for value, one in zip(given, func._schema.arguments, strict=False)
        if one.alias_info is not None and one.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> tuple[Any, StorageWeakRef | None]:
    """What tells values apart: the memory that holds it, and how it is read."""
    storage = storage_of(tensor)
    if storage is None:
        return id(tensor), None
    return (storage, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()), storage

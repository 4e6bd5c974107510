"""Which parameters multiply in a forward: every matrix product, with the parameters that are its weight.

A product is seen at the dispatcher, where `F.linear`, `@`, `einsum`, attention projections and recurrent
kernels have all become a few operators. Its weight is followed back to parameters by storage, so that
views, transposes, casts, parametrizations and stacks of weights still name the parameters they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

_OPERANDS: dict[str, tuple[str, tuple[int, ...]]] = {
    # Operator -> form, and the positions of its two operands, the one that is a layer's weight last.
    "aten::mm": ("matrix", (0, 1)),
    "aten::addmm": ("matrix", (1, 2)),
    "aten::_addmm_activation": ("matrix", (1, 2)),
    "aten::linear": ("matrix", (0, 1)),
    "aten::mkldnn_linear": ("matrix", (0, 1)),
    "aten::matmul": ("matrix", (0, 1)),
    "aten::mv": ("matrix", (0, 1)),
    "aten::addmv": ("matrix", (1, 2)),
    "aten::_scaled_mm": ("matrix", (0, 1)),
    "aten::bmm": ("batched", (0, 1)),
    "aten::baddbmm": ("batched", (1, 2)),
    "aten::addbmm": ("batched", (1, 2)),
    "aten::_grouped_mm": ("grouped", (0, 1)),
    "aten::_scaled_grouped_mm": ("grouped", (0, 1)),
    "aten::_trilinear": ("bilinear", (0, 1)),
    "aten::bilinear": ("bilinear", (0, 2)),
    "aten::convolution": ("convolution", (0, 1)),
    "aten::_convolution": ("convolution", (0, 1)),
}
_AS_STORED = ("aten::linear", "aten::mkldnn_linear")
"""Operators that take a weight as `nn.Linear` stores it, (out, in)."""
_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")
_TRANSPOSED = 6  # its position among a convolution's arguments
_RECURRENT = ("aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::miopen_rnn")
_SELECT = ("aten::topk", "aten::argmax", "aten::argmin")
_COMPARES = (
    "aten::eq",
    "aten::ne",
    "aten::bitwise_and",
    "aten::logical_and",
    "aten::_to_copy",
    "aten::clone",
)
_COUNTS = ("aten::sum", "aten::mean", "aten::any", "aten::all")
_INDEX = ("aten::index", "aten::index_select", "aten::gather", "aten::embedding")
_LEADS_ON = frozenset(
    f"aten::{name}"
    for names in (
        ("_softmax", "_log_softmax", "softmax", "log_softmax", "sum", "mean", "amax"),
        ("cat", "stack", "clone", "_to_copy", "copy_", "contiguous", "constant_pad_nd"),
        ("gather", "scatter", "masked_fill", "index", "slice_scatter"),
    )
    for name in names
)
"""Operators, beside the pointwise ones and views, through which scores reach the choice made by them."""


@dataclass
class Product:
    """One way in which parameters multiply in one module.

    Attributes:
        parameters: names of the parameters that the weight is made of, each its first name.
        module: the innermost module whose forward ran it.
        form: "matrix", "batched", "grouped", "recurrent", "bilinear", "convolution" or "transposed
            convolution".
        weight: the shape of the weight as it multiplied: of one expert, where each is multiplied alone.
        contracted: the axis of the parameter that the product sums over, where it is known: the others are
            those of output units.
        calls: how often it ran.
        shapes: the shapes of the other operand, each once.
        selects: whether its result reaches, with no other product between, a top-k or an argmax whose
            choice is used: a router.
    """

    parameters: tuple[str, ...]
    module: nn.Module | None
    form: str
    weight: tuple[int, ...]
    contracted: int | None = None
    calls: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    selects: bool = False


_Roots = frozenset[str]
_NO_ROOTS: _Roots = frozenset()


class ProductRecorder:
    """Records the products of a forward, one operator at a time.

    `start` comes before the forward, `record` after each of its operators.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        """`parameters`: the names among the state that are parameters; the others are constants."""
        self._names = frozenset(parameters)
        self.start({})

    def start(self, state: Mapping[str, Tensor]) -> None:
        """Forget what was recorded; `state` is what the forward will see, by name."""
        self.lookups: dict[str, list[nn.Module | None]] = {}
        """Parameters that are looked up in, by name: the modules that do."""
        self.used: set[str] = set()
        """Parameters that an operation was given."""
        self._products: dict[tuple[Any, ...], Product] = {}
        # A storage of several parameters (a flattened recurrent network) tells them apart by offset.
        self._parameters: dict[StorageWeakRef, list[tuple[int, int, str]]] = {}
        self._derived: dict[StorageWeakRef, _Roots] = {}
        self._scores: dict[StorageWeakRef, list[Product]] = {}
        self._choices: dict[StorageWeakRef, list[Product]] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._fake = any(isinstance(tensor, FakeTensor) for tensor in state.values())
        seen: set[int] = set()
        for name, tensor in state.items():
            key = storage_of(tensor)
            if name in self._names and id(tensor) not in seen and key is not None:
                seen.add(id(tensor))  # a tied one is known by its first name
                self._parameters.setdefault(key, []).append((*_extent(tensor), name))
                self._shapes[name] = (tuple(tensor.shape), tensor.stride())
        for name, tensor in state.items():
            if name not in self._names and (key := storage_of(tensor)) is not None:
                self._derived.setdefault(key, _NO_ROOTS)

    def add(self, part: ProductRecorder, path: str) -> None:
        """Take over what was recorded of a part of the model, the module at `path`; or of another forward."""
        for key, product in part._products.items():
            names = tuple(f"{path}.{name}".lstrip(".") for name in product.parameters)
            self._products.setdefault((path, *key) if path else key, replace(product, parameters=names))
        self.used.update(f"{path}.{name}".lstrip(".") for name in part.used)
        for name, modules in part.lookups.items():
            self.lookups.setdefault(f"{path}.{name}".lstrip("."), []).extend(modules)

    @property
    def products(self) -> list[Product]:
        """Every product that has run, in the order in which each first did."""
        return list(self._products.values())

    def record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        module: nn.Module | None,
    ) -> None:
        """Take note of one operator that has run.

        Args:
            func: the `torch._ops.OpOverload`.
            args: its arguments.
            kwargs: its keyword arguments.
            result: what it returned.
            module: the innermost module whose forward is running.
        """
        name = func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in given:
            parts = self._parameters.get(storage_of(tensor), ())  # type: ignore[arg-type]
            self.used.update(name for *_, name in parts)
        if self._choices:
            self._choose(func, name, given, returned)
        if name in _SELECT:
            # The choice is made once its indices are used: the largest values alone are a statistic.
            for tensor in returned:
                if not tensor.is_floating_point() and (key := storage_of(tensor)) is not None:
                    self._choices[key] = self._scores_of(given)
            return
        found = list(self._weights(name, func, args, kwargs))
        if found or name in _OPERANDS or name in _RECURRENT:
            run = [self._note(*one, module) for one in found]
            self._start(returned, given, run)
            return
        if name in _INDEX:
            self._look_up(args, returned, module)
        else:
            self._derive(func, given, returned)
        self._lead_on(func, name, given, returned)

    def _choose(self, func: Any, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        """A choice that is compared and counted, as an accuracy is, chooses nothing; any other use does."""
        chosen = [one for tensor in given for one in self._choices.get(storage_of(tensor), ())]  # type: ignore[arg-type]
        if not chosen or func.is_view or name in _COUNTS:
            return
        if name in _COMPARES:
            for tensor in returned:
                if (key := storage_of(tensor)) is not None:
                    self._choices[key] = chosen
            return
        for product in chosen:
            product.selects = True

    def _weights(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor, Tensor | None, int | None]]:
        """The form of a product, its weight, the other operand, and the axis of the weight summed over."""
        if name in _RECURRENT:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            yield from (("recurrent", one, tensors[0], 1) for one in tensors[1:] if one.dim() > 1)
            return
        if name in _OPERANDS:
            form, places = _OPERANDS[name]
            bound = [
                *args,
                *(kwargs[one.name] for one in func._schema.arguments[len(args) :] if one.name in kwargs),
            ]
            x, weight = (bound[place] for place in places)
            if form == "convolution" and bound[_TRANSPOSED]:
                form = "transposed convolution"
            if form == "bilinear" and name == "aten::_trilinear":
                yield form, args[1], args[0], None
            elif self._roots(weight) and weight.dim() > 1:
                yield form, weight, x, None if form == "bilinear" else -1 if name in _AS_STORED else -2
                # Both made of parameters: either an input that is learned (a layer's latents), or, of two
                # whole parameters, factors of a weight.
                if name not in _CONVOLUTIONS and self._is_whole(x) and self._is_whole(weight):
                    yield form, x, weight, -1
            elif self._roots(x) and x.dim() > 1 and name not in _CONVOLUTIONS:
                yield form, x, weight, -1
            return
        if not name.startswith("aten::") and not name.startswith("prims::"):
            # An operator of somebody's own: a stack of experts beside what it multiplies.
            tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
            stacks = [one for one in tensors if one.dim() >= 3 and self._roots(one)]
            others = [one for one in tensors if not self._roots(one) and one.is_floating_point()]
            if others:
                yield from (("grouped", one, others[0], -2) for one in stacks)

    def _note(
        self, form: str, weight: Tensor, other: Tensor | None, summed: int | None, module: nn.Module | None
    ) -> Product | None:
        roots = tuple(sorted(self._roots(weight)))
        if not roots:
            return None
        shape = tuple(weight.shape)
        fresh = Product(roots, module, form, shape, self._axis(roots, weight, summed))
        product = self._products.setdefault((roots, id(module), form, shape), fresh)
        product.calls += 1
        if other is not None and tuple(other.shape) not in product.shapes:
            product.shapes.append(tuple(other.shape))
        return product

    def _axis(self, roots: tuple[str, ...], weight: Tensor, summed: int | None) -> int | None:
        """The axis of the parameter that the axis `summed` of a view of it is; None of a copy."""
        if summed is None or len(roots) > 1 or storage_of(weight) not in self._parameters:
            return None
        shape, stride = self._shapes[roots[0]]
        wanted = (weight.shape[summed], weight.stride()[summed])
        axes = [axis for axis, one in enumerate(zip(shape, stride, strict=True)) if one == wanted]
        return axes[0] if len(axes) == 1 else None

    def _start(self, returned: list[Tensor], given: list[Tensor], run: list[Product | None]) -> None:
        """What a product returns depends on inputs if one of its operands does, and is made of no weight."""
        constant = all(self._known(one) for one in given)
        for tensor in returned:
            if (key := storage_of(tensor)) is None:
                continue
            self._derived.pop(key, None)
            if constant:
                self._derived[key] = _NO_ROOTS
            self._scores[key] = [one for one in run if one is not None]

    def _look_up(self, args: tuple[Any, ...], returned: list[Tensor], module: nn.Module | None) -> None:
        """Rows looked up in a table are no weight; whole matrices taken from a stack of them are."""
        table = args[0]
        roots = self._roots(table)
        for root in roots:
            self.lookups.setdefault(root, []).append(module)
        if roots and table.dim() >= 3:
            self._set(returned, roots)
        elif all(self._known(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)):
            self._set(returned, _NO_ROOTS)

    def _derive(self, func: Any, given: list[Tensor], returned: list[Tensor]) -> None:
        """What is made of parameters and constants alone is a weight, of those parameters."""
        inputs = {key for one in given if (key := storage_of(one)) is not None}
        changed = func._schema.is_mutable
        fresh = [one for one in returned if changed or storage_of(one) not in inputs]  # the others are views
        if not fresh:
            return
        if all(self._known(one) for one in given):
            self._set(fresh, frozenset().union(*(self._roots(one) for one in given)))
        elif changed:
            for one in fresh:
                if (key := storage_of(one)) is not None:
                    self._derived.pop(key, None)

    def _lead_on(self, func: Any, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        """Scores stay scores through pointwise operators, softmax and views."""
        scores = self._scores_of(given)
        if not scores:
            return
        if torch.Tag.pointwise in func.tags or name in _LEADS_ON:
            for tensor in returned:
                if (key := storage_of(tensor)) is not None:
                    self._scores[key] = scores

    def _set(self, tensors: list[Tensor], roots: _Roots) -> None:
        for tensor in tensors:
            key = storage_of(tensor)
            if key is not None and key not in self._parameters:
                self._derived[key] = roots

    def _scores_of(self, tensors: list[Tensor]) -> list[Product]:
        products = [one for tensor in tensors for one in self._scores.get(storage_of(tensor), ())]  # type: ignore[arg-type]
        return list({id(one): one for one in products}.values())

    def _known(self, tensor: Tensor) -> bool:
        """Is the tensor made of parameters and constants alone?"""
        key = storage_of(tensor)
        if key in self._parameters or key in self._derived:
            return True
        # In a fake forward a real tensor is one that the model keeps to itself.
        return self._fake and not isinstance(tensor, FakeTensor)

    def _roots(self, tensor: Any) -> _Roots:
        """The parameters that a tensor is made of; none if it depends on an input."""
        key = storage_of(tensor) if isinstance(tensor, Tensor) else None
        if key is None:
            return _NO_ROOTS
        if key in self._derived and key not in self._parameters:
            return self._derived[key]
        parts = self._parameters.get(key, [])
        start, end = _extent(tensor) if len(parts) > 1 else (0, 0)
        return frozenset(name for low, high, name in parts if len(parts) == 1 or (low < end and start < high))

    def _is_whole(self, tensor: Tensor) -> bool:
        """Is the tensor a parameter itself, or its cast: no transpose, no part?"""
        roots = self._roots(tensor)
        return len(roots) == 1 and self._shapes[next(iter(roots))] == (tuple(tensor.shape), tensor.stride())


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """What tells storages apart; while it is held, no other storage takes the place of one that is gone."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return None


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first element of a tensor in its storage, and the one behind its last, in bytes."""
    size = tensor.element_size()
    start = int(tensor.storage_offset())
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size

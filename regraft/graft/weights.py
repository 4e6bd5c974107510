"""The layer that lends weights: who multiplies by a parameter gets a perturbed one while its forward runs.

The reader of a weight is the smallest module with everything that multiplies by it. Its class gets a forward
that puts a perturbed tensor in the parameter's place, and takes it back when it is done: the same parameters,
keys and optimizer, and one draw per forward, however often the weight is read in it.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from regraft.errors import ModelError
from regraft.graft.calls import checkpoint_marks, inside_checkpoint
from regraft.graft.classes import Namespace
from regraft.graft.slots import require_state, state_methods
from regraft.libraries import is_fsdp, is_sharded
from regraft.planning.plan import Edit
from regraft.record import RECORD, Graft, Layer, Slot
from regraft.variants.registry import complete_options, spec


class _ForwardLock:
    """A lock for the forwards of one module; a copy of the module gets a lock of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardLock, ()


@dataclass
class Lending(Graft):
    """A graft on the reader of a weight.

    Attributes:
        holder: path from the reader to the module that has the weight.
        name: the weight's attribute there.
        lock: two threads in one reader wait for each other.
    """

    holder: str = ""
    name: str = "weight"
    lock: _ForwardLock = field(default_factory=_ForwardLock, compare=False, repr=False)


def lend_graft(edit: Edit) -> Lending:
    """The graft that lends the weight at the edit's site to its reader, perturbed as the edit says."""
    assert edit.site is not None
    found, owner, name = spec(edit.variant), edit.site.owner, edit.attribute
    p = edit.options.get("p")
    options = complete_options(found, edit.options)
    graft = lending(edit.holder, name, edit.variant, None if p is None else float(p), options, edit.to_dict())
    if found.weight_state is not None:
        where = f"{edit.holder}.{name}".lstrip(".").replace(".", "_")
        state = found.weight_state(getattr(owner, name))
        graft.state = {f"{key}__{where}": value for key, value in state.items()}
    return graft


def lending(
    holder: str,
    name: str,
    variant: str,
    rate: float | None,
    options: Mapping[str, Any],
    edit: dict[str, Any] | None = None,
) -> Lending:
    """The graft that lends `name` of the module at `holder`, seen from the reader, perturbed by a variant.

    `options` are the variant's, all but the rate.
    """
    found = spec(variant)
    return Lending(
        Slot("lend", f"{holder}.{name}".lstrip(".")),
        Layer(lend_layer),
        variant,
        rate,
        dict(options),
        edit or {},
        in_eval=found.changes_eval is not None and found.changes_eval(options),
        holder=holder,
        name=name,
    )


def lend_layer(base: type[nn.Module]) -> Namespace:
    """The layer of a reader: its forward sees the weights that are lent to it."""
    method = base.forward

    @functools.wraps(method)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD, {})
        loans = [
            graft
            for graft in record.values()
            if isinstance(graft, Lending) and (self.training or graft.in_eval)
        ]
        if not loans:
            return method(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _forward_compiled(method, self, loans, args, kwargs)
        with loans[0].lock.lock, _lent(self, loans):
            return method(self, *args, **kwargs)

    return {"forward": forward, **state_methods(base)}


def _perturbed(module: nn.Module, graft: Lending, weight: Tensor) -> Tensor:
    function = spec(graft.variant).weight_function
    assert function is not None
    if graft.awaited:
        require_state(graft)
    state = {name.partition("__")[0]: getattr(module, name) for name in graft.state}
    rate = {} if graft.rate is None else {"p": graft.rate}
    perturbed: Tensor = function(weight, **rate, **graft.options, **state)
    return perturbed


def _forward_compiled(
    method: Callable[..., Any], module: nn.Module, loans: list[Lending], args: Any, kwargs: Any
) -> Any:
    """The same for a compiler to trace, which sees plain dictionaries and no threads."""
    back: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for graft in loans:
            holder = module.get_submodule(graft.holder)
            parameters: dict[str, Any] = holder._parameters
            place = parameters if graft.name in parameters else holder.__dict__
            weight = place[graft.name]
            back.append((place, graft.name, weight))
            place[graft.name] = _perturbed(module, graft, weight)
        return method(module, *args, **kwargs)
    finally:
        for place, name, weight in back:
            place[name] = weight


@contextmanager
def _lent(module: nn.Module, loans: list[Lending]) -> Iterator[None]:
    """The perturbed weights are where the module's forward looks for them, and nowhere else."""
    marks = checkpoint_marks()
    with ExitStack() as stack:
        for graft in loans:
            holder = module.get_submodule(graft.holder)
            if graft.name in holder._parameters:
                weight = holder._parameters[graft.name]
                assert weight is not None
                _refuse_sharded(module, graft, weight)
                loan = _Loan(module, graft, weight, _perturbed(module, graft, weight), marks)
                stack.enter_context(_in_parameters(holder, loan))
            elif graft.name in getattr(holder, "parametrizations", ()):
                stack.enter_context(_computed(module, holder, graft))
            else:  # computed by a hook (weight_norm, prune), or a replica's
                place = holder.__dict__
                stack.enter_context(_entry(place, graft.name, _perturbed(module, graft, place[graft.name])))
        for holder in {module.get_submodule(graft.holder): None for graft in loans}:
            if isinstance(holder, nn.RNNBase):
                stack.enter_context(_flat_weights(holder))
        yield


@dataclass
class _Loan:
    reader: nn.Module
    graft: Lending
    weight: Tensor
    tensor: Tensor
    marks: tuple[bool, Any]
    thread: int = field(default_factory=threading.get_ident)


class _LentParameters(dict):  # type: ignore[type-arg]
    """A module's parameters while some of them are lent: reading one as an attribute gives the loan.

    What goes through them all (a state dict, an optimizer) still sees the parameters, and so does any
    other thread.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.parameters = parameters
        self.loans: dict[str, _Loan] = {}

    def __getitem__(self, name: str) -> Any:
        loan = self.loans.get(name)
        if loan is None or loan.thread != threading.get_ident():
            return super().__getitem__(name)
        if checkpoint_marks() != loan.marks and _in_checkpoint():
            raise inside_checkpoint(loan.reader, f"a product with {name}")
        return loan.tensor


_installing = threading.RLock()


@contextmanager
def _in_parameters(holder: nn.Module, loan: _Loan) -> Iterator[None]:
    name = loan.graft.name
    with _installing:
        lent = holder.__dict__["_parameters"]
        if not isinstance(lent, _LentParameters):
            lent = holder.__dict__["_parameters"] = _LentParameters(lent)
        around = lent.loans.get(name)  # a module that runs inside itself
        lent.loans[name] = loan
    try:
        yield
    finally:
        with _installing:
            if around is not None:
                lent.loans[name] = around
            else:
                del lent.loans[name]
            if not lent.loans and holder.__dict__["_parameters"] is lent:
                holder.__dict__["_parameters"] = _given_back(lent)


def _given_back(lent: _LentParameters) -> dict[str, Any]:
    """The dictionary as it was, with what others have set meanwhile."""
    same = len(lent) == len(lent.parameters)
    if not same or any(lent.parameters.get(name) is not value for name, value in lent.items()):
        lent.parameters.clear()
        lent.parameters.update(lent.items())
    return lent.parameters


@contextmanager
def _entry(place: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    was = place[name]
    place[name] = value
    try:
        yield
    finally:
        if place.get(name) is value:
            place[name] = was


@contextmanager
def _computed(module: nn.Module, holder: nn.Module, graft: Lending) -> Iterator[None]:
    """Of a parametrized weight what is lent is the computed one."""
    place: Any = holder.parametrizations
    weight = place[graft.name]()
    with _entry(place._modules, graft.name, _Given(_perturbed(module, graft, weight))):
        yield


class _Given(nn.Module):
    """Stands where a parametrization does: its weight is given."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.__dict__["tensor"] = tensor

    def forward(self) -> Tensor:
        tensor: Tensor = self.__dict__["tensor"]
        return tensor


@contextmanager
def _flat_weights(holder: nn.RNNBase) -> Iterator[None]:
    """Torch's recurrent networks keep their weights in a list too, and remember whose they are."""
    flat = [getattr(holder, name, None) for name in holder._flat_weights_names]
    with ExitStack() as stack:
        stack.enter_context(_entry(holder.__dict__, "_flat_weights", flat))
        if "_flat_weight_refs" in holder.__dict__:
            refs = [None if weight is None else weakref.ref(weight) for weight in flat]
            stack.enter_context(_entry(holder.__dict__, "_flat_weight_refs", refs))
        yield


def _in_checkpoint() -> bool:
    """Is a checkpoint running between the reader's forward and this read?"""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _refuse_sharded(module: nn.Module, graft: Lending, weight: Tensor) -> None:
    """FSDP gathers the weights of a module when that module begins: below the reader is too late."""
    if not is_sharded(weight):
        return
    below = module
    for part in graft.holder.split(".") if graft.holder else ():
        below = below.get_submodule(part)
        if is_fsdp(below):
            raise ModelError(
                f"{type(module).__name__} multiplies by a weight that FSDP gathers only inside it",
                where=f"{graft.holder}.{graft.name}",
                remedy="apply fully_shard to the module that multiplies, not to the one that has the weight",
            )

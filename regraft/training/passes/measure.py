"""What a forward costs and draws, without running it where that can be avoided: on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regraft.find.probe.fake import fake, fake_state
from regraft.find.probe.preserve_state import forgotten, preserving, random_state_kept, silent, unchanged
from regraft.training.passes.fork import generators
from regraft.training.passes.nested import Call, own_caches, tensors_changed
from regraft.training.passes.sharded import gathering_hooks, real_forwards

Forward = Callable[..., Any]
_NO_VALUES = torch.empty(0)
_PER_ELEMENT = 16
"""Operations without a formula are bound by memory: an element costs about as much as this many flops."""


@dataclass
class Counts:
    """What operations cost and drew."""

    cost: float = 0.0  # about how many flops
    draws: int = 0  # how many random numbers on tensors
    scalars: int = 0  # how many draws of a single number, as LayerDrop's, by `torch.rand`


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operations under it cost and draw: one forward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.common, self.own = Counts(), Counts()  # before the passes part, and behind
        self.outputs: Any = None  # without the values of their tensors
        self.elsewhere = False  # whether Python's or numpy's generator was used too
        self.reads_replaced = False  # whether a tensor was read after a change of it in place was left out
        self.decides = False  # whether a module that each pass runs by itself drew a number to decide by
        self._marking = False
        self._replaced: dict[int, Any] = {}

    @property
    def cost(self) -> float:
        """Of the whole forward."""
        return self.common.cost + self.own.cost

    def forked(self) -> None:
        """The forward has come to where the passes part."""
        self.common, self.own = self.own, Counts()

    def replaced(self, tensor: Tensor) -> None:
        """From here on nothing may read `tensor`: an in-place change of it was left out."""
        # Only the dispatcher sees the tensor behind vmap's wrapper, so it is shown to it.
        self._marking = True
        tensor.detach()
        self._marking = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._marking or self._replaced:
            storages = [x.untyped_storage() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self.reads_replaced |= not self._marking and any(id(one) in self._replaced for one in storages)
            if self._marking:
                self._replaced |= {id(storage): storage for storage in storages}  # so that ids stay theirs
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        size = first.numel() if isinstance(first, Tensor) else 0
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.own.cost += formula(*args, **kwargs, out_val=result)
        elif not func.is_view:
            self.own.cost += _PER_ELEMENT * size
        if draws(func) and arguments_of(func, args, kwargs).get("dropout_p") != 0:
            if func._overloadpacket is torch.ops.aten.rand and size == 1 and first.dim() <= 1:
                self.own.scalars += 1
            else:
                self.own.draws += size


def draws(func: Any) -> bool:
    """Whether an operation draws; fused attention, at rate 0 too, is among those that say so."""
    return torch.Tag.nondeterministic_seeded in func.tags


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name, defaults included."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    return {argument.name: argument.default_value for argument in schema} | given


def measured(run: Callable[[Meter], Any]) -> Meter:
    """What `run` costs and draws, with gradients on where they are; all generators are put back."""
    meter = Meter()
    with preserving(random_state_kept()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = _other_generators()
        with meter:
            outputs = run(meter)
        meter.elsewhere = _other_generators() != before
    meter.outputs = tensors_changed(lambda _: _NO_VALUES, outputs)
    meter._replaced.clear()
    return meter


def _other_generators() -> Any:
    *_, python, numpy = generators()
    # Its arrays by their bytes: numpy compares arrays entry by entry.
    return python, None if numpy is None else (numpy[1].tobytes(), *numpy[2:])


@contextmanager
def on_fake_tensors(model: nn.Module, call: Call) -> Iterator[tuple[Forward, Call]]:
    """A forward of `model`, and inputs for it, on fake tensors; the model is as before afterwards."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = list(model.modules())
    with preserving(silent(), forgotten(modules), unchanged(modules)), mode:
        for hooks, key, _ in gathering_hooks(modules):  # the fake parameters are whole
            del hooks[key]  # `unchanged` puts them back
        state = fake_state(model, mode)
        inputs = tensors_changed(lambda tensor: fake(tensor, mode), own_caches(call))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, state, args, kwargs)

        yield forward, inputs


@contextmanager
def on_real_tensors(model: nn.Module, call: Call) -> Iterator[tuple[Forward, Call]]:
    """The same with the model's own tensors; its buffers are put back."""
    with real_forwards(model):
        yield model, own_caches(call)

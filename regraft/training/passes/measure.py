"""What a forward costs and draws, without running it where that can be avoided: on fake tensors."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regraft.find.probe.fake import fake, fake_state
from regraft.find.probe.preserve_state import forgotten, preserving, random_state_kept, silent, unchanged
from regraft.training.passes.caches import own_caches
from regraft.training.passes.nested import leaves, mapped
from regraft.training.passes.sharded import real_forwards, remove_hooks

Forward = Callable[..., Any]
_PER_ELEMENT = 16
"""Operations without a formula are bound by memory: an element costs about as much as this many flops."""


class Counts(NamedTuple):
    """What operations cost and drew.

    Attributes:
        cost: about how many flops.
        draws: how many random numbers were drawn on tensors.
        scalars: how many draws were `torch.rand` of a single number, as LayerDrop's; they are not among
            `draws`.
    """

    cost: float = 0.0
    draws: int = 0
    scalars: int = 0


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operations under it cost and draw: one forward.

    Attributes:
        cost: see `Counts`.
        draws: likewise.
        scalars: likewise.
        common: what came before the fork.
        elsewhere: whether Python's or numpy's generator was used too.
        reads_replaced: whether a tensor was read after an in-place change of it was left out.
        outputs: how many tensors it gave.
        decides: whether a module that each pass runs by itself drew a number, to decide something by it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = 0.0
        self.draws = self.scalars = self.outputs = 0
        self.common = Counts()
        self.elsewhere = self.reads_replaced = self.decides = False
        self._marking = False
        self._replaced: dict[int, Any] = {}

    def forked(self) -> None:
        """The forward has reached the fork."""
        self.common = Counts(self.cost, self.draws, self.scalars)

    def replaced(self, tensor: Tensor) -> None:
        """From here on nothing may read `tensor`: an in-place change of it was left out."""
        # Only the dispatcher sees the tensor behind vmap's wrapper, so it is shown to it.
        self._marking = True
        tensor.detach()
        self._marking = False

    def decided(self) -> None:
        """A module that each pass runs by itself drew a number, to decide something by it."""
        self.decides = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if self._marking:
            for tensor in inputs:
                storage = tensor.untyped_storage()
                self._replaced[id(storage)] = storage  # kept, so that the id stays its own
        elif self._replaced:
            self.reads_replaced |= any(id(tensor.untyped_storage()) in self._replaced for tensor in inputs)
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        size = first.numel() if isinstance(first, Tensor) else 0
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.cost += formula(*args, **kwargs, out_val=result)
        elif not func.is_view:
            self.cost += _PER_ELEMENT * size
        if torch.Tag.nondeterministic_seeded in func.tags and _rate(func, args, kwargs) != 0:
            if func._overloadpacket is torch.ops.aten.rand and size == 1 and first.dim() <= 1:
                self.scalars += 1
            else:
                self.draws += size


def _rate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The rate of fused attention, which is tagged as random at rate 0 too."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "dropout_p":
            return float(value)
    rate = kwargs.get("dropout_p", 0.0 if "scaled_dot_product" in str(func) else None)
    return None if rate is None else float(rate)


def measured(run: Callable[[Meter], Any]) -> Meter:
    """What `run` costs and draws, with gradients on where they are; all generators are put back."""
    meter = Meter()
    with preserving(random_state_kept()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = _other_generators()
        with meter:
            outputs = run(meter)
        meter.elsewhere = _other_generators() != before
    meter.outputs = sum(isinstance(leaf, Tensor) for _, leaf in leaves("", outputs))
    meter._replaced.clear()
    return meter


def _other_generators() -> Any:
    numpy = sys.modules.get("numpy")
    # The state's arrays by their bytes: numpy compares arrays entry by entry.
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), None if state is None else (state[1].tobytes(), *state[2:])


@contextmanager
def on_fake_tensors(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Forward, tuple[Any, ...], dict[str, Any]]]:
    """A forward of `model`, and inputs for it, on fake tensors; the model is as before afterwards."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = list(model.modules())
    with preserving(silent(), forgotten(modules), unchanged(modules)), mode:
        remove_hooks(modules)  # the fake parameters are whole; `unchanged` puts the hooks back
        state = fake_state(model, mode)
        inputs = mapped(lambda _, leaf: fake(leaf, mode), "", own_caches((args, kwargs)))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, state, args, kwargs)

        yield forward, *inputs


@contextmanager
def on_real_tensors(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Forward, tuple[Any, ...], dict[str, Any]]]:
    """The same with the model's own tensors; its buffers are put back."""
    with real_forwards(model):
        yield model, *own_caches((args, kwargs))

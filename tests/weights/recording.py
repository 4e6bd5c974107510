"""The products of one fake forward of a model, recorded without the rest of the probe."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from regraft.find.probe.preserve_state import buffers_kept, forgotten, random_state_kept, silent, unchanged
from regraft.find.probe.products import ProductRecorder


def record_products(model: nn.Module, *args: Any, **kwargs: Any) -> ProductRecorder:
    """On fake tensors; on the real ones where an operator has no rule for fake ones."""
    every = list(model.modules())
    try:
        with silent(), forgotten(every), unchanged(every), random_state_kept():
            return _record(model, args, kwargs, fake_run=True)
    except RuntimeError:
        with buffers_kept(every), unchanged(every), random_state_kept():
            return _record(model, args, kwargs, fake_run=False)


def _record(model: nn.Module, args: Any, kwargs: Any, *, fake_run: bool) -> ProductRecorder:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not fake_run:
            return leaf
        if id(leaf) not in fakes:
            fakes[id(leaf)] = mode.from_tensor(leaf, static_shapes=True)
        return fakes[id(leaf)]

    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state = {name: fake(one) for name, one in every}
    recorder = ProductRecorder(name for name, _ in model.named_parameters())
    recorder.start(state)
    stack: list[nn.Module] = []
    args, kwargs = tree_map(fake, (args, kwargs))
    hooks = [
        register_module_forward_pre_hook(lambda module, _: stack.append(module)),
        register_module_forward_hook(lambda *_: stack.pop() and None, always_call=True),
    ]
    try:
        with ExitStack() as running:
            running.enter_context(torch.no_grad())
            if fake_run:
                running.enter_context(mode)
            running.enter_context(RecordProducts(recorder, lambda: stack[-1] if stack else None))
            functional_call(model, state, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder


def found(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, set[str]]:
    """Parameter -> the forms in which it multiplies."""
    result: dict[str, set[str]] = {}
    for product in record_products(model, *args, **kwargs).products:
        for name in product.parameters:
            result.setdefault(name, set()).add("router" if product.selects else product.form)
    return result


class RecordProducts(TorchDispatchMode):
    """A mode with nothing but a `ProductRecorder`; `current` names the module whose forward is running."""

    def __init__(self, recorder: ProductRecorder, current: Callable[[], nn.Module | None]) -> None:
        super().__init__()
        self.recorder = recorder
        self.current = current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recorder.record(func, args, kwargs or {}, result, self.current())
        return result

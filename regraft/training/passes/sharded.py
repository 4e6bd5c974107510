"""Models sharded by FSDP2: hooks gather a layer's parameters before it runs, and free them after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regraft.find.probe.preserve_state import buffers_kept, preserving, unchanged
from regraft.libraries import is_fsdp, is_sharded, library_class

_GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"


def why_not_shared(model: nn.Module) -> str | None:
    """Why vmap cannot run a model whose parameters are sharded as these are, or None."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # stage 3 empties and numbers them
        return "its parameters are sharded by DeepSpeed"
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    if not sharded:
        return None
    if not is_fsdp(model) or any(p.device_mesh.ndim > 1 for p in sharded):
        return "its parameters are sharded otherwise than by fully_shard over one axis, the model included"
    hook = library_class(_GROUP, "RegisterPostBackwardFunction")
    if not getattr(hook, "generate_vmap_rule", False):
        return "its parameters are sharded, and FSDP2 runs under vmap only in newer versions of torch"
    return None


@contextmanager
def real_forwards(model: nn.Module) -> Iterator[None]:
    """While it runs, forwards leave no trace; a sharded model keeps its parameters as they are gathered."""
    modules = list(model.modules())
    kept = [] if any(map(is_sharded, model.parameters())) else modules
    with preserving(unchanged(kept), buffers_kept(modules)):
        yield


@contextmanager
def gathered_as_ever(model: nn.Module) -> Iterator[None]:
    """While it runs, no function mode sees what the hooks do: they fill memory of their own."""
    before = gathering_hooks(list(model.modules()))
    for hooks, key, hook in before:
        hooks[key] = _unseen(hook)
    try:
        yield
    finally:
        for hooks, key, hook in before:
            hooks[key] = hook


def gathering_hooks(modules: list[nn.Module]) -> list[tuple[Any, int, Any]]:
    """The hooks that gather and free parameters: where each is, under which key, and itself."""
    return [
        (hooks, key, hook)
        for module in modules
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.")
    ]


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return unseen

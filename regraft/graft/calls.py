"""The layer of call sites: functional dropout inside a module's own forward does what its variant does.

While the owner's forward runs, a `TorchFunctionMode` sees each call of a function that drops. It must act
for the innermost module only, so entering one switches the mode around it off until it leaves, and every
descendant that drops by itself gets the same layer with nothing to do, as a boundary.
"""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from regraft.errors import ModelError
from regraft.graft.classes import Namespace
from regraft.graft.compiled import COMPILED, CompiledVariants, variant_key
from regraft.graft.handlers import HANDLERS, CallGrafts, routes
from regraft.ops import MULTI_HEAD
from regraft.planning.plan import Edit
from regraft.record import RECORD, Graft, Layer, Slot
from regraft.variants.registry import complete_options, spec

BOUNDARY = Slot("calls", "boundary")


_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Running(threading.local):
    """The modes that are active in this thread, as torch's function modes are, the innermost last."""

    def __init__(self) -> None:
        self.modes: list[CallMode] = []


_running = _Running()


def call_graft(edit: Edit) -> Graft:
    """The graft that makes the calls of `edit.op` inside the module do what the edit says."""
    found = spec(edit.variant)
    options = complete_options(found, edit.options)
    return Graft(
        Slot("calls", MULTI_HEAD if edit.op == "MultiheadAttention" else edit.op),
        Layer(calls_layer, tuple(sorted({"forward", *edit.methods}))),
        found.name,
        edit.options.get("p"),
        options,
        edit.to_dict(),
        in_eval=found.changes_eval is not None and found.changes_eval(options),
        fixes_eval=edit.fixes_eval,
    )


def boundary_graft(*, disable_fast_path: bool = False) -> Graft:
    """A graft that keeps the mode of the modules around out of a module.

    With `disable_fast_path` it enters a mode of its own: torch's fused fast path of transformer layers is
    not taken where one is active.
    """
    return Graft(BOUNDARY, Layer(calls_layer, ("forward",)), in_eval=disable_fast_path)


def calls_layer(base: type[nn.Module], *methods: str) -> Namespace:
    """The layer of call sites: each of the methods enters the mode of its module's grafts."""
    return {name: wrap_method(getattr(base, name)) for name in methods}


def wrap_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method inside the mode of its module's grafts."""
    variants = CompiledVariants(method)

    @functools.wraps(method)
    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # After a revert somebody may still hold this method (accelerate, a hook): then nothing is grafted.
        record = self.__dict__.get(RECORD, {})
        grafts = [graft for graft in record.values() if graft.slot.kind == "calls"]
        acts = _acts(self, grafts)
        if torch.compiler.is_compiling():
            variant = variants.made.get(variant_key(grafts, self.training))
            if variant is not None and not torch._C._len_torch_function_stack():
                return variant(self, *args, **kwargs)
            with _CompiledMode(self, grafts if acts else []):
                return method(self, *args, **kwargs)
        if not acts:
            with Pause():
                return method(self, *args, **kwargs)
        implementation = getattr(self.__dict__.get("config"), "_attn_implementation", "")
        if "flash" in str(implementation):
            _refuse_hidden(self, grafts, implementation)
        with CallMode(self, grafts):
            return method(self, *args, **kwargs)

    enter.__dict__[COMPILED] = variants
    return enter


def _refuse_hidden(module: nn.Module, grafts: list[Graft], implementation: str) -> None:
    """Raise where attention has come to run in a kernel whose draws cannot be seen from here."""
    for graft in grafts:
        if graft.edit.get("alone") and len(routes(graft)) > 1 and module.training:
            raise ModelError(
                f"attention runs in {implementation!r} by now, which draws its own "
                f"dropout and would pass {graft.edit['after']} by",
                where=graft.edit["path"],
                remedy="model.set_attn_implementation('sdpa') or 'eager'; or revert these sites",
            )


def _acts(module: nn.Module, grafts: list[Graft]) -> bool:
    """Is there anything for a mode to do? A mode costs each torch op under it, so none is entered idly."""
    return any(
        graft.in_eval or graft.fixes_eval or (module.training and graft.slot.op != "boundary")
        for graft in grafts
    )


class Pause:
    """Switches the mode around off while a boundary's forward runs."""

    def __enter__(self) -> None:
        self.outer = _running.modes[-1] if _running.modes else None
        self.was = self.outer is not None and self.outer.on
        if self.outer is not None:
            self.outer.on = False

    def __exit__(self, *_: object) -> None:
        if self.outer is not None:
            self.outer.on = self.was


class CallMode(CallGrafts, TorchFunctionMode):
    """Routes the calls of functions that drop, inside one module's own forward, to its variants."""

    def __init__(self, module: nn.Module, grafts: list[Graft]) -> None:
        TorchFunctionMode.__init__(self)
        CallGrafts.__init__(self, module, grafts)
        self.on = True
        self.pause = Pause()
        self.entered = checkpoint_marks()

    def __enter__(self) -> CallMode:
        self.pause.__enter__()
        _running.modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _running.modes.pop()
        self.pause.__exit__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.on and func in HANDLERS:
            return HANDLERS[func](self, func, args, kwargs)
        return func(*args, **kwargs)

    def refuse_recompute(self, op: str) -> None:
        if self.module.training and torch.is_grad_enabled() and self.entered != checkpoint_marks():
            raise inside_checkpoint(self.module, op)
        if self.entered[0] and not torch.is_grad_enabled() and self.module.training:
            raise inside_checkpoint(self.module, op)


class _CompiledMode(CallMode):
    """The same for a compiler to trace, which may not see a list of running modes change in a checkpoint.

    The modes around are kept out by hiding each function that drops from them, handled or not; compiled
    code pays nothing for the mode.
    """

    def __enter__(self) -> _CompiledMode:
        TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in HANDLERS:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return HANDLERS[func](self, func, args, kwargs or {})


def checkpoint_marks() -> tuple[bool, Any]:
    """What a checkpoint changes around what it runs: gradients are off, or saved tensors are hooked."""
    if torch.compiler.is_compiling():
        return (False, None)
    return torch.is_grad_enabled(), _hooks_now()


def _hooks_now() -> Any:
    """The hooks on saved tensors; before torch 2.8, how many checkpoints are running."""
    if _TOP_HOOKS is not None:
        return _TOP_HOOKS(True)
    frames = traceback.walk_stack(None)
    return sum(frame.f_code.co_filename == checkpoint.__file__ for frame, _ in frames)


def inside_checkpoint(module: nn.Module, op: str) -> ModelError:
    return ModelError(
        f"{type(module).__name__} checkpoints a function of its own that calls {op}: the recomputation "
        "would run without the graft, and the gradients would be wrong",
        where=type(module).__qualname__,
        remedy="switch gradient checkpointing off for this module, or leave the site alone: a rule with None",
    )

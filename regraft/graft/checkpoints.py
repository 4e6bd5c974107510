"""Checkpoints between a module and a call inside it: what is recomputed there runs without the graft."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from regraft.errors import ModelError

_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


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

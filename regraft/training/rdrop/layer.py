"""The layer of passes: a model's forward makes several, and a training call that misses it raises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regraft.errors import ModelError
from regraft.find.walk import inner_model
from regraft.graft.classes import Namespace
from regraft.graft.graph_nodes import all_or_nothing
from regraft.graft.slots import set_graft
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.training.passes.api import is_passing
from regraft.training.passes.fork import fork_path

PASSES = Slot("passes")
_KEY = str(PASSES)
Forward = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def arm(root: nn.Module, passes: Any, fork: str | float | None, then: Callable[[], None]) -> None:
    """Put passes (an `RDrop`) on a model, where they stay if `then` does not fail.

    Refused where the model's forward would never reach them.
    """
    if fork is not None:
        fork_path(root, fork)  # names a module, or raises
    with all_or_nothing() as change:
        change.set(root, PASSES, Graft(PASSES, Layer(passes_layer), options={"passes": passes}))
        if _is_bypassed(root):
            raise ModelError(
                f"{type(root).__name__}'s forward was replaced on the model itself, and would never reach "
                "R-Drop",
                where="accelerate does so in mixed precision, and TRL's trainers",
                remedy="call regraft.rdrop before accelerator.prepare, or before the Trainer is made; with "
                "TRL SFTTrainer(..., callbacks=[RDropCallback()])",
            )
        with change.held.released():
            then()


def armed(model: nn.Module) -> Any:
    """The passes that a model is grafted with, None without."""
    graft: Graft | None = (model.__dict__.get(RECORD) or {}).get(_KEY)
    return None if graft is None else graft.options["passes"]


@contextmanager
def _entered_once(model: nn.Module) -> Iterator[None]:
    """Take accelerate's wrapped forward off the instance while it runs.

    It enters one and the same autocast object each time: entered again inside itself, for a pass or a
    look at the model, the object forgets that autocast was off before, and leaves it on for good.
    """
    wrapped = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def passes_layer(base: type[nn.Module]) -> Namespace:
    """The layer of passes: the forward is theirs, and a training call that misses it raises."""
    own, own_call = base.forward, base.__call__

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        passes = armed(self)
        if passes is None or is_passing(self):
            return own(self, *args, **kwargs)
        with _entered_once(self):
            return passes.forward(self, functools.partial(own, self), (args, kwargs))

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        passes = armed(self)
        if passes is None or not self.training or is_passing(self):
            return own_call(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            passes.before_tracing(self, args, kwargs)
        passes.reached = False
        outputs = own_call(self, *args, **kwargs)
        if not passes.reached and torch.is_grad_enabled():
            raise _not_reached(self)
        return outputs

    return {"forward": forward, "__call__": call}


def _not_reached(model: nn.Module) -> ModelError:
    function = model.__dict__.get("forward")
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    home = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(function).__name__
    return ModelError(
        f"{type(model).__name__} is grafted with R-Drop, and this training forward did not reach it",
        where=f"a forward stands on the model itself, {home}",
        remedy="regraft.revert(model) trains plain; TRL's SFTTrainer takes callbacks=[RDropCallback()] from "
        "regraft.integrations.transformers, others compute_loss_func=regraft.rdrop_criterion(model, ...)",
    )


def _is_bypassed(model: nn.Module) -> bool:
    """Whether a forward on the instance was made of one that is not the grafted class's."""
    function: Any = model.__dict__.get("forward")
    if function is None or "_old_forward" in model.__dict__:
        return False  # accelerate's hooks call `_old_forward`, which every graft binds anew
    while function is not None:
        function = getattr(function, "__func__", function)
        if function is type(model).forward:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def disarm(model: nn.Module) -> nn.Module:
    """The model without its passes; its other grafts stay."""
    root, _ = inner_model(model)
    if _KEY in grafts_of(root):
        set_graft(root, PASSES, None)
    return model

"""Modules whose forward vmap cannot run, as routed experts: which they are, and whether they may be apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from torch import nn

from regraft.find.probe.preserve_state import same_entries, snapshot
from regraft.training.passes.intercept import RecomputeError
from regraft.training.passes.nested import tensors_in
from regraft.training.passes.vmap_escape import pass_by_pass

PerPass = Mapping[type[nn.Module], bool]
"""Classes -> whether their modules run once for each pass even where nothing tells their arguments apart."""


def modules_of(model: nn.Module, per_pass: PerPass) -> dict[nn.Module, bool]:
    """The modules of `model` that are of these classes, itself left out."""
    every = (module for module in model.modules() if module is not model)
    return {module: per_pass[type(module)] for module in every if type(module) in per_pass}


def held_next(error: Exception, model: nn.Module, per_pass: PerPass) -> PerPass | None:
    """`per_pass` with the class of the innermost module that `error` came through and that is not in it.

    None where there is none, where the error is of a part that is recomputed in the backward, or where the
    module has a BatchNorm in training: its running statistics are of one forward, not of one for each pass.
    """
    if isinstance(error, RecomputeError):
        return None
    inside = {id(module) for module in model.modules() if module is not model}
    in_a_pass = False
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        in_a_pass |= frame.f_code is pass_by_pass.__code__
        module: Any = frame.f_locals.get("self")
        if id(module) not in inside or (type(module) in per_pass and (in_a_pass or per_pass[type(module)])):
            continue
        # One that is among them, and failed outside a pass, had nothing yet that told its arguments apart.
        held = {type(module): type(module) in per_pass}
        return None if any(map(_moves_statistics, modules_of(model, held))) else {**per_pass, **held}
    return None


def _moves_statistics(module: nn.Module) -> bool:
    return any(one.training and one._buffers.get("running_mean") is not None for one in module.modules())


@contextmanager
def nothing_kept(modules: Collection[nn.Module]) -> Iterator[None]:
    """Raises a RuntimeError if meanwhile an attribute of the modules, or of those inside, was given a tensor.

    What a forward keeps in its module would be that of the last pass alone.
    """
    every = {id(one): one for module in modules for one in module.modules()}.values()
    before = [(one, snapshot(one)) for one in every]
    yield
    for module, attributes in before:
        for name, value in module.__dict__.items():
            old, entries = attributes.get(name, (None, None))
            same = value is old and (entries is None or same_entries(value, entries))
            if not same and name != "_buffers" and tensors_in(value):
                kept = f"{type(module).__name__}.{name}"
                raise RuntimeError(f"{kept} keeps a tensor, which would be that of one pass")

"""Modules whose forward vmap cannot run, as routed experts: called outside it, once for each pass."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from regraft.find.probe.preserve_state import same_entries, snapshot
from regraft.training.passes.intercept import RecomputeError, Run
from regraft.training.passes.nested import leaves
from regraft.training.passes.vmap_escape import pass_by_pass

PerPass = Mapping[type[nn.Module], bool]
"""Classes -> whether their modules run once for each pass even where nothing tells their arguments apart."""
_lock = threading.Lock()
_here = threading.local()
_original: dict[int, tuple[int, dict[str, Any]]] = {}
"""Of a module by its id: how many threads run it once for each pass, and its own entry `forward`, if any."""


def modules_of(model: nn.Module, per_pass: PerPass) -> dict[nn.Module, bool]:
    """The modules of `model` that are of these classes, itself left out."""
    if not per_pass:
        return {}
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
    for frame in reversed(list(_frames(error.__traceback__))):
        in_a_pass |= frame.f_code is pass_by_pass.__code__
        module = frame.f_locals.get("self")
        if id(module) not in inside or (type(module) in per_pass and (in_a_pass or per_pass[type(module)])):
            continue
        # One that is among them, and failed outside a pass, had nothing yet that told its arguments apart.
        held = {type(module): type(module) in per_pass}
        return None if any(map(_moves_statistics, modules_of(model, held))) else {**per_pass, **held}
    return None


@contextmanager
def run_per_pass(runs: Mapping[nn.Module, Run]) -> Iterator[None]:
    """While a vmapped forward runs, these call the forwards of their modules."""
    outer = getattr(_here, "runs", {})
    _here.runs = runs
    for module in runs:
        _route(module)
    try:
        yield
    finally:
        _here.runs = outer
        for module in runs:
            _restore(module)


def keepsakes(modules: Collection[nn.Module]) -> Callable[[], str | None]:
    """From now on: which attribute of these modules, or of those inside them, was given a tensor.

    What a forward keeps in its module would be that of the last pass alone.
    """
    every = {id(one): one for module in modules for one in module.modules()}.values()
    before = [(one, snapshot(one)) for one in every]

    def written() -> str | None:
        for module, attributes in before:
            for name, value in module.__dict__.items():
                old, entries = attributes.get(name, (None, None))
                kept = value is not old or (entries is not None and not same_entries(value, entries))
                if (
                    kept
                    and name != "_buffers"
                    and any(isinstance(leaf, Tensor) for _, leaf in leaves("", value))
                ):
                    return f"{type(module).__name__}.{name}"
        return None

    return written


def _frames(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _moves_statistics(module: nn.Module) -> bool:
    return any(one.training and one._buffers.get("running_mean") is not None for one in module.modules())


def _route(module: nn.Module) -> None:
    with _lock:
        threads, own = _original.get(id(module), (0, {}))
        if not threads:
            own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
            module.__dict__["forward"] = _routed(module, module.forward)
        _original[id(module)] = threads + 1, own


def _restore(module: nn.Module) -> None:
    with _lock:
        threads, own = _original.pop(id(module))
        if threads > 1:
            _original[id(module)] = threads - 1, own
            return
        del module.__dict__["forward"]
        module.__dict__.update(own)


def _routed(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run: Run | None = getattr(_here, "runs", {}).get(module)
        return plain(*args, **kwargs) if run is None else run(plain, args, kwargs)

    return forward

"""regraft: retrofit regularizers into PyTorch models that already exist."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.errors import RegraftError as RegraftError
    from regraft.find.diff import diff as diff
    from regraft.find.insertion_points import after as after
    from regraft.find.insertion_points import before as before
    from regraft.find.inspect import inspect as inspect
    from regraft.find.trace import trace as trace
    from regraft.graft.apply import apply as apply
    from regraft.graft.apply import grafted as grafted
    from regraft.graft.revert import revert as revert
    from regraft.graft.verify import verify as verify
    from regraft.planning.plan import Plan as Plan
    from regraft.planning.plan import plan as plan
    from regraft.training.max_norm import max_norm as max_norm
    from regraft.training.mc import mc_predict as mc_predict
    from regraft.training.passes.api import multisample_loss as multisample_loss
    from regraft.training.passes.api import stochastic_passes as stochastic_passes
    from regraft.training.penalty import penalty as penalty
    from regraft.training.rdrop.rdrop import rdrop as rdrop
    from regraft.training.rdrop.rdrop import rdrop_criterion as rdrop_criterion
    from regraft.training.rdrop.rdrop_loss import rdrop_loss as rdrop_loss
    from regraft.training.saved import load_plan as load_plan
    from regraft.training.saved import save_plan as save_plan
    from regraft.training.schedule import schedule as schedule
    from regraft.training.suggest import suggest as suggest
    from regraft.variants.registry import register as register
    from regraft.variants.registry import variant as variant

__version__ = "0.2.0"

# Loaded on first use (PEP 562), so that `import regraft` and the command line start without torch.
_HOMES = {
    "RegraftError": "errors",
    "diff": "find.diff",
    "after": "find.insertion_points",
    "before": "find.insertion_points",
    "inspect": "find.inspect",
    "trace": "find.trace",
    "apply": "graft.apply",
    "grafted": "graft.apply",
    "revert": "graft.revert",
    "load_plan": "training.saved",
    "save_plan": "training.saved",
    "verify": "graft.verify",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "penalty": "training.penalty",
    "max_norm": "training.max_norm",
    "mc_predict": "training.mc",
    "multisample_loss": "training.passes.api",
    "stochastic_passes": "training.passes.api",
    "rdrop": "training.rdrop.rdrop",
    "rdrop_criterion": "training.rdrop.rdrop",
    "rdrop_loss": "training.rdrop.rdrop_loss",
    "schedule": "training.schedule",
    "suggest": "training.suggest",
    "register": "variants.registry",
    "variant": "variants.registry",
}
_MODULES = ("errors", "integrations", "nn", "results")
_RESULTS = {
    "Advice",
    "Difference",
    "Inspection",
    "MCPrediction",
    "MaxNorm",
    "RDropOutput",
    "Report",
    "Schedule",
    "Site",
    "Variant",
    "Verification",
}
"""Public here until 0.2; in `regraft.results` since."""

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"regraft.{name}")
    if name in _RESULTS:
        warnings.warn(f"regraft.{name} is regraft.results.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module("regraft.results"), name)
    if name not in _HOMES:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"regraft.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)

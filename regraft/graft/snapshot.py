"""A snapshot of a model: what a graft promises to leave alone, and a revert to restore."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn


@dataclass(eq=False)
class ModelSnapshot:
    """What must be the same after a graft and its way back."""

    parameters: dict[str, nn.Parameter]
    modules: list[nn.Module]
    keys: list[str]
    owners: list[tuple[str, str, str]]
    classes: list[type]
    signature: str
    training: list[bool]
    hooks: list[int]
    attributes: list[list[str]]

    def same_as(self, other: ModelSnapshot) -> bool:
        """Is all of it the same, the parameters to the identity of each?"""
        same = all(self.parameters[name] is other.parameters.get(name) for name in self.parameters)
        mine, others = ({**vars(each), "parameters": len(each.parameters)} for each in (self, other))
        return same and mine == others


def model_snapshot(model: nn.Module) -> ModelSnapshot:
    """The model as it is now."""
    modules = list(model.modules())
    return ModelSnapshot(
        parameters=dict(model.named_parameters(remove_duplicate=False)),
        modules=modules,
        keys=list(model.state_dict()),
        owners=[(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in modules if m._modules],
        classes=[type(module) for module in modules],
        signature=str(inspect.signature(model.forward)),
        training=[module.training for module in modules],
        hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
        attributes=[sorted(vars(module)) for module in modules],
    )

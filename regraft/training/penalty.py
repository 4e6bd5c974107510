"""What the variants of a model add to its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.find.original import grafts_of
from regraft.variants.registry import names, spec
from regraft.variants.spec import Spec


def penalty(model: nn.Module) -> Tensor:
    """The sum of what variants add to the loss: for `concrete`, what keeps its rates from falling to 0.

    Add it to the loss of every step, after the forward. Grafted sites and plain modules of
    `regraft.nn` both count, a shared module once. The rates learned are parameters: an optimizer that
    was built before the graft has to be given them (`optimizer.add_param_group`).

    Args:
        model: any module.

    Returns:
        A tensor without axes, with a gradient to the parameters of the variants. 0 if the model has
        no variant with a penalty.

    Raises:
        ModelError: `model` is no module.

    Example:
        >>> import regraft, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), regraft.nn.ConcreteDropout(0.1))
        >>> loss = net(torch.ones(2, 4)).sum() + regraft.penalty(net)
        >>> loss.backward()
        >>> net[1].concrete_logit.grad is not None
        True
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{type(model).__name__} is not a module", remedy="give the model whose loss is computed"
        )
    terms = [term(module, options) for term, module, options in _terms(model)]
    if not terms:
        return torch.zeros(())
    # A model may lie on several devices; the loss is where the first of them is.
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _terms(model: nn.Module) -> Iterator[tuple[Any, nn.Module, Mapping[str, Any]]]:
    penalized = [found for found in map(spec, names()) if found.penalty is not None]
    for module in model.modules():
        for found in penalized:
            options = _options(module, found)
            if options is not None:
                yield found.penalty, module, options


def _options(module: nn.Module, found: Spec) -> Mapping[str, Any] | None:
    """The options with which `module` is this variant, grafted or plain; None if it is not."""
    for graft in grafts_of(module).values():
        if graft.edit.get("variant") == found.name:
            return graft.options
    if isinstance(module, (found.module, found.module_for("Linear"))):
        options: Mapping[str, Any] = module.options  # type: ignore[assignment]
        return options
    return None

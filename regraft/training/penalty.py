"""What the variants of a model add to its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from regraft.errors import ModelError
from regraft.find.probe.example_inputs import Inputs, given_inputs
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.record import grafts_of, original_class
from regraft.variants.registry import names, spec
from regraft.variants.spec import Spec


def penalty(model: nn.Module, inputs: Any = None) -> Tensor:
    """The sum of what variants add to the loss: for `concrete`, what keeps its rates from falling to 0.

    Add it to the loss of every step, after the forward. Grafted sites and plain modules of
    `regraft.nn` both count, a shared module once. The rates learned are parameters: an optimizer that
    was built before the graft has to be given them, once:
    `optimizer.add_param_group({"params": [...], "weight_decay": 0.0})`.

    `concrete` has a term of the weights of the layers that read its output as well. They are known
    inside an `nn.Sequential`; elsewhere give one batch as `inputs`, once, at any step: a forward
    without gradients then shows them, and they are remembered.

    Args:
        model: any module.
        inputs: None, or a batch of the model (a tensor, a tuple or a dict).

    Returns:
        A tensor without axes, with a gradient to the parameters of the variants. 0 if the model has
        no variant with a penalty.

    Raises:
        ModelError: `model` is no module.
        InputsError: `inputs` are not what the model takes.

    Example:
        >>> import regraft, torch
        >>> net = torch.nn.Sequential(regraft.nn.ConcreteDropout(0.1), torch.nn.Linear(4, 8))
        >>> loss = net(torch.ones(2, 4)).sum() + regraft.penalty(net)
        >>> loss.backward()
        >>> net[0].concrete_logit.grad is not None
        True
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{type(model).__name__} is not a module", remedy="give the model whose loss is computed"
        )
    if inputs is not None:
        _watch_readers(model, given_inputs(model, inputs))
    beside = _readers_in_sequentials(model)
    terms = []
    for term, module, options in _terms(model):
        readers = _readers.get(module) or beside.get(id(module), [])
        terms.append(term(module, options, [reader.weight for reader in readers]))
    if not terms:
        return torch.zeros(())
    # A model may lie on several devices; the loss is where the first of them is.
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


_WEIGHTED = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
"""Layers whose weight multiplies what they are given; Conv1D is the linear layer of GPT-2."""
_readers: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
"""The layers that read a module's output, as one forward has shown them."""


def _weighted(module: nn.Module) -> bool:
    return any(base.__name__ in _WEIGHTED for base in type(module).__mro__)


def _readers_in_sequentials(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By id of a module: the layer with weights that stands next to it in an `nn.Sequential`."""
    beside: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        if isinstance(parent, nn.Sequential) and original_class(parent).forward is nn.Sequential.forward:
            for module, following in pairwise(parent):
                if _weighted(following):
                    beside.setdefault(id(module), []).append(following)
    return beside


def _watch_readers(model: nn.Module, inputs: Inputs) -> None:
    """Run the model once, left as it was, and remember which layers were given which module's output."""
    penalized = {id(module): module for _, module, _ in _terms(model)}
    made: dict[int, tuple[nn.Module, Any]] = {}  # the tensors are held, so that an id stays theirs
    found: dict[nn.Module, list[nn.Module]] = {}

    def left(module: nn.Module, _: Any, returned: Any) -> None:
        if id(module) in penalized:
            made[id(returned)] = (module, returned)

    def entered(module: nn.Module, given: tuple[Any, ...]) -> None:
        source = made.get(id(given[0])) if given else None
        if source is not None and _weighted(module):
            readers = found.setdefault(source[0], [])
            if module not in readers:
                readers.append(module)

    every = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(buffers_kept(every))
        stack.enter_context(torch.no_grad())
        stack.callback(register_module_forward_pre_hook(entered).remove)
        stack.callback(register_module_forward_hook(left).remove)
        model(*inputs.args, **inputs.kwargs)
    _readers.update(found)


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

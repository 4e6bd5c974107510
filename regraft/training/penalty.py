"""What the variants of a model add to its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from regraft.errors import ModelError
from regraft.find.probe.example_inputs import Inputs, given_inputs
from regraft.find.probe.preserve_state import buffers_kept, random_state_kept
from regraft.libraries import is_conv1d
from regraft.record import grafts_of, original_class
from regraft.variants.registry import names, spec


def penalty(model: nn.Module, inputs: Any = None) -> Tensor:
    """The sum of what variants add to the loss: for `concrete`, what keeps its rates from falling to 0.

    Add it to the loss of every step, after the forward. Grafted sites and plain modules of
    `regraft.nn` both count, a shared module once. The rates learned are parameters: an optimizer that
    was built before the graft has to be given them, once:
    `optimizer.add_param_group({"params": [...], "weight_decay": 0.0})`.

    `concrete` has a term of the weights of the layers that read its output as well. They are known
    inside an `nn.Sequential`; elsewhere give one batch as `inputs`, once, at any step: a forward
    without gradients then shows them. The graft remembers them, also in a deep copy and in a pickle.

    Args:
        model: any module.
        inputs: None, or a batch of the model (a tensor, a tuple or a dict).

    Returns:
        A tensor without axes, with a gradient to the parameters of the variants. 0 if the model has
        no variant with a penalty.

    Raises:
        ModelError: `model` is no module, or which layers read a site's output is not known yet.
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
    for term, module, holder, options in _terms(model):
        readers = holder.__dict__.get(_READERS, beside.get(id(module)))
        if readers is None and options.get("weight") and module is not model:
            raise _unknown_readers(model, module)
        terms.append(term(module, options, [reader.weight for reader in readers or ()]))
    if not terms:
        return torch.zeros(())
    # A model may lie on several devices; the loss is where the first of them is.
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight multiplies what they are given."""
_READERS = "readers"
"""On a graft, or on a module that is a variant itself: the layers that one forward has shown to read it."""


def _unknown_readers(model: nn.Module, module: nn.Module) -> ModelError:
    path = next(name for name, other in model.named_modules() if other is module)
    return ModelError(
        "its penalty has a term of the weights that read its output, and which layers do is not known",
        where=path,
        remedy="regraft.penalty(model, inputs=batch), once; or graft it with weight=0.0",
    )


def _weighted(module: nn.Module) -> bool:
    return isinstance(module, _WEIGHTED) or is_conv1d(module)


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
    readers: dict[int, list[nn.Module]] = {id(module): [] for _, module, _, _ in _terms(model)}
    made: dict[int, tuple[nn.Module, Any]] = {}  # the tensors are held, so that an id stays theirs

    def left(module: nn.Module, _: Any, returned: Any) -> None:
        if id(module) in readers:
            made[id(returned)] = (module, returned)

    def entered(module: nn.Module, given: tuple[Any, ...]) -> None:
        source = made.get(id(given[0])) if given else None
        if source is not None and _weighted(module) and module not in readers[id(source[0])]:
            readers[id(source[0])].append(module)

    every = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(buffers_kept(every))
        stack.enter_context(torch.no_grad())
        stack.callback(register_module_forward_pre_hook(entered).remove)
        stack.callback(register_module_forward_hook(left).remove)
        model(*inputs.args, **inputs.kwargs)
    for _, module, holder, _ in _terms(model):
        holder.__dict__[_READERS] = readers[id(module)]


def _terms(model: nn.Module) -> Iterator[tuple[Any, nn.Module, Any, Mapping[str, Any]]]:
    """The penalties of a model: the function, the module, what remembers its readers, and the options."""
    penalized = [found for found in map(spec, names()) if found.penalty is not None]
    for module in model.modules():
        for found in penalized:
            for graft in grafts_of(module).values():
                if graft.variant == found.name:
                    yield found.penalty, module, graft, graft.options
                    break
            else:
                if isinstance(module, (found.module, found.module_for("Linear"))):
                    yield found.penalty, module, module, module.options  # type: ignore[misc]

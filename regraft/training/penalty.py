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

    Add it to the loss of every step, after the forward. Grafted sites and plain modules of `regraft.nn` both
    count, a shared module once. The rates learned are parameters: an optimizer that was built before the
    graft has to be given them, once: `optimizer.add_param_group({"params": [...], "weight_decay": 0.0})`.

    `concrete` has a term of the weights of the layers that read its output as well. They are known inside an
    `nn.Sequential`; elsewhere give one batch (a tensor, a tuple or a dict) as `inputs`, once, at any step: a
    forward without gradients then shows them. The graft remembers them, also in a deep copy and in a pickle.

    Returns:
        A tensor without axes, with a gradient to the parameters of the variants; 0 if there are none.

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
    terms = list(_terms(model))
    if inputs is not None:
        _watch_readers(model, terms, given_inputs(model, inputs))
    beside = _readers_in_sequentials(model)
    values = []
    for term, module, holder, options in terms:
        readers = holder.__dict__.get(_READERS, beside.get(id(module)))
        if readers is None and options.get("weight") and module is not model:
            raise ModelError(
                "its penalty needs the weights of the layers that read its output, which are not known",
                where=next(name for name, other in model.named_modules() if other is module),
                remedy="regraft.penalty(model, inputs=batch), once; or graft it with weight=0.0",
            )
        values.append(term(module, options, [reader.weight for reader in readers or ()]))
    if not values:
        return torch.zeros(())
    # A model may lie on several devices; the loss is where the first of them is.
    return torch.stack([value.to(values[0].device) for value in values]).sum()


_READERS = "readers"
"""On a graft, or on a module that is a variant itself: the layers that one forward has shown to read it."""
_Term = tuple[Any, nn.Module, Any, Mapping[str, Any]]
"""The function, the module, what remembers its readers, and the options."""


def _weighted(module: nn.Module) -> bool:
    """Whether its weight multiplies what it is given."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)


def _readers_in_sequentials(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By id of a module: the layer with weights that stands next to it in an `nn.Sequential`."""
    beside: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        if isinstance(parent, nn.Sequential) and original_class(parent).forward is nn.Sequential.forward:
            for module, following in pairwise(parent):
                if _weighted(following):
                    beside.setdefault(id(module), []).append(following)
    return beside


def _watch_readers(model: nn.Module, terms: list[_Term], inputs: Inputs) -> None:
    """Run the model once, left as it was, and remember which layers were given which module's output."""
    readers: dict[int, list[nn.Module]] = {id(module): [] for _, module, _, _ in terms}
    made: dict[int, tuple[nn.Module, Any]] = {}  # the tensors are held, so that an id stays theirs

    def left(module: nn.Module, _: Any, returned: Any) -> None:
        if id(module) in readers:
            made[id(returned)] = (module, returned)

    def entered(module: nn.Module, given: tuple[Any, ...]) -> None:
        source = made.get(id(given[0])) if given else None
        if source is not None and _weighted(module) and module not in readers[id(source[0])]:
            readers[id(source[0])].append(module)

    with ExitStack() as stack:
        for context in (random_state_kept(), buffers_kept(list(model.modules())), torch.no_grad()):
            stack.enter_context(context)
        stack.callback(register_module_forward_pre_hook(entered).remove)
        stack.callback(register_module_forward_hook(left).remove)
        model(*inputs.args, **inputs.kwargs)
    for _, module, holder, _ in terms:
        holder.__dict__[_READERS] = readers[id(module)]


def _terms(model: nn.Module) -> Iterator[_Term]:
    penalized = [found for found in map(spec, names()) if found.penalty is not None]
    for module in model.modules():
        for found in penalized:
            grafts = [graft for graft in grafts_of(module).values() if graft.variant == found.name]
            if grafts:
                yield found.penalty, module, grafts[0], grafts[0].options
            elif isinstance(module, (found.module, found.module_for("Linear"))):
                yield found.penalty, module, module, module.options  # type: ignore[misc]

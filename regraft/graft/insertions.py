"""The layer of insertions: a module's input or output goes through a dropout that the model never had."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.find.tensor_io import NoTensorError, first_tensor, with_first
from regraft.graft.calls import Pause
from regraft.graft.classes import Namespace
from regraft.planning.plan import Edit
from regraft.record import RECORD, Graft, Layer, Slot, grafts_of
from regraft.variants.module import written_options
from regraft.variants.registry import complete_options, spec


@dataclass
class Inserted(Graft):
    """The graft of an insertion; its slot says where it is.

    Attributes:
        residual: is what the module adds to its input dropped, and not its whole output?
        sampling: does it drop in eval, too, for the time being?
    """

    residual: bool = False
    sampling: bool = False


@contextmanager
def inserted_on(model: nn.Module) -> Iterator[bool]:
    """What is inserted into `model` drops in eval as it does in training; yields whether anything will."""
    found = [
        graft
        for module in model.modules()
        for graft in grafts_of(module).values()
        if isinstance(graft, Inserted) and not graft.sampling
    ]
    for graft in found:
        graft.sampling = True
    try:
        yield any(graft.rate for graft in found)
    finally:
        for graft in found:
            graft.sampling = False


def insert_graft(edit: Edit) -> Graft:
    """The graft that inserts what `edit` says.

    One variant stands at one place once, so that a rule applied again sets its rate; two variants stack.
    """
    found = spec(edit.variant)
    options = complete_options(found, edit.options)
    return Inserted(
        Slot("insert", edit.position, edit.variant, edit.field),
        Layer(insert_layer),
        edit.variant,
        edit.options.get("p", 0.0),
        options,
        edit.to_dict(),
        in_eval=found.changes_eval is not None and found.changes_eval(options),
        residual=edit.residual,
    )


def insert_layer(base: type[nn.Module]) -> Namespace:
    """The layer of insertions: what is before and after a module's forward."""
    own = base.forward
    names = tuple(inspect.signature(own).parameters)[1:]

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        grafts = _acting(self)
        for graft in grafts:
            if graft.slot.op == "before":
                args, kwargs = _on_input(graft, names, args, kwargs, self.training)
        kept = _kept(grafts, args, kwargs)
        output = own(self, *args, **kwargs)
        for graft in grafts:
            if graft.slot.op == "after":
                output = _on_output(graft, kept, output, self.training)
        return output

    def extra_repr(self: nn.Module) -> str:
        shown = [
            f"{graft.slot.op}{':' + graft.slot.field if graft.slot.field else ''}={_written(graft)}"
            for graft in grafts_of(self).values()
            if isinstance(graft, Inserted)
        ]
        return ", ".join(filter(None, [base.extra_repr(self), *shown]))

    return {"forward": forward, "extra_repr": extra_repr}


def _written(graft: Inserted) -> str:
    title = spec(graft.variant).module_for(graft.edit["family"]).__name__
    rate = graft.rate if isinstance(graft.rate, float) else None
    return f"{title}({written_options(rate, graft.options)})"


def _acting(module: nn.Module) -> list[Inserted]:
    # After a revert somebody may still hold this forward (accelerate does): then nothing is inserted.
    return [
        graft
        for graft in module.__dict__.get(RECORD, {}).values()
        if isinstance(graft, Inserted) and (module.training or graft.in_eval or graft.sampling)
    ]


def _on_input(
    graft: Inserted, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    drop, field = _drop(graft, training), graft.slot.field
    if not field and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (drop(args[0]), *args[1:]), kwargs
    given: dict[str | int | None, Any] = {**dict(enumerate(args))}
    given.update(kwargs.items())
    if field:
        where: str | int | None = names.index(field) if field in names[: len(args)] else field
    else:
        order = [*range(len(args)), *(name for name in names if name in kwargs), *kwargs]
        tensors = {key: _tensor(given[key]) for key in order}
        present = [key for key, x in tensors.items() if x is not None]
        where = next((key for key in present if tensors[key].is_floating_point()), next(iter(present), None))
    if where not in given or _tensor(given[where]) is None:
        raise _nothing_there(graft, "input", "before")
    changed = with_first(given[where], "", drop)
    if isinstance(where, int):
        return (*args[:where], changed, *args[where + 1 :]), kwargs
    return args, {**kwargs, str(where): changed}


def _tensor(value: Any) -> Any:
    try:
        return first_tensor(value)
    except NoTensorError:
        return None


def _kept(
    grafts: list[Inserted], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, int | None] | None:
    """The input of a block that adds to it, before it runs, and how often it has been written to."""
    adding = [graft for graft in grafts if graft.residual]
    if not adding:
        return None
    try:
        x = first_tensor(args or tuple(kwargs.values()))
    except NoTensorError:
        raise _nothing_there(adding[0], "input", "after") from None
    if any(graft.edit.get("in_place") for graft in adding):
        return x.clone(), None
    return x, None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _on_output(graft: Inserted, kept: tuple[Tensor, int | None] | None, output: Any, training: bool) -> Any:
    drop = _drop(graft, training)
    try:
        if not graft.residual or kept is None:
            return with_first(output, graft.slot.field, drop)
    except NoTensorError:
        raise _nothing_there(graft, "output", "after") from None
    x, writes = kept

    def drop_what_it_adds(y: Tensor) -> Tensor:
        if writes is not None and x._version != writes:
            raise ModelError(
                "it writes to its input, which it did not in the probe: what it adds is lost",
                where=graft.edit["path"],
                remedy="plan again with the inputs= of this forward",
            )
        if y.shape != x.shape:
            raise ModelError(
                f"{tuple(x.shape)} went in and {tuple(y.shape)} came out: it is no residual block",
                where=graft.edit["path"],
                remedy="insert the drop-path after its branches",
            )
        return x + drop(y - x)

    return with_first(output, graft.slot.field, drop_what_it_adds)


def _drop(graft: Inserted, training: bool) -> Callable[[Tensor], Tensor]:
    function = spec(graft.variant).function
    rate, on = graft.rate, training or graft.sampling

    def drop(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ModelError(
                f"{graft.edit['op']} is {str(x.dtype).removeprefix('torch.')}, and cannot be dropped",
                where=graft.edit["path"],
                remedy="insert it after the embedding, 'after:Embedding'; or name a field",
            )
        with _alone():
            dropped: Tensor = function(x, rate, on, **graft.options)
        return dropped

    return drop


def _alone() -> Any:
    """Keeps the inserted dropout from the grafts of the calls in the modules around: it is none of those."""
    return torch._C.DisableTorchFunction() if torch.compiler.is_compiling() else Pause()


def _nothing_there(graft: Inserted, side: str, function: str) -> ModelError:
    what = f"there is no {graft.slot.field!r}" if graft.slot.field else "there is no tensor"
    return ModelError(
        f"{what} in its {side}",
        where=graft.edit["path"],
        remedy=f"name the part: regraft.{function}(..., field=...)",
    )

"""The rows of a batch: shown to be independent, never assumed; and computed as if each were alone.

Two of the batch's rows run alone, and then between copies of a third. Were the axis time, nodes of a graph,
or a set that the model attends over, the rows around them would change what comes out for them. Comparing
the first rows of a longer batch would not do: a recurrent network and causal attention do not look ahead.
Random numbers are replaced by their centre, so that the same rows give the same outputs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.find.probe.preserve_state import random_state_kept, silent
from regraft.libraries import is_sharded
from regraft.training.passes.fork import generators, set_generators
from regraft.training.passes.measure import Forward, arguments_of, draws
from regraft.training.passes.nested import filled, holds_cache, joined, leaves, outputs_of, tensors_in
from regraft.training.passes.repeat import Batch, check_batched
from regraft.training.passes.sharded import real_forwards

_TOLERANCE = 1e-3  # of what another row does to the output
_GUARDS = 2  # copies of a row on either side
UNDECIDED = "whether its first axis is the batch cannot be shown with fewer than two different rows"


def why_dependent(model: nn.Module, forward: Forward, batch: Batch) -> str | None:
    """Why the rows of this batch may see one another, or None if it was shown that they do not.

    All ranks that train the model together get one answer. `UNDECIDED` is about these inputs alone; any other
    holds for all inputs of their kind.
    """
    groups = _groups(model)
    different: Any = torch.zeros(batch.size, dtype=torch.bool)
    for x in batch.tensors:
        flat = x.detach().reshape(batch.size, -1)
        different |= (flat != flat[:1]).any(1).cpu()
    others = different.nonzero().flatten().tolist()
    if not _all_ranks(groups, bool(others), batch):
        return UNDECIDED
    try:
        # Two rows to look at, and one to put around them: three that differ, if there are as many.
        reason = _compared(model, forward, batch, others[0], others[1] if len(others) > 1 else 0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"some of its rows alone fail: {(str(error).strip() or repr(error)).splitlines()[0]}"
    if not _all_ranks(groups, reason is None, batch):
        return reason or "another rank's rows see one another"
    return None


def _compared(model: nn.Module, forward: Forward, batch: Batch, first: int, second: int) -> str | None:
    guard = [0] * _GUARDS
    alone = _outputs(model, forward, batch, [first, second])
    between = _outputs(model, forward, batch, [*guard, first, second, *guard])
    if alone.keys() != between.keys():
        return "its outputs depend on the size of the batch"
    shown = False
    for name, (wanted, eps) in alone.items():
        middle = between[name][0][_GUARDS : _GUARDS + 2]
        if middle.shape != wanted.shape:
            return f"the shape of its output {name or 'itself'!r} depends on the other rows of the batch"
        if not wanted.numel():
            continue
        effect = float((wanted[0] - wanted[1]).nan_to_num(0, 0, 0).abs().max())
        # Half precision rounds away a thousandth: a product of another size is added up in another order.
        rounding = 4 * eps * float(wanted.nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(middle, wanted, rtol=0, atol=_TOLERANCE * effect + rounding, equal_nan=True):
            return "the rows of its first axis see one another, so it is no batch of independent examples"
        shown |= effect > 0
    return None if shown else "its outputs are the same for different rows"


def _outputs(
    model: nn.Module, forward: Forward, batch: Batch, rows: list[int]
) -> dict[str, tuple[Tensor, float]]:
    """The tensors that come out for these rows, in double precision, and the precision they had."""
    with ExitStack() as stack:
        for context in (silent(), real_forwards(model), random_state_kept()):
            stack.enter_context(context)
        if "torch._dynamo" in sys.modules:  # compiled code would be compiled once more for so few rows
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        if all(x.dtype not in (torch.float16, torch.bfloat16) for x in (*model.parameters(), *batch.tensors)):
            for device in {x.device.type for x in batch.tensors}:
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_Centred())  # type: ignore[no-untyped-call]
        outputs = outputs_of(forward, batch.with_rows(rows))
    tensors = {}
    for name, leaf in leaves("", outputs):
        check_batched(name, leaf, len(rows))
        if isinstance(leaf, Tensor):
            x = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            tensors[name] = x.double(), torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    return tensors


class _Centred(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every draw gives its centre: nothing is dropped, and the same rows give the same outputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not draws(func):
            return func(*args, **(kwargs or {}))
        given = arguments_of(func, args, kwargs or {})
        for rate in ("dropout_p", "dropout"):  # of fused attention and of recurrent layers
            if rate in given:
                given[rate] = 0.0
                named = [argument.name for argument in func._schema.arguments if argument.kwarg_only]
                named_values = {name: given.pop(name) for name in named}
                return func(*given.values(), **named_values)
        name = func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_like")
        if name in ("native_dropout", "_fused_dropout"):
            x = given["input" if "input" in given else "self"]
            return x.clone(), torch.ones_like(x, dtype=torch.bool if name[0] == "n" else torch.uint8)
        if name not in _CENTRES:
            raise NotImplementedError(f"it draws by {name}, whose noise cannot be held still")
        centre = _CENTRES[name](given)
        result = func(*args, **(kwargs or {}))
        return result.copy_(centre) if isinstance(centre, Tensor) else result.fill_(centre)


def _middle(low: int, high: int) -> int:
    # A word of random bits may be four small numbers, each of which is to be in its middle.
    return 0x7FFF7FFF7FFF7FFF if high - low > 2**63 else (low + high) // 2


_CENTRES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rand": lambda _: 0.5,
    "uniform": lambda given: (given["from"] + given["to"]) / 2,
    "randn": lambda _: 0.0,
    "normal": lambda given: given["mean"],
    "randint": lambda given: _middle(given.get("low", 0), given["high"]),
    "bernoulli": lambda given: (given["self"] if given.get("p") is None else given["p"]) >= 0.5,
    "exponential": lambda given: 1 / given["lambd"],
}
"""Operation -> the centre of what it draws."""


def _groups(model: nn.Module) -> list[Any]:
    """The process groups whose ranks take every step of this model together."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            return [mesh.get_group(i) for i in range(mesh.ndim)]
        if hasattr(parameter, "ds_id"):  # of DeepSpeed's stage 3
            return [dist.group.WORLD]
    replicated = getattr(DistributedDataParallel, "_active_ddp_module", None) or model
    group = getattr(replicated, "process_group", None)  # of DDP and of FSDP1
    return [] if group is None else [group]


def _all_ranks(groups: list[Any], answer: bool, batch: Batch) -> bool:
    """Whether all ranks answer yes."""
    device = next((x.device for x in batch.tensors), torch.device("cpu"))
    vote = torch.tensor([int(answer)], device=device)
    for group in groups:
        dist.all_reduce(vote, dist.ReduceOp.MIN, group)
    return bool(vote.item())


def row_by_row(forward: Forward, batch: Batch) -> Any:
    """A forward for each row, each from the random state of the first."""
    return _rows(forward, batch, range(batch.size))


def rows_at_once(forward: Forward, batch: Batch) -> Any:
    """One forward for all rows, under a vmap that draws once for them."""
    outputs: Any = None

    def one_row(*tensors: Any) -> tuple[Any, ...]:
        nonlocal outputs
        outputs = outputs_of(forward, batch.with_tensors([x[None] for x in tensors]))
        return tuple(tensors_in(outputs))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.func.vmap(one_row, randomness="same")(*batch.tensors)
    return filled(outputs, (x.flatten(0, 1) for x in found))


def shown_at_once(model: nn.Module, forward: Forward, batch: Batch) -> bool:
    """Whether `rows_at_once` gives the first and the last row what they get alone."""
    if holds_cache(batch.call):
        return False
    ends = [0, batch.size - 1]
    with real_forwards(model), random_state_kept():
        start = generators()
        try:
            found = tensors_in(rows_at_once(forward, batch))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what vmap cannot run goes row by row
            return False
        set_generators(start)
        for one, other in zip(found, tensors_in(_rows(forward, batch, ends)), strict=True):
            eps = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
            rounding = (4 if eps > 1e-4 else 1000) * eps * float(other.detach().abs().max())
            if not torch.allclose(one[ends], other, rtol=0, atol=rounding, equal_nan=True):
                return False
    return True


def _rows(forward: Forward, batch: Batch, rows: Any) -> Any:
    start, parts = generators(), []
    for row in rows:
        set_generators(start)
        parts.append(outputs_of(forward, batch.with_rows([row])))
    return joined(parts)

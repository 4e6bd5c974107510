"""Which weights really multiply, and which of them a graft reaches: read from the autograd graph.

This shares no code with regraft, and looks at something else than regraft does: not at operators as they
run, but at the graph that a training forward leaves behind. A weight multiplies if a node of a matrix product
has an edge that leads to the parameter through nothing but views, casts and sums of parameters. After a graft
it is reached if no such edge is left that looks as it did before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from zoo.check import examine
from zoo.entry import Entry, forward, tensors

RULE = {"Linear": "dropconnect(p=0.3)"}
_PRODUCT = re.compile(
    r"^(Addmm|Mm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|Matmul|GroupedMm|_?grouped_mm\w*|MkldnnRnnLayer|CudnnRnn"
    r"|ThnnFused\w+|Trilinear|Bilinear|GeneratedBackwardFor_transformers_grouped_mm\w*)",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"^(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Reshape|Expand|ToCopy|Clone|Squeeze|Unsqueeze|Slice"
    r"|Select|Split\w*|Unbind|Chunk|Cat|Stack|Index|IndexSelect|Alias|As_?Strided|WeightNorm\w*|Mul|Add|Sub|Div"
    r"|Neg|Narrow|Contiguous|UnsafeSplit|Flip)Backward\d*$",
    re.IGNORECASE,
)
_LEARNED_INPUT = {"Addmm": 1, "Mm": 0, "Bmm": 0, "Baddbmm": 1}
"""Position of a layer's input among the edges: made of parameters, as the weight is, it is still an input."""

Path = tuple[str, ...]
Look = tuple[dict[str, set[Path]], set[str]]
"""The weights that multiply, with the ways to them; and those that a walk over the modules reaches."""


def percent(part: int, whole: int) -> str:
    """A share in percent, never rounded to 0 or 100: 3226 of 3227 is 99.97 %."""
    if part in (0, whole):
        return "0 %" if part == 0 else "100 %"
    share = 100 * part / whole
    digits = next((digits for digits in (1, 2, 3) if 0 < round(share, digits) < 100), 4)
    return f"{share:.{digits}f} %"


@dataclass
class LinearRow:
    """One model, before and after. The attributes are the keys of the JSON."""

    library: str
    name: str
    model: str = ""
    weights: int = 0
    walked: int = 0
    """Weights of an `nn.Linear` (that class itself) that its own forward alone multiplies by."""
    reached: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Weights left, by the reason that the report gives."""
    silent: list[str] = field(default_factory=list)
    """Weights left that no line of the report explains."""
    bypassed: list[str] = field(default_factory=list)
    """Weights that the report calls grafted, and that still multiply as they are somewhere."""
    eval_differs: bool = False
    revert_differs: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def products(model: nn.Module, output: Any) -> dict[str, set[Path]]:
    """Parameter -> the ways from products to it, each as the names of the nodes on it."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
    found: dict[str, set[Path]] = defaultdict(set)
    seen: set[Any] = set()
    stack = [one.grad_fn for one in tensors(output) if one.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [edge for edge, _ in node.next_functions]
        if not _PRODUCT.match(node.name()):
            continue
        edges = [_leaves(edge, names) for edge, _ in node.next_functions]
        kind = re.sub(r"Backward\d*$", "", node.name())
        learned = _LEARNED_INPUT.get(kind)
        for position, leaves in enumerate(edges):
            if leaves is None or (kind in ("Addmm", "Baddbmm") and position == 0):
                continue
            if position == learned and edges[position + 1] is not None and not _factors(edges):
                continue
            for name, path in leaves:
                if model.get_parameter(name).dim() > 1:
                    found[name].add((node.name(), *path))
    return dict(found)


def _factors(edges: list[Any]) -> bool:
    """Are both operands parameters as they are: factors of one weight?"""
    return all(one is not None and len(one) == 1 and one[0][1] == () for one in edges[-2:])


def _leaves(node: Any, names: dict[int, str], depth: int = 0) -> list[tuple[str, Path]] | None:
    """The parameters that an operand is made of, with the nodes on the way; None if it is made of more."""
    if node is None or depth > 12:
        return None
    if node.name() == "torch::autograd::AccumulateGrad":
        name = names.get(id(node.variable))
        return None if name is None else [(name, ())]
    if not _LEADS.match(node.name()):
        return None
    leaves: list[tuple[str, Path]] = []
    for edge, _ in node.next_functions:
        if edge is None:
            continue
        below = _leaves(edge, names, depth + 1)
        if below is None:
            return None
        leaves += [(name, (node.name(), *path)) for name, path in below]
    return leaves or None


def linear_row(entry: Entry, given: bool | None = None) -> LinearRow:
    """Graft DropConnect on every Linear, look again, compare, revert."""
    row = LinearRow(entry.library, entry.name)
    return examine(row, entry, _look, _count, _apply, _compare, given)


def walk_row(entry: Entry) -> LinearRow:
    """The row of a model as it is, without regraft."""
    return examine(LinearRow(entry.library, entry.name), entry, _look, _count)


def _count(row: LinearRow, model: nn.Module, before: Look) -> None:
    found, own = before
    row.weights, row.walked = len(found), sum(name in own for name in found)


def _apply(row: LinearRow, model: nn.Module, inputs: Any) -> dict[str, Any] | None:
    import regraft

    return regraft.apply(model, RULE, inputs=inputs).to_dict() if row.weights else None


def _look(model: nn.Module, inputs: Any) -> Look:
    """What multiplies in a training forward, and the weights that a walk over the modules would reach."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    ran: dict[str, int] = defaultdict(int)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.__setitem__(name, ran[name] + 1))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        found = products(model, forward(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    names = _aliases(model)
    walked = {one for name, count in ran.items() if count for one in names[f"{name}.weight".lstrip(".")]}
    plain = {name for name in found if name in walked and all(len(path) == 2 for path in found[name])}
    return found, plain


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of a parameter -> all its names."""
    by_id: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].append(name)
    return {name: names for names in by_id.values() for name in names}


def _compare(
    row: LinearRow,
    model: nn.Module,
    before: Look,
    after: Look,
    report: dict[str, Any],
    given: bool,
) -> None:
    grafted = {path for edit in report["grafted"] for path in [edit["path"], *edit["paths"]]}
    aliases = _aliases(model)
    for name, paths in before[0].items():
        if not paths & after[0].get(name, set()):
            row.reached += 1
            continue
        places = {*aliases[name], *(one.rpartition(".")[0] for one in aliases[name])}
        skip = next((one for one in report["skipped"] if {one["path"], *one["paths"]} & places), None)
        if places & grafted:
            row.bypassed.append(name)
        elif skip is not None:
            row.skipped[skip["reason"]] = row.skipped.get(skip["reason"], 0) + 1
        else:
            row.silent.append(name)


COLUMNS = ("weights", "module walk", "regraft", "skipped", "bypassed", "silent")


def cells(rows: list[LinearRow], walk_only: bool = False) -> list[str]:
    """What is reached in rows without an error, one cell for each column from "weights" on."""
    weights = sum(row.weights for row in rows)
    walked = [str(weights), share(sum(row.walked for row in rows), weights)]
    if walk_only:
        return [*walked, *["-"] * 4]
    skipped = sum(sum(row.skipped.values()) for row in rows)
    bypassed, silent = (str(sum(len(getattr(row, name)) for row in rows)) for name in ("bypassed", "silent"))
    return [*walked, share(sum(row.reached for row in rows), weights), str(skipped), bypassed, silent]


def share(part: int, whole: int) -> str:
    return f"{part} ({percent(part, whole)})" if whole else "-"


def line(row: LinearRow) -> str:
    """A model's row as one line, without its problems."""
    return f"{row.library}:{row.name} ({row.model}) {row.reached}/{row.weights} walked {row.walked}"

"""Weights: every matrix that multiplies in a forward, what it is, and which module it is to be lent to.

What a module is called or derived from says nothing here. A parameter is a weight because a product was
seen with it; it is a router's because the scores it makes reach a choice; it is lent to the smallest module
that contains everything that multiplies by it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any

from torch import Tensor, fx, nn

from regraft.find.graph_calls import graph_nodes
from regraft.find.probe.products import Product, ProductRecorder
from regraft.find.recognize import op_of, owner_obstacle, quantized
from regraft.find.site import Site
from regraft.find.walk import Named
from regraft.ops import CONVOLUTION, LINEAR
from regraft.record import Slot, grafts_of, original_class

KINDS = ("Linear", "Conv1D", "experts", "router", "in_proj", "out_proj", "recurrent", "Bilinear")
"""What a weight can be, beside a convolution's: `"Linear"` as a selector means all but routers."""
_LARGEST_EXPERTS = 2**30
_COMPUTED = ("_g", "_v", "_orig")  # weight_norm's and prune's old ways


@dataclass(frozen=True)
class Weight:
    """A weight that multiplies.

    Attributes:
        name: its dotted name, the first of all.
        names: all of them; several if it is tied.
        kind: one of `KINDS`, or of a convolution the name of torch's layer: "Conv2d", "ConvTranspose1d".
        holder: the module that has it.
        attribute: its name there.
        reader: the smallest module that contains the holder and all modules that multiply by it.
        reader_path: the first path of the reader.
        holder_path: from the reader to the holder.
        calls: how often it multiplied.
        contracted: the axis of it that the products sum over; None where they differ or it is not known.
        direct: whether only the own forward of a linear layer multiplies by it.
        obstacle: why lending it would be wrong, and the remedy.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    holder: nn.Module
    attribute: str
    reader: nn.Module
    reader_path: str
    holder_path: str
    calls: int
    direct: bool
    contracted: int | None = None
    obstacle: tuple[str, str] | None = None

    @property
    def convolves(self) -> bool:
        return self.kind not in KINDS


def weight_sites(sites: list[Site], weights: list[Weight], modules: list[Named]) -> list[Site]:
    """The sites with those of the weights that are no linear layer's own, in the order of the modules.

    A linear layer whose weight something else multiplies by is the site of that weight.
    """
    order = {id(named.module): position for position, named in enumerate(modules)}
    nodes = {weight.name: found for weight in weights if (found := _linear_nodes(weight))}
    lent = [weight for weight in weights if not weight.direct and weight.name not in nodes]
    bypassed = {id(weight.holder) for weight in lent if weight.attribute == "weight"}
    routers = {id(weight.holder) for weight in weights if weight.direct and weight.kind == "router"}
    paths = {id(named.module): tuple(named.paths) for named in modules}
    fed = {(id(one.reader), name) for one in lent for name in _fed_nodes(one)}
    own = [
        replace(site, role="router") if site.kind == "module" and id(site.module) in routers else site
        for site in sites
        if not (site.kind == "module" and site.family == "Linear" and id(site.module) in bypassed)
        and not (site.op == LINEAR and (id(site.module), site.node) in fed)
    ]
    names = {(id(one.reader), node): one.names for one in weights for node in nodes.get(one.name, ())}
    own = [
        replace(site, paths=(*site.paths, *more))
        if site.kind == "node" and (more := names.get((id(site.module), site.node)))
        else site
        for site in own
    ]
    # The sites come in an order of their own, which a call that takes its rate from a module may leave.
    keys = list(accumulate((order[id(site.module)] for site in own), max))
    for weight in reversed(lent):
        own.insert(bisect_right(keys, order[id(weight.holder)]), _site(weight, paths))
    return own


def matrices(
    weights: list[Weight], grafted: list[Site], selected: list[Site]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How many matrices multiply and how many are grafted; and a row for each kind that no rule selects.

    Args:
        weights: what multiplies; convolutions are not counted.
        grafted: sites of matrices that get a variant.
        selected: all that a rule selects; without any, the rules are not about matrices.
    """
    matrices = [weight for weight in weights if weight.calls and not weight.convolves]
    if not selected or not matrices:
        return {}, []
    reached, named = ({path for site in sites for path in site.paths} for sites in (grafted, selected))
    left: dict[str, int] = {}
    rows: dict[str, dict[str, Any]] = {}
    for weight in matrices:
        split = [name.rpartition(".") for name in weight.names]
        places = {*weight.names, *(owner for owner, _, name in split if name == "weight")}
        if not reached.isdisjoint(places):
            continue
        left[weight.kind] = left.get(weight.kind, 0) + 1
        if named.isdisjoint(places):
            remedy = f"a rule for {weight.kind!r}"
            row: dict[str, Any] = {"what": "matrix", "name": weight.kind, "count": 0, "paths": []}
            row = rows.setdefault(weight.kind, {**row, "source": None, "remedy": remedy})
            row["count"] += 1
            row["paths"].append(weight.name)
    counts = {"multiply": len(matrices), "reached": len(matrices) - sum(left.values()), "left": left}
    return {"matrices": counts}, list(rows.values())


def _site(weight: Weight, paths: dict[int, tuple[str, ...]]) -> Site:
    tensor: Any = getattr(weight.holder, weight.attribute)
    owners, names = paths[id(weight.holder)], weight.names
    whole = weight.attribute == "weight"  # then the module's name is as good as the weight's
    slot = Slot("lend", f"{weight.holder_path}.{weight.attribute}".lstrip("."))
    graft = grafts_of(weight.reader).get(str(slot))
    return Site(
        path=owners[0] if whole else names[0],
        paths=owners if whole else names,
        kind="weight",
        op=weight.kind,
        type=original_class(weight.holder).__name__,
        p=None,
        calls=weight.calls,
        source=None,
        family=CONVOLUTION if weight.convolves else "Linear",
        module=weight.reader,
        shape=tuple(tensor.shape),
        parameters=tensor.numel(),
        device=str(tensor.device),
        dtype=str(tensor.dtype).removeprefix("torch."),
        training=weight.reader.training,
        variant=graft.edit["after"] if graft else None,
        role="router" if weight.kind == "router" else "",
        reader=weight.reader_path,
        holder=weight.holder_path,
        attribute=weight.attribute,
        contracted=weight.contracted,
        obstacle=weight.obstacle,
    )


def _reads(weight: Weight) -> list[fx.Node]:
    """The nodes that read the weight, where its reader is a graph."""
    if not isinstance(weight.reader, fx.GraphModule):
        return []
    target = f"{weight.holder_path}.{weight.attribute}".lstrip(".")
    return [one for one in weight.reader.graph.nodes if one.op == "get_attr" and one.target == target]


def _linear_nodes(weight: Weight) -> list[str]:
    """Of a weight that a graph multiplies by in calls of `F.linear` alone: those nodes, sites themselves."""
    users = [user.name for node in _reads(weight) for user in node.users]
    ops = {found.called.name: found.called.op for found in graph_nodes(weight.reader)} if users else {}
    return users if users and all(ops.get(name) == LINEAR for name in users) else []


def _fed_nodes(weight: Weight) -> list[str]:
    """The nodes of a graph that use the weight, or what is made of it alone."""
    stack, names = _reads(weight), []
    while stack:
        for user in stack.pop().users:
            names.append(user.name)
            if len(user.all_input_nodes) == 1:
                stack.append(user)
    return names


def weights_of(recorder: ProductRecorder, modules: list[Named]) -> list[Weight]:
    """The weights of a model whose forward was recorded, in the order in which the modules stand."""
    tree = _Tree(modules)
    by_root: dict[tuple[str, str], list[Product]] = {}
    for product in recorder.products:
        for root in product.parameters:
            for slot in tree.slots(root)[:1]:
                by_root.setdefault(slot, []).append(product)
    order = {id(named.module): position for position, named in enumerate(modules)}
    found = (_weight(tree, recorder, slot, products) for slot, products in by_root.items())
    weights = [weight for weight in found if weight is not None]
    weights += _idle(tree, recorder.used)
    return sorted(weights, key=lambda weight: (order[id(weight.holder)], weight.name))


def _idle(tree: _Tree, used: set[str]) -> Iterator[Weight]:
    """Matrices of somebody's own modules that no operation used, as experts to which nothing was routed."""
    for slots in tree.aliases.values() if used else ():
        path, name = slots[0]
        holder, names = tree.by_path[path], tuple(".".join(filter(None, slot)) for slot in slots)
        if op_of(holder) is not None or original_class(holder).__module__.startswith("torch."):
            continue
        shape = holder._parameters[name].shape  # type: ignore[union-attr]
        if used.isdisjoint(names) and sum(length > 1 for length in shape) > 1:
            kind = "experts" if len(shape) > 2 else "Linear"
            yield Weight(names[0], names, kind, holder, name, holder, path, "", 0, direct=False)


class _Tree:
    """The modules of a model by path, and the parameters' places in them."""

    def __init__(self, modules: list[Named]) -> None:
        self.by_path = {path: named.module for named in modules for path in named.paths}
        self.paths = {id(named.module): named.paths for named in modules}
        self.aliases: dict[int, list[tuple[str, str]]] = {}
        for path, module in self.by_path.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.aliases.setdefault(id(parameter), []).append((path, name))

    def slots(self, root: str) -> list[tuple[str, str]]:
        """The places of a parameter: path of the holder and attribute; of a computed weight its own."""
        path, _, name = root.rpartition(".")
        parameter = self.by_path[path]._parameters[name]
        return list(dict.fromkeys(self._computed(*place) for place in self.aliases[id(parameter)]))

    def _computed(self, path: str, name: str) -> tuple[str, str]:
        """Of an ingredient of a computed weight, that weight."""
        outer, _, attribute = path.rpartition(".")
        owner, _, middle = outer.rpartition(".")
        if name.startswith("original") and middle == "parametrizations":
            return owner, attribute
        holder = self.by_path[path]
        for ending in _COMPUTED:
            if name.endswith(ending) and isinstance(
                holder.__dict__.get(whole := name.removesuffix(ending)), Tensor
            ):
                return path, whole
        return path, name


def _weight(
    tree: _Tree, recorder: ProductRecorder, slot: tuple[str, str], products: list[Product]
) -> Weight | None:
    root = products[0].parameters
    names = [place for name in root for place in tree.slots(name) if slot in tree.slots(name)]
    readers = list({id(one.module): one.module for one in products if one.module is not None}.values())
    if not readers:
        return None
    places = list(dict.fromkeys(names))
    reader_path, place = _smallest(tree, readers, places)
    holder, reader = tree.by_path[place[0]], tree.by_path[reader_path]
    inside = place[0][len(reader_path) :].lstrip(".")
    kind = _kind(holder, place[1], readers, products)
    holders = {id(tree.by_path[path]) for path, name in places if name == "weight"}
    direct = all(id(one) in holders and op_of(one) in ("Linear", "Conv1D") for one in readers)
    return Weight(
        name=".".join(filter(None, slot)),
        names=tuple(".".join(filter(None, one)) for one in places),
        kind=kind,
        holder=holder,
        attribute=place[1],
        reader=reader,
        reader_path=reader_path,
        holder_path=inside,
        calls=sum(one.calls for one in products),
        direct=direct,
        contracted=axes.pop() if len(axes := {one.contracted for one in products}) == 1 else None,
        obstacle=_obstacle(tree, recorder, root, holder, place[1], reader_path, kind),
    )


def _smallest(
    tree: _Tree, readers: list[nn.Module], places: list[tuple[str, str]]
) -> tuple[str, tuple[str, str]]:
    """The path of the smallest module with all readers and one of the places in it; and that place."""
    found: list[tuple[int, str, tuple[str, str]]] = []
    for place in places:
        for first in tree.paths[id(readers[0])]:
            common = _common([first, place[0]])
            for other in readers[1:]:
                common = max((_common([common, path]) for path in tree.paths[id(other)]), key=len)
            found.append((_depth(common), common, place))
    _, path, place = max(found, key=lambda one: one[0])
    return path, place


def _common(paths: list[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, levels)
    return ".".join(parts[0] for parts in shared)


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _kind(holder: nn.Module, attribute: str, readers: list[nn.Module], products: list[Product]) -> str:
    if any(product.selects for product in products):
        return "router"
    if isinstance(holder, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent"
    attention = [reader for reader in readers if isinstance(reader, nn.MultiheadAttention)]
    if attention:
        return "out_proj" if any(holder is reader.out_proj for reader in attention) else "in_proj"
    if any(product.form == "bilinear" for product in products):
        return "Bilinear"
    if all(product.form.endswith("convolution") for product in products):
        transposed = "Transpose" if products[0].form.startswith("transposed") else ""
        return f"Conv{transposed}{len(products[0].weight) - 2}d"
    weight: Any = getattr(holder, attribute, None)
    if isinstance(weight, Tensor) and weight.dim() >= 3 and all(_per_matrix(weight, one) for one in products):
        return "experts"
    return "Conv1D" if op_of(holder) == "Conv1D" else "Linear"


def _per_matrix(weight: Tensor, product: Product) -> bool:
    """Is the weight a stack of matrices, each of which multiplies inputs of its own?"""
    if product.form == "grouped":
        return True
    if product.form == "batched":
        return product.weight[0] > 1
    return math.prod(product.weight) < weight.numel()


def _obstacle(
    tree: _Tree,
    recorder: ProductRecorder,
    roots: Iterable[str],
    holder: nn.Module,
    attribute: str,
    reader_path: str,
    kind: str,
) -> tuple[str, str] | None:
    reader = tree.by_path[reader_path]
    found = owner_obstacle(reader) or quantized(reader) or quantized(holder, attribute)
    if found is not None:
        return found
    looked_up = [module for root in roots for module in recorder.lookups.get(root, ()) if module is not None]
    for module in looked_up:
        inside = any(_within(path, reader_path) for path in tree.paths[id(module)])
        if inside and holder is not reader:
            return (
                "its module looks rows up in it too: the draw would reach the embedding",
                "leave it alone: a rule with None",
            )
    weight: Any = getattr(holder, attribute, None)
    size = weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0
    if kind == "experts" and size > _LARGEST_EXPERTS:
        return (
            f"a forward would keep a copy of all its experts, {size / 2**30:.1f} GiB",
            "choose weights that every example uses, such as attention's",
        )
    return None


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")

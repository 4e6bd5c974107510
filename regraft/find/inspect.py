"""`regraft.inspect`: the sites of a model, probed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from regraft.find.balance import balance, left
from regraft.find.diagnose import Finding, diagnose
from regraft.find.graph_nodes import node_sites
from regraft.find.insertion_points import inserted_sites
from regraft.find.merge_probe import probed_sites
from regraft.find.modules import module_sites
from regraft.find.probe.example_inputs import given_inputs, made_inputs
from regraft.find.probe.products import ProductRecorder
from regraft.find.probe.run import Probe, run_probe
from regraft.find.probe.submodels import probe_parts
from regraft.find.site import Site
from regraft.find.walk import Named, inner_model, named_modules
from regraft.find.weights import Weight, weight_sites, weights_of
from regraft.report.inspection_page import summary
from regraft.report.view import SCHEMA, View


@dataclass(frozen=True, repr=False)
class Inspection(View):
    """What can be regularized in a model: its sites, and which of them really run.

    Attributes:
        sites: every `Site`, in the order in which the modules were registered.
        findings: what is wrong with the model as it stands.
        notes: what a reader should know first.
        probe: how the sites were probed.
        root: the model (inside any wrappers).
        weights: every matrix that multiplied in the probe.
    """

    root: nn.Module
    sites: list[Site]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    modules: list[Named] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)

    @property
    def balance(self) -> dict[str, Any]:
        """How many draws the probe saw: at sites, of named randomness of another kind, unrecognized."""
        return balance(self.sites, self.probe)

    @property
    def left(self) -> list[dict[str, Any]]:
        """The draws that are at no site, with module, line and remedy."""
        return left(self.sites, self.modules, self.probe)

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        sites = [site.to_dict() for site in self.sites]
        return {
            "schema": SCHEMA,
            "view": "inspection",
            "model": type(self.root).__name__,
            "notes": list(self.notes),
            "probe": self.probe.to_dict(),
            "summary": summary(sites, len(self.probe.draws)),
            "sites": sites,
            "balance": self.balance,
            "left": self.left,
            "findings": [vars(finding) for finding in self.findings],
        }


def inspect(model: nn.Module, inputs: Any = None) -> Inspection:
    """The sites of a model, and which of them a training forward really runs. Changes nothing.

    Args:
        model: any module; DDP and compiled wrappers are looked into.
        inputs: for the probe: a tensor, a tuple of arguments or a dict of keyword arguments. Hugging Face
            and timm models need none.

    Raises:
        ModelError: not a module, or one that regraft cannot look into (also a TypeError).
        InputsError: inputs that the forward does not take (also a ValueError).

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        >>> [site.written for site in regraft.inspect(net).sites]
        ['Linear(4, 8)', 'Dropout(p=0.1)']
    """
    seen = inspect_static(model)
    products = ProductRecorder(name for name, _ in seen.root.named_parameters())
    probe = _probed(seen.root, seen.modules, inputs, {id(site.module) for site in seen.sites}, products)
    weights = weights_of(products, seen.modules)
    sites = weight_sites(probed_sites(seen.sites, seen.modules, probe), weights, seen.modules)
    findings = diagnose(sites, seen.modules, probe)
    return replace(seen, sites=sites, findings=findings, probe=probe, weights=weights)


def inspect_static(model: nn.Module) -> Inspection:
    """What can be seen of a model without running it."""
    root, notes = inner_model(model)
    modules = named_modules(root)
    probe = Probe(reason="the model was looked at, not run")
    order = {id(named.module): position for position, named in enumerate(modules)}
    found = [*node_sites(modules), *module_sites(modules), *inserted_sites(modules)]
    sites = sorted(found, key=lambda site: order[id(site.module)])
    return Inspection(root, sites, notes=notes, probe=probe, modules=modules)


look = inspect_static


def _probed(
    root: nn.Module, modules: list[Named], inputs: Any, sites: set[int], products: ProductRecorder
) -> Probe:
    every = [named.module for named in modules]
    if inputs is not None:
        return run_probe(root, every, [given_inputs(root, inputs)], sites, [products], given=True)
    try:
        probe = run_probe(root, every, made_inputs(root), sites, [products])
    except Exception as error:
        probe = Probe(reason=f"no inputs could be made from the model's config: {error}; give inputs=")
    if not probe.ran:
        products.start({})  # what a forward did before it broke off
    probe_parts(probe, every, sites, products)
    return probe

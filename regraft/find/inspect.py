"""`regraft.inspect`: the sites of a model, probed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from regraft.find.advice import first_advice
from regraft.find.balance import balance, left
from regraft.find.diagnose import Finding, diagnose
from regraft.find.graph_nodes import node_sites
from regraft.find.insertion_points import inserted_sites
from regraft.find.merge_probe import probed_sites
from regraft.find.modules import module_sites
from regraft.find.probe.dataflow import Dataflow
from regraft.find.probe.example_inputs import given_inputs, made_inputs
from regraft.find.probe.example_inputs_hf import says_what_it_takes
from regraft.find.probe.ledger import Recorder
from regraft.find.probe.products import ProductRecorder
from regraft.find.probe.run import Probe, run_probe
from regraft.find.recognize import foreign, quantized
from regraft.find.site import Site
from regraft.find.walk import Named, inner_model, named_modules, one_at_a_time
from regraft.find.weights import Weight, weight_sites, weights_of
from regraft.report.document import answer_of, rule_text
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
        dataflow: where values came from and went to, if that was asked for and the probe ran.
    """

    root: nn.Module
    sites: list[Site]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    modules: list[Named] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    dataflow: Dataflow | None = None

    @property
    def balance(self) -> dict[str, Any]:
        """How many draws the probe saw: at sites, of named randomness of another kind, unrecognized."""
        return balance(self.sites, self.probe)

    @property
    def left(self) -> list[dict[str, Any]]:
        """The draws that are at no site, with module, line and remedy."""
        return left(self.sites, self.modules, self.probe)

    def _unknown_parts(self) -> int:
        """How many parts are no torch layers, which may draw only when told to, as Keras's do."""
        modules = [named.module for named in self.modules]
        return sum(quantized(module) is None and foreign(module) is not None for module in modules)

    def _summary(self, sites: list[dict[str, Any]]) -> dict[str, Any]:
        """Whether the model regularizes, and a line to paste that changes it."""
        answer = answer_of(sites, len(self.probe.draws), self._unknown_parts())
        if any(site["variant"] for site in sites):
            return {"answer": answer, "paste": "regraft.revert(model)", "rules": []}
        rules, paste = first_advice(self.modules, self.sites, self.probe)
        if rules:
            paste = f"regraft.apply(model, {{{', '.join(rule_text(*rule) for rule in rules)}}})"
        return {"answer": answer, "paste": paste, "rules": rules}

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        sites = [site.to_dict() for site in self.sites]
        return {
            "schema": SCHEMA,
            "view": "inspection",
            "model": type(self.root).__name__,
            "notes": list(self.notes),
            "probe": self.probe.to_dict(),
            "summary": self._summary(sites),
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
    return inspect_flow(model, inputs, None)


@one_at_a_time
def inspect_flow(model: nn.Module, inputs: Any, dataflow: Dataflow | None) -> Inspection:
    """As `inspect`, with a record of where values come from and go to, if there is a `dataflow`."""
    seen = inspect_static(model)
    products = ProductRecorder(name for name, _ in seen.root.named_parameters())
    places = {id(site.module) for site in seen.sites}
    probe = _probed(seen.root, seen.modules, inputs, places, products, dataflow)
    weights = weights_of(products, seen.modules)
    sites = weight_sites(probed_sites(seen.sites, seen.modules, probe), weights, seen.modules)
    findings = diagnose(sites, seen.modules, probe)
    flow = dataflow if probe.ran else None
    return replace(seen, sites=sites, findings=findings, probe=probe, weights=weights, dataflow=flow)


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
    root: nn.Module,
    modules: list[Named],
    inputs: Any,
    sites: set[int],
    products: ProductRecorder,
    dataflow: Dataflow | None,
) -> Probe:
    every = [named.module for named in modules]
    recorders: list[Recorder] = [products] if dataflow is None else [products, dataflow]
    if inputs is not None:
        return run_probe(root, every, [given_inputs(root, inputs)], sites, recorders, given=True)
    try:
        probe = run_probe(root, every, made_inputs(root), sites, recorders)
    except Exception as error:
        probe = Probe(reason=f"no inputs could be made from the model's config: {error}; give inputs=")
    if not probe.ran:
        for recorder in recorders:
            recorder.start({})  # what a forward did before it broke off
    _probe_parts(probe, every, sites, products, dataflow)
    return probe


_MOST_PARTS = 8
"""Parts probed: each costs a forward."""


def _probe_parts(
    probe: Probe,
    every: list[nn.Module],
    sites: set[int],
    products: ProductRecorder,
    dataflow: Dataflow | None,
) -> None:
    """Add to `probe` what the parts do that it has not seen; `every` are the modules, the model first.

    The text inputs of a model of images and text leave its vision model out; and where the whole cannot be
    run at all, its parts often can.
    """
    paths = {id(module): path for path, module in every[0].named_modules()}
    covered: set[int] = set()
    tried = 0
    for module in every[1:]:
        inside = list(module.modules())
        if tried == _MOST_PARTS or not says_what_it_takes(module) or id(module) in covered:
            continue
        if any(probe.counts.get(id(one)) for one in inside):
            continue
        tried += 1
        try:
            own = ProductRecorder(name for name, _ in module.named_parameters())
            flows = None if dataflow is None else Dataflow(dataflow.fields)
            recorders: list[Recorder] = [own] if flows is None else [own, flows]
            part = run_probe(module, inside, made_inputs(module), sites, recorders)
        except Exception:  # no inputs could be made from its config: it stays as it is, not probed
            continue
        if part.ran:
            probe.add(part)
            products.add(own, paths[id(module)])
            if dataflow is not None and flows is not None:
                dataflow.add(flows)
            covered |= {id(one) for one in inside}
    if covered and not probe.ran:
        probe.how, probe.covered = "parts of the model, each by itself", covered

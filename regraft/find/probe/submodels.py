"""Parts of a model that are models of their own, run by themselves where the whole did not run them.

The text inputs of a model of images and text leave its vision model out; and where the whole cannot be run
at all, its parts often can.
"""

from __future__ import annotations

from torch import nn

from regraft.find.probe.example_inputs import made_inputs
from regraft.find.probe.example_inputs_hf import says_what_it_takes
from regraft.find.probe.products import ProductRecorder
from regraft.find.probe.run import Probe, run_probe

_MOST = 8
"""Parts probed: each costs a forward."""


def probe_parts(probe: Probe, every: list[nn.Module], sites: set[int], products: ProductRecorder) -> None:
    """Add to `probe` what the parts do that it has not seen; `every` are the modules, the model first."""
    paths = {id(module): path for path, module in every[0].named_modules()}
    covered: set[int] = set()
    tried = 0
    for module in every[1:]:
        inside = list(module.modules())
        if tried == _MOST or not says_what_it_takes(module) or id(module) in covered:
            continue
        if any(probe.counts.get(id(one)) for one in inside):
            continue
        tried += 1
        try:
            own = ProductRecorder(name for name, _ in module.named_parameters())
            part = run_probe(module, inside, made_inputs(module), sites, [own])
        except Exception:  # no inputs could be made from its config: it stays as it is, not probed
            continue
        if part.ran:
            probe.add(part)
            products.add(own, paths[id(module)])
            covered |= {id(one) for one in inside}
    if covered and not probe.ran:
        probe.how, probe.covered = "parts of the model, each by itself", covered

"""A diagnosis: what is wrong with a model's regularization as it stands, from its sites and its probe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from regraft.find.balance import named_remedy, unrecognized_draws
from regraft.find.graph_nodes import nodes_fixed_by_tracing
from regraft.find.probe.run import Probe
from regraft.find.recognize import foreign
from regraft.find.site import Site
from regraft.find.walk import Named
from regraft.ops import ATTENTION, PLAIN


@dataclass(frozen=True)
class Finding:
    """Something wrong with the model as it stands: where, what, which line, and what to do."""

    path: str
    finding: str
    source: str | None
    remedy: str


def diagnose(sites: list[Site], modules: list[Named], probe: Probe) -> list[Finding]:
    """Every finding, the most serious kinds first."""
    noise = [site for site in sites if site.family in ("Dropout", "DropPath")]
    other_rates = list(_other_rate(noise))
    return [
        *_draws_in_eval(modules, probe),
        *_baked_in(noise),
        *(
            Finding(path, what, source, "trace with regraft.trace, which keeps more modules whole")
            for path, what, source in nodes_fixed_by_tracing(modules, {site.path for site in sites})
        ),
        *other_rates,
        *_unused(noise, modules, {finding.path for finding in other_rates}),
        *_vanished_drop_paths(modules),
        *_foreign(modules),
        *_out_of_reach(modules, probe),
        *(
            Finding(path, row["finding"], row["source"], row["remedy"])
            for row in unrecognized_draws(sites, modules, probe)
            for path in row["paths"]
        ),
    ]


def _draws_in_eval(modules: list[Named], probe: Probe) -> Iterator[Finding]:
    names = {id(named.module): named.paths[0] for named in modules}
    for called in probe.eval_called:
        if called.node:
            continue
        rate = "" if called.p is None else f" at p={called.p:g}"
        why = " (it does not know about .eval())" if called.op == ATTENTION else ""
        yield Finding(
            names[id(called.owner)],
            f"{called.op} drops{rate} in eval too{why}",
            called.sources[0],
            "apply {'Dropout': 'dropout'}: the graft follows .training; or pass the rate only in training",
        )


def _baked_in(noise: list[Site]) -> Iterator[Finding]:
    """Nodes of a graph that drop, or do not, whatever the mode, until a graft stands there."""
    for site in noise:
        if site.kind == "node" and site.variant is None and (site.draws_in_eval or site.baked is False):
            selected = "Dropout" if site.op in PLAIN else site.op
            when = "in eval too" if site.draws_in_eval else "not in training either"
            yield Finding(
                site.path,
                f"{site.written} was fixed by tracing: it drops {when}",
                site.source,
                f"apply {{'{selected}': '{'droppath' if site.op == 'DropPath' else 'dropout'}'}}: "
                "the graft follows .training",
            )


def _other_rate(noise: list[Site]) -> Iterator[Finding]:
    """A dropout that is made and never called, beside a call with a number of its own."""
    calls = [site for site in noise if site.kind == "call" and site.p]
    for dead in noise:
        if dead.calls != 0 or dead.kind != "module" or not dead.p:
            continue
        for call in calls:
            beside = dead.path.rpartition(".")[0] == call.path
            if beside and len(call.paths) == 1 and dead.p != call.p:
                yield Finding(
                    dead.path,
                    f"declares a rate of {dead.p:g}, but {call.op} beside it applies {call.p:g}",
                    call.source,
                    "set the rate where it is used: "
                    f"{{'{call.op}@{call.path or '**'}': 'dropout(p={dead.p:g})'}}",
                )


def _unused(noise: list[Site], modules: list[Named], told: set[str]) -> Iterator[Finding]:
    """Dropouts that are never called, that are in eval while the model trains, and those at rate 0."""
    for site in noise:
        dead = site.calls == 0 and site.kind == "module" and site.obstacle is None
        if dead and site.p and site.path not in told:
            what = f"{site.written} is made but never used by this forward"
            yield Finding(site.path, what, None, "nothing drops there; delete it, or call it")
    for site in noise if modules[0].module.training else ():
        if site.p and not site.training:
            what = f"{site.written} is in eval while the model trains, so it drops nothing"
            yield Finding(
                site.path, what, site.source, "model.train() switches it on again, if that is not meant"
            )
    if noise and all(site.p == 0 for site in noise):
        what = f"every rate is 0: all {len(noise)} dropout sites do nothing, and R-Drop's KL would be 0"
        yield Finding("", what, None, "name a rate in the rule, or build the model with rates above 0")


def _vanished_drop_paths(modules: list[Named]) -> Iterator[Finding]:
    for named in modules:
        name = named.paths[0].rpartition(".")[2]
        if type(named.module) is nn.Identity and name.startswith(("drop_path", "stochastic_depth")):
            yield Finding(
                named.paths[0],
                "a DropPath of rate 0 that became nn.Identity: the site is gone",
                None,
                f"droppath at 'after:Identity@**.{name.rstrip('0123456789')}*' brings it back, or a model "
                "built with a rate above 0",
            )


def _foreign(modules: list[Named]) -> Iterator[Finding]:
    """Modules whose inside is not torch's own layers; of nested ones the outermost."""
    told: list[str] = []
    for named in modules:
        path = named.paths[0]
        found = foreign(named.module)
        if found is not None and not any(path.startswith(f"{above}.") for above in told):
            told.append(path)
            yield Finding(path, found[0], None, found[1])


def _out_of_reach(modules: list[Named], probe: Probe) -> Iterator[Finding]:
    """Named randomness that is no regularizer of a layer's output, once for each line or module."""
    paths = {id(named.module): named.paths[0] for named in modules}
    told = set()
    for draw in probe.draws:
        key = (draw.kind, draw.source if draw.kind == "LayerDrop" else paths[id(draw.module)])
        if draw.kind and draw.kind in _KINDS and key not in told:
            told.add(key)
            where = "" if draw.kind == "LayerDrop" else paths[id(draw.module)]
            yield Finding(where, _KINDS[draw.kind], draw.source or None, named_remedy(draw.kind))
    config: Any = getattr(modules[0].module, "config", None)
    rates = [getattr(config, name, 0) for name in ("mask_time_prob", "mask_feature_prob")]
    if (
        getattr(config, "apply_spec_augment", False)
        and any(rates)
        and not any(d == "SpecAugment" for d, _ in told)
    ):
        what = f"SpecAugment masks spans at {max(rates):g}, drawn from numpy: out of reach"
        yield Finding("", what, None, named_remedy("SpecAugment"))


_KINDS = {
    "LayerDrop": "LayerDrop skips whole layers by a scalar draw: out of reach",
    "SpecAugment": "SpecAugment masks spans, drawn from numpy: out of reach",
    "jitter": "a router's input is multiplied with random numbers (jitter): out of reach",
    "DropBlock": "DropBlock is called as a function: out of reach",
    "RReLU": "RReLU draws its slopes: out of reach",
}

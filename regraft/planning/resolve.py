"""Decisions: what becomes of one selected site under one rule, with the rate, or the reason why nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from regraft.errors import RateError
from regraft.find.balance import is_whole_class
from regraft.find.probe.dataflow import BATCH, CHANNEL, Dataflow, Value, axes_of
from regraft.find.site import Site
from regraft.ops import ATTENTION, ATTENTIONS, DROP_PATH, HIDDEN, RECURRENT_OPS
from regraft.variants.module import check_rate
from regraft.variants.registry import OF_RULES, complete_options, spec
from regraft.variants.spec import DEFAULT_RATE, Spec, Variant

_RATE_ONLY = ("dropout", "off")
_MOST_SCORES = 2**30


@dataclass(frozen=True)
class Decision:
    """What a rule decided for one site: a variant with its rate, or the reason why not.

    Attributes:
        residual: of an insertion, is what the module adds to its input dropped, and not its whole output?
        in_place: does the module write to its input?
        at_zero: is the reason that the site's rate is 0?
    """

    site: Site
    rule: int
    variant: Variant | None = None
    residual: bool = False
    in_place: bool = False
    cost: str | None = None
    reason: str | None = None
    remedy: str = ""
    at_zero: bool = False


def decide(
    site: Site, index: int, selector: str, variant: Variant, fused: str, dataflow: Dataflow | None = None
) -> Decision:
    """The decision for `site` under rule number `index`.

    `dataflow`, where there is one, has shown which axes the values at the site have.

    Raises:
        RateError: the rule gives the site a rate outside [0, 1).
    """
    found = spec(variant.name)
    why_not = _why_not_matrix(site, selector, found, variant)
    why_not = why_not or _why_not(site, found, variant, str(variant.options.get("fused", fused)))
    axes, unknown = _axes(site, found, variant, dataflow)
    why_not = why_not or unknown
    if why_not is not None:
        return Decision(site, index, reason=why_not[0], remedy=why_not[1])
    p = _rate(site, found, variant, f"rule {index}: {selector!r}, at {site.path!r}")
    example = f"{selector!r}: '{variant.name}(p=0.1)'"
    if p is not None and _own_rate_of_1(site, variant):
        return Decision(
            site, index, reason="its rate is 1: it drops everything", remedy=f"name one: {example}"
        )
    if p == 0 and not _sets_rate(variant) and _needs_rate(found, variant):
        return Decision(site, index, reason="its rate is 0", remedy=f"name one: {example}", at_zero=True)
    options = {key: value for key, value in variant.options.items() if key not in ("p", *OF_RULES)} | axes
    kept = _kept_rate(site, found, variant, p)
    decided = Variant(variant.name, options if kept is None else {"p": kept, **options})
    return Decision(site, index, decided, cost=_cost(site, found, variant))


def _axes(
    site: Site, found: Spec, variant: Variant, dataflow: Dataflow | None
) -> tuple[dict[str, int], tuple[str, str] | None]:
    """The options that say which axes the variant acts on, as far as they are not its own, or why not.

    They are read off the operations that made what is dropped. Of an unprobed site nothing is known: there
    the variant goes by the number of axes, as it does outside regraft.
    """
    values = [] if dataflow is None else _values(site, dataflow)
    attends = site.op in ATTENTIONS or (bool(values) and all(value.attends for value in values))
    if found.attention and not attends:
        return {}, (
            f"{found.name!r} acts on attention weights, and {site.op} was not seen to be given them",
            f"it fits {', '.join(sorted(ATTENTIONS))}, as Hugging Face models attend with "
            "attn_implementation='sdpa', and a dropout between the softmax and the product with the values",
        )
    if not found.activations or site.op in RECURRENT_OPS:
        return {}, None  # of a recurrent network the kernel's own arguments say it, at each call
    if site.op in ATTENTIONS or any(value.weights for value in values):
        return {}, (
            f"these are attention weights, and {found.name!r} is for activations",
            "'dropkey' and 'drophead' drop keys and heads; 'gaussian' and its like act on each weight",
        )
    if not values:
        return {}, None
    seen, rank = axes_of(values) or {}, len(values[0].axes)
    given = complete_options(found, variant.options)
    axes = {}
    if given.get("channel_axis", 0) is None and rank > 2:
        if CHANNEL not in seen:
            return {}, (
                "which axis holds the channels was not seen",
                f"say it: '{found.name}(channel_axis=-1)' for the last",
            )
        if seen[CHANNEL] != (1 if rank >= 4 else rank - 1):
            axes["channel_axis"] = -1 if seen[CHANNEL] == rank - 1 else seen[CHANNEL]
    if found.name == "dropblock" and rank == 4 and seen.get(CHANNEL, 1) != 1:
        return {}, ("its channels are not on axis 1, where 'dropblock' has them", "take 'spatial'")
    by_example = "batch_axis" in given or "channel_axis" not in given
    if seen and by_example and given.get("batch_axis") is None and seen.get(BATCH) != 0:
        if BATCH not in seen:
            return {}, ("no axis of it holds the examples, as of a packed sequence", "drop its input instead")
        if "batch_axis" not in given:
            return {}, (
                f"its examples are on axis {seen[BATCH]}, and {found.name!r} looks for them on the first",
                "'spatial' and 'droppath' take a batch_axis",
            )
        axes["batch_axis"] = seen[BATCH]
    return axes, None


def _values(site: Site, dataflow: Dataflow) -> list[Value]:
    """What flows through a site, at each of its calls."""
    if site.kind == "inserted":
        if site.node:
            return []
        of_output = dataflow.outputs_of(site.module, site.field)
        return dataflow.inputs_of(site.module) if site.position == "before" else of_output
    if site.kind == "module":
        return dataflow.inputs_of(site.module)
    return dataflow.calls.get((id(site.module), site.op, site.node), [])


def _why_not(site: Site, found: Spec, variant: Variant, fused: str) -> tuple[str, str] | None:
    if not found.fits(site.family):
        return f"{found.name!r} cannot replace {site.op}", "narrow the rule, or choose another variant"
    if site.obstacle is not None:
        return site.obstacle
    if site.calls == 0:
        return (
            f"{'nothing used it' if site.kind == 'weight' else 'its forward was never called'} in the probe",
            "nothing to regularize unless another input runs it: then give that as inputs=",
        )
    if site.op in RECURRENT_OPS and getattr(site.module, "num_layers", 2) == 1:
        return f"an {site.op} of one layer has no dropout: it drops between layers", "drop its output instead"
    if found.name == "off" and site.family not in ("Dropout", "DropPath") and site.variant is None:
        return "there is no regularizer to take out", "drop the rule"
    if site.kind == "call" and site.op == DROP_PATH and (found.name != "droppath" or "p" in variant.options):
        return (
            "it is written out in the forward: 'droppath' can draw it, at the rate that is written there",
            "set the rate in the model's own attribute or config",
        )
    if found.name in _RATE_ONLY:
        return None
    if _rate_unknown(site) and "p" not in variant.options and acts_in_eval(variant):
        return (
            "its rate is not known, since the probe did not run it, and in eval a call carries none",
            f"name one: '{found.name}(p=0.1)', or give inputs= that run it",
        )
    inside = "call" if site.op in HIDDEN.values() else site.kind
    if inside in ("call", "node") and found.adds_state(complete_options(found, variant.options)):
        return (
            f"{found.name!r} brings state of its own, and a {inside} has no module to keep it",
            "choose a variant without state, or write the call as an nn.Dropout",
        )
    return None if _keeps_kernel(found, variant) else _why_not_attention(site, fused)


def _keeps_kernel(found: Spec, variant: Variant) -> bool:
    """Can fused attention take the variant as a mask?"""
    return found.name == "dropkey" and complete_options(found, variant.options)["keys"] == "column"


def _why_not_matrix(site: Site, selector: str, found: Spec, variant: Variant) -> tuple[str, str] | None:
    """Why a matrix that multiplies is left: a router, or a form that the variant cannot act on."""
    if site.role == "router" and selector.partition("@")[0] != "router" and found.fits(site.family):
        return (
            "it is a router: its result chooses what runs, and noise would change the choice",
            f"a rule of its own takes it: 'router@{site.path}'",
        )
    if site.kind != "weight" or not found.fits(site.family):
        return None
    if found.weight_function is None:
        return (
            f"{found.name!r} acts in a linear layer's own forward, and here {type(site.module).__name__} "
            "multiplies by the weight",
            "choose 'dropconnect' or 'mixout'",
        )
    if found.weight_unfit is not None:
        unfit = found.weight_unfit(complete_options(found, variant.options), site)
        if unfit is not None:
            return unfit
    if isinstance(site.owner, nn.RNNCellBase) and (site.calls or 0) > 1:
        return (
            "its cell runs once a step, and each step would draw anew",
            "use the whole network (nn.LSTM, nn.GRU), whose forward runs once a sequence",
        )
    return None


def _why_not_attention(site: Site, fused: str) -> tuple[str, str] | None:
    if site.op != ATTENTION:
        return None
    if fused == "keep":
        return (
            "the fused attention kernel is kept, and draws its own dropout",
            "fused='auto' writes attention out; 'dropout(p=...)' sets the kernel's rate",
        )
    scores = site.call.score_bytes if site.call else 0
    if fused == "auto" and scores > _MOST_SCORES:
        return (
            f"written out, one call's attention scores would take {scores / 2**30:.1f} GiB",
            "fused='write' writes it out all the same; 'dropout(p=...)' sets the fused kernel's rate",
        )
    return None


def _cost(site: Site, found: Spec, variant: Variant) -> str | None:
    if is_whole_class(site):
        return f"the whole forward of {site.type} is replaced"
    if variant.name in _RATE_ONLY:
        return None
    if site.op == ATTENTION and _keeps_kernel(found, variant):
        return "attention stays fused, with a mask of its keys"
    if site.op in ATTENTIONS:
        scores = site.call.score_bytes if site.call else 0
        size = f", {_bytes(scores)} a call as probed" if scores else ""
        return f"attention is written out: its scores are kept in memory{size}"
    return _ONE_BY_ONE if site.op in RECURRENT_OPS else None


_ONE_BY_ONE = (
    "its layers run one after the other, no longer in one kernel: 0.95 to 1.07 times a training step, "
    "measured on a CPU core with 2 to 4 layers; not measured on a GPU"
)


def _bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _own_rate_of_1(site: Site, variant: Variant) -> bool:
    """Does the model itself drop everything, at a rate that the rule leaves as it is?"""
    rates = site.call.rates if site.call else [site.p]
    return variant.options.get("p") is None and any(rate is not None and rate >= 1 for rate in rates)


def _sets_rate(variant: Variant) -> bool:
    # A rate relative to 0 is still 0.
    p = variant.options.get("p")
    return p is not None and not isinstance(p, str)


def _needs_rate(found: Spec, variant: Variant) -> bool:
    return found.needs_rate is None or found.needs_rate(complete_options(found, variant.options))


def acts_in_eval(variant: Variant) -> bool:
    """Is the eval output with this variant another than the original's?"""
    found = spec(variant.name)
    return found.changes_eval is not None and found.changes_eval(complete_options(found, variant.options))


def _rate(site: Site, found: Spec, variant: Variant, where: str) -> float | None:
    p = variant.options.get("p")
    if not found.rated:
        return None
    if _rate_unknown(site) and (p is None or isinstance(p, str)):
        return None
    if callable(p):
        return check_rate(p(site), where=where)
    if isinstance(p, str):
        base = DEFAULT_RATE if site.p is None else site.p
        rate = base * float(p[1:])
        if not 0 <= rate < 1:
            raise RateError(
                f"p={p!r} of a rate of {base:g} is {rate:g}, not in [0, 1)",
                where=where,
                remedy="a smaller factor",
            )
        return rate
    if p is not None:
        return float(p)
    return DEFAULT_RATE if site.p is None else site.p


def _rate_unknown(site: Site) -> bool:
    """Is it a call that the probe did not run, so that its rate is seen only when it does?"""
    return site.call is not None and site.p is None


def _kept_rate(site: Site, found: Spec, variant: Variant, p: float | None) -> float | str | None:
    """The rate as the graft keeps it: calls carry their own, which a rule may leave or multiply."""
    given = variant.options.get("p")
    if _rate_unknown(site) and p is None:
        return given  # it is a call, and carries the rate that this is relative to
    if site.kind not in ("call", "node") or site.family == "Linear" or p is None:
        return p
    if found.changes_eval is not None:
        return p  # in eval the calls carry no rate
    if isinstance(given, str):
        return given
    return None if given is None else p

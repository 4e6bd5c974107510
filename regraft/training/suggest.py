"""`regraft.suggest`: which regularizers a model of this kind and size has been trained with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from regraft.errors import OptionError, RegraftError
from regraft.find.inspection import Inspection, inspect
from regraft.find.original import original_class
from regraft.planning import plan_of
from regraft.report.view import SCHEMA, View
from regraft.rules import read_rules
from regraft.training.published import (
    ALPHAS,
    DEVLIN,
    GHIASI,
    JAIN,
    LEE,
    LIANG,
    LIU,
    LOST_BY_IT,
    MERITY,
    SRIVASTAVA,
    drop_path_rate,
)
from regraft.training.traits import Traits

_FEW = 10_000
_BIG = 200_000_000
_ACTIVATIONS = {"ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "ELU"}


@dataclass(frozen=True)
class Suggestion:
    """One piece of advice: a rule for `regraft.apply`, or a line of code, with its reason and its source."""

    rule: list[str] | None
    code: str | None
    reason: str
    source: str


@dataclass(frozen=True, repr=False)
class Advice(View):
    """What `regraft.suggest` has to say; nothing of it is applied.

    Attributes:
        model: the model's class name.
        kind: what kind of model it was taken for.
        parameters: how many train.
        examples: how many there are to train on, as given.
        advice: each with its `rule` or `code`, its `reason` and its `source`.
        notes: what a reader should know first.
    """

    model: str
    kind: str
    parameters: int
    examples: int
    advice: list[Suggestion]
    notes: list[str] = field(default_factory=list)

    @property
    def rules(self) -> dict[str, str]:
        """The rules among the advice, as `regraft.apply` takes them."""
        return {one.rule[0]: one.rule[1] for one in self.advice if one.rule is not None}

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain JSON values."""
        return {"schema": SCHEMA, "view": "advice", **asdict(self)}


def suggest(model: nn.Module, examples: int, inputs: Any = None) -> Advice:
    """Advice for a model: rules and settings with their reasons and sources. Changes nothing.

    It goes by what is known: the parameters that train against the examples, the rates that are 0, the
    kind of model, and published settings for that kind. It knows nothing of your data; a validation set
    does.

    Args:
        model: any module, as it will be trained: frozen parameters are not counted.
        examples: how many there are to train on.
        inputs: for the probe, see `regraft.inspect`.

    Returns:
        The advice: print it; `.rules` is what `regraft.apply` takes.

    Raises:
        OptionError: `examples` is no number of examples.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10))
        >>> advice = regraft.suggest(net, examples=10_000)
        >>> advice.rules
        {'after:ReLU': 'dropout(p=0.5)', 'before:Sequential': 'dropout(p=0.2)'}
        >>> advice.advice[0].source
        'Srivastava et al. 2014, Dropout'
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise OptionError(
            f"examples={examples!r} is no number of examples", remedy="how many there are to train on"
        )
    inspection = inspect(model, inputs)
    seen = Traits(inspection, examples)
    found = [one for one in _advice(seen) if one.rule is None or _fits(inspection, one.rule)]
    return Advice(
        type(inspection.root).__name__, seen.kind, seen.parameters, examples, found, list(_notes(seen))
    )


def _fits(inspection: Inspection, rule: list[str]) -> bool:
    """Would the rule graft anything here?"""
    try:
        return bool(plan_of(inspection, read_rules([tuple(rule)])).grafted)
    except RegraftError:
        return False


def _notes(seen: Traits) -> Iterator[str]:
    ratio = seen.parameters / seen.examples
    if seen.small:
        yield (
            f"the model is small for its data, {ratio:.2g} parameters for each example: dropout throughout "
            f"may cost more than it brings; {LOST_BY_IT} ({LIU})"
        )
    if seen.noise and not seen.rates:
        yield f"every rate is 0: none of the model's {len(seen.noise)} dropout sites drops anything"
    outside = [rate for rate in seen.rates if rate > 0.5]
    if outside:
        yield f"a rate of {outside[-1]:g} is above the range of 0.2 to 0.5 that is in use ({SRIVASTAVA})"


def _advice(seen: Traits) -> Iterator[Suggestion]:
    yield from _BY_KIND[seen.kind](seen)
    if seen.small:
        yield Suggestion(
            None,
            'regraft.schedule(model, p={"start": 0.1, "end": 0.0, "steps": total // 6})',
            "dropout that ends early helps a model that is small for its data to fit",
            LIU,
        )
    if seen.kind in ALPHAS:
        known = ALPHAS[seen.kind]
        code = f"regraft.rdrop(model, alpha={known.alpha:g})"
        yield Suggestion(None, code, f"the published weight for {known.task}; it needs rates above 0", LIANG)


def _text(seen: Traits) -> Iterator[Suggestion]:
    if seen.noise and not seen.rates:
        yield _rule(
            "Dropout",
            "dropout(p=0.1)",
            "all rates are 0; such models are trained and fine-tuned at 0.1",
            DEVLIN,
        )
    if seen.every >= _BIG and seen.examples <= _FEW:
        yield _rule(
            "Linear",
            "mixout(p=0.9)",
            f"a large model with {seen.examples:,} examples: mixing in the pretrained weights keeps "
            "fine-tuning from failing; 0.7 to 0.9 were tried",
            LEE,
        )


def _causal(seen: Traits) -> Iterator[Suggestion]:
    embeddings = seen.of_type(nn.Embedding)
    if embeddings:
        reason = "noise on the token embeddings, for fine-tuning on instructions; 5, 10 and 15 were tried"
        yield _rule(f"Embedding@{embeddings[0]}", "neftune(alpha=5.0)", reason, JAIN)


def _vision(seen: Traits) -> Iterator[Suggestion]:
    name = type(seen.root).__name__
    if seen.small or any(site.op == "DropPath" and site.p for site in seen.noise):
        return
    rate, source = drop_path_rate(name, seen.every)
    gone = [path for path, module in seen.modules if type(module) is nn.Identity and "drop_path" in path]
    blocks = [
        original_class(module).__name__
        for path, module in seen.modules
        if path.rpartition(".")[2].isdigit() and list(module.children()) and "Attention" not in path
    ]
    key = (
        "after:Identity@**.drop_path*"
        if gone
        else f"after:{max(set(blocks), key=blocks.count)}"
        if blocks
        else ""
    )
    if key:
        what = "its drop-paths were built away, at rate 0" if gone else "it was built without drop-paths"
        reason = f"{what}; the rate of the published model of its size, growing with the depth"
        yield _rule(key, f"droppath(p={rate:g})", reason, source)


def _convolutional(seen: Traits) -> Iterator[Suggestion]:
    if seen.small:
        return
    yield from _vision(seen)
    stages = [path for path, _ in seen.modules if path in ("layer3", "layer4")]
    if stages:
        reason = "squares dropped behind the last two stages: 0.1 of squares of 7 was best for ResNet-50"
        yield _rule("after:re:layer[34]", "dropblock(p=0.1, block_size=7)", reason, GHIASI)
    heads = seen.of_type(nn.Linear)
    if heads and not seen.rates:
        yield _rule(
            f"before:Linear@{heads[-1]}",
            "dropout(p=0.2)",
            "no dropout in front of the classifier",
            SRIVASTAVA,
        )


def _recurrent(seen: Traits) -> Iterator[Suggestion]:
    for kind, cls in (("LSTM", nn.LSTM), ("GRU", nn.GRU), ("RNN", nn.RNN)):
        for path in seen.of_type(cls)[:1]:
            reason = "one mask for all positions of what the recurrence returns"
            yield _rule(f"after:{kind}@{path}", "spatial(p=0.4)", reason, MERITY)
            yield _rule(kind, "dropout(p=0.3)", "between its layers", MERITY)
    if seen.of_type(nn.Embedding):
        yield _rule("after:Embedding", "spatial(p=0.4)", "one mask for all positions of the input", MERITY)


def _feed_forward(seen: Traits) -> Iterator[Suggestion]:
    if seen.small or seen.rates:
        return
    activations = [name for name in seen.names if name in ("ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "ELU")]
    for name in sorted(activations)[:1]:
        yield _rule(
            f"after:{name}", "dropout(p=0.5)", "hidden units, in a network without dropout", SRIVASTAVA
        )
    root = type(seen.root).__name__
    yield _rule(f"before:{root}", "dropout(p=0.2)", "the input, in a network without dropout", SRIVASTAVA)
    yield Suggestion(
        None,
        'regraft.max_norm(model, {"Linear": 3.0}, optimizer)',
        "with a high learning rate and momentum, norms held to 3 or 4; of a pretrained network '1.1x'",
        SRIVASTAVA,
    )


def _rule(key: str, value: str, reason: str, source: str) -> Suggestion:
    return Suggestion([key, value], None, reason, source)


_BY_KIND = {
    "text encoder": _text,
    "sequence-to-sequence model": _text,
    "causal language model": _causal,
    "vision transformer": _vision,
    "convolutional network": _convolutional,
    "recurrent network": _recurrent,
    "feed-forward network": _feed_forward,
}

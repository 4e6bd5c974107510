"""What there is to say of a model, kind by kind: rules and settings that were published for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regraft.record import original_class
from regraft.training.advice.profile import Traits
from regraft.training.advice.published import (
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


def notes_on(seen: Traits) -> Iterator[str]:
    """What a reader should know before any advice."""
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


def advice_for(seen: Traits) -> Iterator[Suggestion]:
    """The advice for a model, in the order of its importance."""
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

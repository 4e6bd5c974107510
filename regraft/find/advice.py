"""Advice for a model: regularizers that models of its kind and size have been trained with.

`regraft.suggest` tells all of it, and the headline of an inspection what comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from regraft.find.insertion_points import insertable, means
from regraft.find.probe.run import Probe
from regraft.find.selectors import read_selector
from regraft.find.site import Site
from regraft.find.walk import Named
from regraft.ops import ATTENTION, RECURRENT_OPS
from regraft.record import original_class
from regraft.report.fold import fold
from regraft.variants.registry import parse_variant, spec

SRIVASTAVA = "Srivastava et al. 2014, Dropout"
LIANG = "Liang et al. 2021, R-Drop"
LIU = "Liu et al. 2023, Dropout Reduces Underfitting"
DEIT3 = "Touvron et al. 2022, DeiT III, ImageNet-1k recipe"
CONVNEXT = "Liu et al. 2022, ConvNeXt, ImageNet-1k recipe"
SWIN = "Liu et al. 2021, Swin Transformer, ImageNet-1k recipe"
DEVLIN = "Devlin et al. 2019, BERT"
LEE = "Lee et al. 2020, Mixout"
JAIN = "Jain et al. 2024, NEFTune"
GHIASI = "Ghiasi et al. 2018, DropBlock"
WANG = "Wang et al. 2024, LoRA Meets Dropout"
MERITY = "Merity et al. 2018, AWD-LSTM"
RESULTS = "docs/results.md: 50 and 200 labelled film reviews, 8 seeds each"

FEW_LABELS = 200
"""Up to here `RESULTS` is a guide: what helped with 50 and with 200 labels did not help with 1,000."""
SMALL = 5.0
"""Trainable parameters per example. Dropout hurt ViT-T on ImageNet-1k (4.5) and helped ViT-B (68)."""
LOST_BY_IT = (
    "on ImageNet-1k, ViT-T (4.5 parameters per image) fell from 73.9 % to 67.9 % with dropout and to 72.6 % "
    "with stochastic depth, and rose to 74.3 % where dropout ended after a sixth of the training"
)


_FEW_EXAMPLES = 10_000
_LARGE_MODEL = 200_000_000
_ACTIVATIONS = ("ELU", "GELU", "ReLU", "Sigmoid", "SiLU", "Tanh")

ALPHAS = {
    "text encoder": (1.0, "GLUE, where it is chosen among 0.1, 0.5 and 1.0"),
    "sequence-to-sequence model": (5.0, "translation; 0.7 for summarization with BART"),
    "causal language model": (1.0, "language modelling on WikiText-103"),
    "vision transformer": (0.6, "ViT on CIFAR-100 and ImageNet"),
}
"""By kind of model: the published weight of R-Drop's KL, and the task that it was published for."""

DROP_PATHS: dict[str, tuple[str, tuple[tuple[float, float], ...]]] = {
    "ConvNeXt": (CONVNEXT, ((28.6, 0.1), (50.2, 0.4), (88.6, 0.5), (197.8, 0.5))),
    "Swin": (SWIN, ((28.3, 0.2), (49.6, 0.3), (87.8, 0.5))),
    "": (DEIT3, ((22.0, 0.05), (86.6, 0.2), (304.4, 0.45), (632.1, 0.6))),
}
"""By prefix of the class name: the source; millions of parameters, and the rate."""


@dataclass(frozen=True)
class Suggestion:
    """One piece of advice: a rule for `regraft.apply`, or a line of code, with its reason and its source."""

    rule: list[str] | None
    code: str | None
    reason: str
    source: str


class ModelProfile:
    """What the advice goes by: the kind of a model, its size against its data, and its rates.

    Without `examples` nothing is said that goes by the amount of data.
    """

    def __init__(self, modules: Sequence[Named], sites: Sequence[Site], examples: int | None = None) -> None:
        self.modules = [(named.paths[0], named.module) for named in modules]
        self.root = self.modules[0][1]
        self.sites = sites
        self.names = {original_class(module).__name__ for _, module in self.modules}
        self.parameters = sum(p.numel() for p in self.root.parameters())
        self.trainable = sum(p.numel() for p in self.root.parameters() if p.requires_grad)
        self.examples = examples
        self.small = examples is not None and self.trainable < SMALL * examples
        families = ("Dropout", "DropPath")
        self.noise = [site for site in sites if site.family in families and site.calls != 0]
        self.rates = sorted({site.p for site in self.noise if site.p})
        self.has_lora = any("lora_" in name for name, _ in self.root.named_parameters())
        self.kind = self._kind()
        few = examples is not None and examples <= FEW_LABELS
        self.has_few_labels = self.kind == "text encoder" and bool(self.rates) and few

    def of_type(self, *types: type[nn.Module]) -> list[str]:
        """Paths of the modules of these types."""
        return [path for path, module in self.modules if isinstance(module, types)]

    def frozen(self) -> list[str]:
        """Paths of the outermost modules whose parameters are all frozen, folded."""
        found: list[str] = []
        for path, module in self.modules:
            weights = list(module.parameters())
            inside = any(path == outer or path.startswith(f"{outer}.") for outer in found)
            if path and weights and not inside and not any(weight.requires_grad for weight in weights):
                found.append(path)
        return fold(found) if self.trainable else []

    def _kind(self) -> str:
        config: Any = getattr(self.root, "config", None)
        attends = any("Attention" in name for name in self.names)
        if self.of_type(nn.LSTM, nn.GRU, nn.RNN) and not attends:
            return "recurrent network"
        if getattr(config, "vocab_size", None) or (attends and self.of_type(nn.Embedding)):
            if getattr(config, "is_encoder_decoder", False):
                return "sequence-to-sequence model"
            # Inside a PEFT model, too, which has a class of its own.
            decodes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.names)
            return "causal language model" if decodes else "text encoder"
        if self.of_type(nn.Conv2d):
            convolves = len(self.of_type(nn.Conv2d)) > len(self.of_type(nn.Linear))
            return "convolutional network" if convolves or not attends else "vision transformer"
        return "text encoder" if attends else "feed-forward network"


def suggestions(profile: ModelProfile) -> Iterator[Suggestion]:
    """The advice for a model: a rate, then R-Drop, then the rest; not all of it may fit."""
    yield from _rates(profile)
    if profile.small:
        code = 'regraft.schedule(model, p={"start": 0.1, "end": 0.0, "steps": total // 6})'
        reason = "dropout that ends early helps a model that is small for its data to fit"
        yield Suggestion(None, code, reason, LIU)
    if profile.has_few_labels:
        reason = "better than 0.1 in accuracy, with 200 labels in likelihood too, for 1.9 times a step"
        yield Suggestion(None, "regraft.rdrop(model, alpha=2)", reason, RESULTS)
    elif profile.kind in ALPHAS:
        alpha, task = ALPHAS[profile.kind]
        reason = f"the published weight for {task}; it needs rates above 0"
        yield Suggestion(None, f"regraft.rdrop(model, alpha={alpha:g})", reason, LIANG)
    yield from _more(profile)


def _rates(profile: ModelProfile) -> Iterator[Suggestion]:
    """Rates for a model that has none, or none in the places where its kind is trained with them."""
    kind = profile.kind
    if profile.has_few_labels and profile.rates[-1] < 0.3:
        reason = "few labels: with 200, better likelihood and calibration than 0.1, and no worse in accuracy"
        yield _rule("Dropout", "dropout(p=0.3)", reason, RESULTS)
        for pattern in profile.frozen():
            reason = (
                "frozen layers learn nothing from noise, and without it R-Drop's passes have them in common"
            )
            yield _rule(f"Dropout@{pattern}.**", "off", reason, RESULTS)
    elif kind in ("text encoder", "sequence-to-sequence model") and profile.noise and not profile.rates:
        reason = "all rates are 0; such models are trained and fine-tuned at 0.1"
        yield _rule("Dropout", "dropout(p=0.1)", reason, DEVLIN)
    elif kind in ("vision transformer", "convolutional network") and not profile.small:
        yield from _drop_path(profile)
        heads = profile.of_type(nn.Linear)
        if kind == "convolutional network" and heads and not profile.rates:
            reason = "there is no dropout in front of the classifier"
            yield _rule(f"before:Linear@{heads[-1]}", "dropout(p=0.2)", reason, SRIVASTAVA)
    elif kind == "recurrent network":
        for name, cls in (("LSTM", nn.LSTM), ("GRU", nn.GRU), ("RNN", nn.RNN)):
            if profile.of_type(cls):
                yield _rule(name, "dropout(p=0.3)", "between its layers", MERITY)
    elif kind == "feed-forward network" and not (profile.small or profile.rates):
        if profile.noise:
            yield _rule("Dropout", "dropout(p=0.5)", "hidden units; all rates are 0", SRIVASTAVA)
            return
        for name in [name for name in _ACTIVATIONS if name in profile.names][:1]:
            reason = "hidden units, in a network without dropout"
            yield _rule(f"after:{name}", "dropout(p=0.5)", reason, SRIVASTAVA)
        root = type(profile.root).__name__
        yield _rule(f"before:{root}", "dropout(p=0.2)", "the input, in a network without dropout", SRIVASTAVA)


def _drop_path(profile: ModelProfile) -> Iterator[Suggestion]:
    if any(site.op == "DropPath" and site.p for site in profile.noise):
        return
    name, millions = type(profile.root).__name__, profile.parameters / 1e6
    source, sizes = next(known for prefix, known in DROP_PATHS.items() if name.startswith(prefix))
    # Nearest by ratio, since sizes differ by factors.
    rate = min(sizes, key=lambda size: max(size[0] / millions, millions / size[0]))[1]
    removed = [path for path, m in profile.modules if type(m) is nn.Identity and "drop_path" in path]
    blocks = [
        original_class(module).__name__
        for path, module in profile.modules
        if path.rpartition(".")[2].isdigit() and list(module.children()) and "Attention" not in path
    ]
    if removed:
        key, what = "after:Identity@**.drop_path*", "its drop-paths were built away, at rate 0"
    elif blocks:
        key, what = f"after:{max(set(blocks), key=blocks.count)}", "it was built without drop-paths"
    else:
        return
    reason = f"{what}; the rate of the published model nearest in size, growing with depth"
    yield _rule(key, f"droppath(p={rate:g})", reason, source)


def _more(profile: ModelProfile) -> Iterator[Suggestion]:
    """What comes after a rate and R-Drop."""
    kind = profile.kind
    embeddings = profile.of_type(nn.Embedding)
    if profile.has_lora and any(site.op == ATTENTION for site in profile.sites):
        reason = "with LoRA, masking keys did best among dropouts of attention; the rate is to be tuned"
        yield _rule(ATTENTION, "dropkey(p=0.1)", reason, WANG)
    if kind in ("text encoder", "sequence-to-sequence model"):
        few = profile.examples is not None and profile.examples <= _FEW_EXAMPLES
        if few and profile.parameters >= _LARGE_MODEL:
            reason = (
                f"a large model with {profile.examples:,} examples: mixing in the pretrained weights keeps "
                "fine-tuning from failing; 0.7 to 0.9 were tried"
            )
            yield _rule("Linear", "mixout(p=0.9)", reason, LEE)
    elif kind == "causal language model" and embeddings:
        reason = "noise on the token embeddings, for fine-tuning on instructions; 5, 10 and 15 were tried"
        yield _rule(f"Embedding@{embeddings[0]}", "neftune(alpha=5.0)", reason, JAIN)
    elif kind == "convolutional network" and not profile.small:
        if any(path in ("layer3", "layer4") for path, _ in profile.modules):
            reason = "blocks dropped after the last two stages: 0.1 with blocks of 7 was best for ResNet-50"
            yield _rule("after:re:layer[34]", "dropblock(p=0.1, block_size=7)", reason, GHIASI)
    elif kind == "recurrent network":
        for name, cls in (("LSTM", nn.LSTM), ("GRU", nn.GRU), ("RNN", nn.RNN)):
            for path in profile.of_type(cls)[:1]:
                reason = "one mask for all positions of the recurrence's output"
                yield _rule(f"after:{name}@{path}", "spatial(p=0.4)", reason, MERITY)
        if embeddings:
            reason = "one mask for all positions of the input"
            yield _rule("after:Embedding", "spatial(p=0.4)", reason, MERITY)
    elif kind == "feed-forward network" and not (profile.small or profile.rates):
        code = 'regraft.max_norm(model, {"Linear": 3.0}, optimizer)'
        reason = "with a high learning rate and momentum, norms held to 3 or 4; '1.1x' if it is pretrained"
        yield Suggestion(None, code, reason, SRIVASTAVA)


def _rule(selector: str, variant: str, reason: str, source: str) -> Suggestion:
    return Suggestion([selector.removesuffix("@"), variant], None, reason, source)  # the root has no path


def first_advice(modules: list[Named], sites: list[Site], probe: Probe) -> tuple[list[list[str]], str]:
    """What comes first for a model: rules that fit, or else a line of code; neither if nothing helps.

    R-Drop comes only after rates above 0, without which it does nothing.
    """
    profile = ModelProfile(modules, sites)
    rules: list[list[str]] = []
    for item in suggestions(profile) if profile.trainable else ():
        if item.rule is not None and _fits(item.rule, modules, sites, probe):
            rules.append(item.rule)
        elif item.code is not None and (rules or profile.rates):
            return rules, "" if rules else item.code
    return rules, ""


def _fits(rule: list[str], modules: list[Named], sites: list[Site], probe: Probe) -> bool:
    """Is there a place for the rule, as far as a look without the flow of values can tell?"""
    selector, found = read_selector(rule[0]), spec(parse_variant(rule[1]).name)
    if selector.position:
        return any(
            place.obstacle is None
            and place.calls != 0
            and means(selector, place)
            and (found.name != "droppath" or type(place.module) is nn.Identity)  # else the flow decides
            and not (probe.covers(place.module) and not probe.counts.get(id(place.module)))
            for place in insertable(modules)
        )
    return any(
        site.obstacle is None
        and site.calls != 0
        and selector.matches(site)
        and found.fits(site.family)
        and not (site.op in RECURRENT_OPS and getattr(site.module, "num_layers", 2) == 1)
        for site in sites
    )

"""`regraft.suggest`: regularizers that models of this kind and size have been trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from regraft.errors import OptionError, RegraftError
from regraft.find.inspect import Inspection, inspect_flow
from regraft.find.probe.dataflow import Dataflow
from regraft.ops import ATTENTION
from regraft.planning.plan import plan_of
from regraft.planning.rules import read_rules
from regraft.record import original_class
from regraft.report.fold import fold
from regraft.report.view import SCHEMA, View
from regraft.training.published import (
    ALPHAS,
    DEVLIN,
    FEW_LABELS,
    GHIASI,
    JAIN,
    LEE,
    LIANG,
    LIU,
    LOST_BY_IT,
    MERITY,
    RESULTS,
    SMALL,
    SRIVASTAVA,
    WANG,
    drop_path_rate,
)

_FEW_EXAMPLES = 10_000
_LARGE_MODEL = 200_000_000
_ACTIVATIONS = ("ELU", "GELU", "ReLU", "Sigmoid", "SiLU", "Tanh")


@dataclass(frozen=True)
class Suggestion:
    """One piece of advice: a rule for `regraft.apply`, or a line of code, with its reason and its source."""

    rule: list[str] | None
    code: str | None
    reason: str
    source: str


@dataclass(frozen=True, repr=False)
class Advice(View, Mapping[str, str]):
    """What `regraft.suggest` returns; `regraft.apply(model, advice)` takes it as rules.

    Attributes:
        model: the model's class name.
        kind: the kind of model it was taken for.
        parameters: how many are trainable.
        examples: how many there are to train on, as given.
        advice: each suggestion with its `rule` or `code`, its `reason` and its `source`.
        notes: what to know first.
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
        return {item.rule[0]: item.rule[1] for item in self.advice if item.rule is not None}

    def __getitem__(self, selector: str) -> str:
        return self.rules[selector]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain JSON values."""
        return {"schema": SCHEMA, "view": "advice", **asdict(self)}


def suggest(model: nn.Module, examples: int, inputs: Any = None) -> Advice:
    """Advice for a model: rules and settings with their reasons and sources. Changes nothing.

    It stands on what is known: trainable parameters against examples, rates that are 0, the kind of
    model, and settings published for that kind. A rate comes first, then R-Drop, which needs one, then
    the rest. It knows nothing of your data; a validation set does.

    Args:
        model: any module, as it will be trained: frozen parameters are not counted.
        examples: how many there are to train on.
        inputs: for the probe, see `regraft.inspect`.

    Returns:
        The advice: print it; `regraft.apply(model, advice)` applies its rules.

    Raises:
        OptionError: `examples` is not a whole number above 0.

    Example:
        >>> import regraft
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 10))
        >>> advice = regraft.suggest(net, examples=10_000)
        >>> advice.rules
        {'after:ReLU': 'dropout(p=0.5)', 'before:Sequential': 'dropout(p=0.2)'}
        >>> advice.advice[0].source
        'Srivastava et al. 2014, Dropout'
        >>> report = regraft.apply(net, advice)
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise OptionError(
            f"examples={examples!r} is no number of examples",
            remedy="give the number of examples to train on, a whole number",
        )
    profile = ModelProfile(inspect_flow(model, inputs, Dataflow()), examples)
    advice = [item for item in _advice(profile) if item.rule is None or _fits(profile.inspection, item.rule)]
    name = type(profile.root).__name__
    return Advice(name, profile.kind, profile.trainable, examples, advice, list(_notes(profile)))


def _fits(inspection: Inspection, rule: list[str]) -> bool:
    """Would the rule graft anything here?"""
    try:
        return bool(plan_of(inspection, read_rules([tuple(rule)])).grafted)
    except RegraftError:
        return False


class ModelProfile:
    """What the advice goes by: the kind of a model, its size against its data, and its rates."""

    def __init__(self, inspection: Inspection, examples: int) -> None:
        self.inspection, self.root = inspection, inspection.root
        self.modules = [(named.paths[0], named.module) for named in inspection.modules]
        self.names = {original_class(module).__name__ for _, module in self.modules}
        self.parameters = sum(p.numel() for p in self.root.parameters())
        self.trainable = sum(p.numel() for p in self.root.parameters() if p.requires_grad)
        self.examples = examples
        self.small = self.trainable < SMALL * examples
        families = ("Dropout", "DropPath")
        self.noise = [site for site in inspection.sites if site.family in families and site.calls != 0]
        self.rates = sorted({site.p for site in self.noise if site.p})
        self.has_lora = any("lora_" in name for name, _ in self.root.named_parameters())
        self.kind = self._kind()
        self.has_few_labels = self.kind == "text encoder" and bool(self.rates) and examples <= FEW_LABELS

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


def _notes(profile: ModelProfile) -> Iterator[str]:
    """What to know before any advice."""
    if profile.small:
        ratio = profile.trainable / profile.examples
        yield (
            f"the model is small for its data, {ratio:.2g} parameters per example: dropout throughout may "
            f"cost more than it gains; {LOST_BY_IT} ({LIU})"
        )
    if profile.noise and not profile.rates:
        yield f"every rate is 0: none of the model's {len(profile.noise)} dropout sites drops anything"
    if profile.rates and profile.rates[-1] > 0.5:
        above = f"a rate of {profile.rates[-1]:g} is above the range of 0.2 to 0.5"
        yield f"{above} that is in use ({SRIVASTAVA})"


def _advice(profile: ModelProfile) -> Iterator[Suggestion]:
    """The advice for a model: a rate, then R-Drop, then the rest."""
    yield from _rates(profile)
    if profile.small:
        code = 'regraft.schedule(model, p={"start": 0.1, "end": 0.0, "steps": total // 6})'
        reason = "dropout that ends early helps a model that is small for its data to fit"
        yield Suggestion(None, code, reason, LIU)
    if profile.has_few_labels:
        reason = "with that rate, better than 0.1 in accuracy and likelihood, for 1.9 times a step"
        yield Suggestion(None, "regraft.rdrop(model, alpha=2)", reason, RESULTS)
    elif profile.kind in ALPHAS:
        alpha = ALPHAS[profile.kind]
        code = f"regraft.rdrop(model, alpha={alpha.alpha:g})"
        yield Suggestion(None, code, f"the published weight for {alpha.task}; it needs rates above 0", LIANG)
    yield from _more(profile)


def _rates(profile: ModelProfile) -> Iterator[Suggestion]:
    """Rates for a model that has none, or none in the places where its kind is trained with them."""
    kind = profile.kind
    if profile.has_few_labels and profile.rates[-1] < 0.3:
        reason = (
            "few labels: better likelihood and calibration than 0.1, and no worse in accuracy, at no cost"
        )
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
        for name in [name for name in _ACTIVATIONS if name in profile.names][:1]:
            reason = "hidden units, in a network without dropout"
            yield _rule(f"after:{name}", "dropout(p=0.5)", reason, SRIVASTAVA)
        root = type(profile.root).__name__
        yield _rule(f"before:{root}", "dropout(p=0.2)", "the input, in a network without dropout", SRIVASTAVA)


def _drop_path(profile: ModelProfile) -> Iterator[Suggestion]:
    if any(site.op == "DropPath" and site.p for site in profile.noise):
        return
    rate, source = drop_path_rate(type(profile.root).__name__, profile.parameters)
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
    if profile.has_lora and any(site.op == ATTENTION for site in profile.inspection.sites):
        reason = "with LoRA, masking keys did best among dropouts of attention; the rate is to be tuned"
        yield _rule(ATTENTION, "dropkey(p=0.1)", reason, WANG)
    if kind in ("text encoder", "sequence-to-sequence model"):
        if profile.parameters >= _LARGE_MODEL and profile.examples <= _FEW_EXAMPLES:
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
    return Suggestion([selector, variant], None, reason, source)

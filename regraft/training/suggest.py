"""`regraft.suggest`: regularizers that models of this kind and size have been trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from regraft.errors import OptionError, RegraftError
from regraft.find.advice import LIU, LOST_BY_IT, SRIVASTAVA, ModelProfile, Suggestion, suggestions
from regraft.find.inspect import Inspection, inspect_flow
from regraft.find.probe.dataflow import Dataflow
from regraft.planning.plan import plan_of
from regraft.planning.rules import read_rules
from regraft.report.view import SCHEMA, View


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
    seen = inspect_flow(model, inputs, Dataflow())
    profile = ModelProfile(seen.modules, seen.sites, examples)
    advice = [item for item in suggestions(profile) if item.rule is None or _fits(seen, item.rule)]
    name = type(profile.root).__name__
    notes = list(_notes(profile, examples))
    return Advice(name, profile.kind, profile.trainable, examples, advice, notes)


def _fits(inspection: Inspection, rule: list[str]) -> bool:
    """Would the rule graft anything here?"""
    try:
        return bool(plan_of(inspection, read_rules([tuple(rule)])).grafted)
    except RegraftError:
        return False


def _notes(profile: ModelProfile, examples: int) -> Iterator[str]:
    """What to know before any advice."""
    if profile.small:
        ratio = profile.trainable / examples
        yield (
            f"the model is small for its data, {ratio:.2g} parameters per example: dropout throughout may "
            f"cost more than it gains; {LOST_BY_IT} ({LIU})"
        )
    if profile.noise and not profile.rates:
        yield f"every rate is 0: none of the model's {len(profile.noise)} dropout sites drops anything"
    if profile.rates and profile.rates[-1] > 0.5:
        above = f"a rate of {profile.rates[-1]:g} is above the range of 0.2 to 0.5"
        yield f"{above} that is in use ({SRIVASTAVA})"

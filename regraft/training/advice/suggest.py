"""`regraft.suggest`: which regularizers a model of this kind and size has been trained with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from regraft.errors import OptionError, RegraftError
from regraft.find.inspect import Inspection, inspect
from regraft.planning.plan import plan_of
from regraft.planning.rules import read_rules
from regraft.report.view import SCHEMA, View
from regraft.training.advice.advice import Suggestion, advice_for, notes_on
from regraft.training.advice.profile import Traits


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
    found = [one for one in advice_for(seen) if one.rule is None or _fits(inspection, one.rule)]
    return Advice(
        type(inspection.root).__name__, seen.kind, seen.parameters, examples, found, list(notes_on(seen))
    )


def _fits(inspection: Inspection, rule: list[str]) -> bool:
    """Would the rule graft anything here?"""
    try:
        return bool(plan_of(inspection, read_rules([tuple(rule)])).grafted)
    except RegraftError:
        return False

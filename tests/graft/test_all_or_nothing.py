"""Promise 4: all problems before the first change, and an error on the way leaves the model as it was."""

from __future__ import annotations

import signal

import pytest
import tiny
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft
from regraft.errors import (
    ModelError,
    NoMatchError,
    OptionError,
    RateError,
    RulesError,
    RuleSyntaxError,
    UnknownVariantError,
    WrongKindError,
)
from regraft.graft import slots

RULES = {"Dropout": "gaussian", "Linear": "standout(gate='learned')", "Embedding": "neftune"}


def fails_at(monkeypatch, step):
    """Make the change number `step` of an `apply` raise, once: the way back must still work."""
    original, done = slots.layered, []

    def layered(*args):
        done.append(args)
        if len(done) == step + 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(slots, "layered", layered)


@pytest.mark.parametrize("step", [0, 1, 5, 12, 20])
@pytest.mark.parametrize("grafted_before", [False, True], ids=["plain", "grafted"])
def test_an_error_in_the_middle_leaves_every_object_as_it_was(monkeypatch, step, grafted_before):
    model = tiny.bert()
    if grafted_before:
        regraft.apply(model, {"Dropout": "multisample(p=0.3)", "Linear@classifier": "dropconnect(p=0.1)"})
    before = snapshot(model)
    fails_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        regraft.apply(model, RULES, tiny.tokens())
    assert_same_but_for_the_record(before, model)
    monkeypatch.undo()
    regraft.revert(model)
    assert type(model.dropout) is nn.Dropout


def assert_same_but_for_the_record(before, model):
    """The record is a new dictionary of the same grafts: what is in it must be the same objects."""
    after = snapshot(model)
    for name in [name for name in before if name.endswith("._regraft")]:
        assert {slot: id(graft) for slot, graft in before[name].items()} == {
            slot: id(graft) for slot, graft in after[name].items()
        }
        before[name] = after[name]
    assert_same(before, model)


@pytest.mark.parametrize("inside", ["_take_back", "_write", "rebind_instance_forward"])
def test_one_change_is_done_completely_or_not_at_all(monkeypatch, inside):
    net = tiny.mlp()
    regraft.apply(net, {"Dropout": "multisample(p=0.3)"})
    before = snapshot(net)
    original, failed = getattr(slots, inside), []

    def fails_late(*args):
        if not failed:
            original(*args)
            failed.append(1)
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(slots, inside, fails_late)
    with pytest.raises(MemoryError):
        regraft.apply(net, {"Dropout": "gaussian(p=0.2)"})
    assert failed
    assert_same_but_for_the_record(before, net)


class Taken(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.gate_weight = "mine"


class Slotted(nn.Module):
    __slots__ = ("place",)

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("last", "rules", "error"),
    [
        (Taken(), {"Dropout": "gaussian", "Linear": "standout(gate='learned')"}, ModelError),
        (nn.Dropout(0.1), {"Dropout": "gaussian", "Dropout@1": "standout(gate='learned')"}, OptionError),
    ],
    ids=["a name that is taken", "an option that is missing"],
)
def test_a_site_that_cannot_be_grafted_stops_all_of_it(last, rules, error):
    net = nn.Sequential(nn.Dropout(0.1), last)
    before = snapshot(net)
    with pytest.raises(error):
        regraft.apply(net, rules)
    assert_same(before, net)


def test_a_module_with_slots_is_grafted_or_refused_whole():
    net = nn.Sequential(nn.Dropout(0.1), Slotted())
    before = snapshot(net)
    try:
        regraft.apply(net, {"Dropout": "gaussian"}, torch.ones(2, 3))
    except TypeError:
        assert_same(before, net)
    else:
        assert net(torch.ones(500)).unique().numel() > 100
        regraft.revert(net)
        assert_same(before, net)


def test_all_problems_of_all_rules_are_raised_together():
    model = tiny.bert()
    before = snapshot(model)
    rules = [
        ("Dropot", "gaussian"),
        ("Linear@clasifier", "dropconnect(p=0.2)"),
        ("Embedding", "gaussian"),
        ("Dropout", "multisample"),
        ("Conv2d", None),
    ]
    with pytest.raises(RulesError) as caught:
        regraft.apply(model, rules)
    problems = caught.value.problems
    assert [type(problem) for problem in problems] == [
        NoMatchError,
        NoMatchError,
        WrongKindError,
        NoMatchError,
    ]
    text = str(caught.value)
    assert "4 problems, nothing was changed" in text
    assert "did you mean 'Dropout'" in text
    assert "there are Linear sites, but none at that path; did you mean 'classifier'" in text
    assert isinstance(caught.value, ValueError)
    assert_same(before, model)


def test_rules_that_cannot_be_read_hide_no_others():
    net = tiny.mlp()
    before = snapshot(net)
    rules = [
        ("Dropout", "gausian"),
        ("Dropot", "gaussian"),
        ("Linear", "gaussian"),
        ("a..b", "off"),
        ("after:Lstm", "dropout(p=2)"),
        ("Linear@9", "dropconnect(p=0.1"),
    ]
    with pytest.raises(RulesError) as caught:
        regraft.apply(net, rules)
    kinds = [type(problem) for problem in caught.value.problems]
    assert kinds == [
        UnknownVariantError,
        NoMatchError,
        WrongKindError,
        RuleSyntaxError,
        RateError,
        NoMatchError,  # of the rule before, whose path is wrong as well as its rate
        RuleSyntaxError,
        NoMatchError,
    ]
    assert_same(before, net)


def test_all_that_cannot_be_read_is_raised_together():
    net = tiny.mlp()
    before = snapshot(net)
    with pytest.raises(RulesError) as caught:
        regraft.apply(
            net, [("Dropout", "gausian"), ("Dropout", "gaussian(sgima=1)"), (3, "gaussian"), ("a..b", "off")]
        )
    kinds = [type(problem) for problem in caught.value.problems]
    assert kinds == [UnknownVariantError, OptionError, RuleSyntaxError, RuleSyntaxError]
    assert_same(before, net)


def interrupt_in(monkeypatch, place, name, call):
    """Send SIGINT from inside the call number `call` of a function, before it does anything."""
    original, calls = getattr(place, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(place, name, interrupted)


@pytest.mark.parametrize("inside", ["layered", "_take_back", "_write", "rebind_instance_forward"])
@pytest.mark.parametrize("call", [1, 4])
def test_ctrl_c_leaves_the_model_grafted_or_as_it_was(monkeypatch, inside, call):
    model = tiny.bert()
    regraft.apply(model, {"Dropout": "multisample(p=0.3)"})
    before, kept = snapshot(model), grafted_names(model)
    interrupt_in(monkeypatch, slots, inside, call)
    with pytest.raises(KeyboardInterrupt):
        regraft.apply(model, {"Dropout": "gaussian(p=0.2)"}, tiny.tokens())
    monkeypatch.undo()
    assert_same_but_for_the_record(before, model)
    interrupt_in(monkeypatch, slots, inside, call)
    with (
        pytest.raises(KeyboardInterrupt),
        regraft.grafted(model, {"Dropout": "gaussian(p=0.2)"}, tiny.tokens()),
    ):
        pytest.fail("the block began")
    monkeypatch.undo()
    assert grafted_names(model) == kept
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    str(model)
    if inside == "_write":
        return  # a revert writes nothing
    interrupt_in(monkeypatch, slots, inside, call)
    with pytest.raises(KeyboardInterrupt):
        regraft.revert(model)
    monkeypatch.undo()
    assert grafted_names(model) == kept
    regraft.revert(model)
    assert grafted_names(model) == []


def grafted_names(model):
    return [type(module).__name__ for module in model.modules() if "_regraft" in vars(module)]


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(1, 8))
def test_the_end_of_a_block_is_reached_by_every_module(monkeypatch, error, call):
    """An exception while one graft is taken out keeps none of the others in."""
    model = tiny.bert()
    before = snapshot(model)
    original, calls = slots.layered, []

    def layered(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args)

    with regraft.grafted(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}, tiny.tokens()):
        monkeypatch.setattr(slots, "layered", layered)
    assert len(calls) > call
    monkeypatch.undo()
    assert_same(before, model)


def test_an_error_at_the_end_of_a_block_goes_on_when_all_else_is_done(monkeypatch):
    model = tiny.mlp()
    original = slots.layered

    def layered(cls, layers):
        if cls.__name__ == "GaussianDropout":  # for good: a second try is no better
            raise ModelError("stuck")
        return original(cls, layers)

    with (
        pytest.raises(ModelError, match="stuck"),
        regraft.grafted(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}),
    ):
        monkeypatch.setattr(slots, "layered", layered)
    assert grafted_names(model) == ["GaussianDropout"]

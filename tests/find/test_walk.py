"""The walk: every module once, with all its names; and the wrappers that are looked into."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import regraft
from regraft.errors import ModelError
from regraft.find import walk
from regraft.find.walk import inner_model, named_modules


def paths(model):
    return {named.paths[0]: named.paths for named in named_modules(model)}


def test_it_finds_what_torch_finds_in_the_same_order():
    model = tiny.bert()
    assert list(paths(model)) == [name for name, _ in model.named_modules()]
    assert all(len(names) == 1 for names in paths(model).values())


def test_trap_3_a_second_alias_is_not_skipped():
    net = nn.Module()
    net.a = net.b = nn.Dropout(0.1)
    assert paths(net) == {"": [""], "a": ["a", "b"]}
    regraft.apply(net, {"Dropout@b": "gaussian"})
    assert net.a is net.b
    assert type(net.a).__name__ == type(net.b).__name__ == "GaussianDropout"


def test_aliases_of_a_shared_parent_reach_its_children():
    net = nn.Module()
    net.a = net.b = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2))
    net.c = net.a[1]
    expected = {name for name, _ in net.named_modules(remove_duplicate=False)}
    assert {path for names in paths(net).values() for path in names} == expected
    assert paths(net)["a.1"] == ["a.1", "b.1", "c"]


def test_a_cycle_ends():
    outer, inner = nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))
    outer.add_module("inner", inner)
    inner.add_module("outer", outer)
    inner.add_module("self", inner)
    assert paths(outer) == {"": [""], "0": ["0"], "inner": ["inner"], "inner.0": ["inner.0"]}
    report = regraft.apply(outer, {"Dropout": "gaussian"})
    assert [edit.path for edit in report.grafted] == ["0", "inner.0"]


def test_children_that_are_none_are_no_modules():
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_module("nothing", None)
    assert list(paths(net)) == ["", "0"]


def test_sharing_that_multiplies_names_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(walk, "_MOST_NAMES", 1000)
    net = nn.Sequential(nn.Dropout(0.1))
    for _ in range(60):  # 2 to the 60 names, of 62 modules
        net = nn.Sequential(net, net)
    with pytest.raises(ModelError, match="more than 1,000 module names"):
        named_modules(net)


def test_a_very_deep_model_needs_no_recursion():
    net: nn.Module = nn.Dropout(0.1)
    for _ in range(1500):
        net = nn.Sequential(net)
    assert len(named_modules(net)) == 1501


def test_the_root_itself_can_be_a_site():
    drop = nn.Dropout(0.1)
    report = regraft.apply(drop, {"Dropout": "gaussian"})
    assert [edit.path for edit in report.grafted] == [""]
    assert repr(drop) == "GaussianDropout(p=0.1)"
    assert type(regraft.revert(drop)) is nn.Dropout


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (nn.DataParallel, "DataParallel"),
        (lambda net: torch.compile(net, backend="eager"), "OptimizedModule"),
        (lambda net: torch.compile(nn.DataParallel(net), backend="eager"), "DataParallel"),
    ],
)
def test_a_wrapper_is_looked_into_and_said_so(wrap, name):
    net = tiny.mlp()
    wrapped = wrap(net)
    inside, notes = inner_model(wrapped)
    assert inside is net
    assert any(f"looked inside {name}" in note for note in notes)
    report = regraft.apply(wrapped, {"Dropout": "gaussian"})
    assert [edit.path for edit in report.grafted] == ["2"]
    assert any(f"looked inside {name}" in note for note in report.notes)
    assert regraft.revert(wrapped) is wrapped
    assert type(net[2]) is nn.Dropout


def test_a_users_class_of_a_wrappers_name_without_its_attribute_is_a_model():
    model = type("DataParallel", (nn.Sequential,), {})(nn.Dropout(0.1))
    assert inner_model(model) == (model, [])

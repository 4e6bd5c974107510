"""Several threads at one model: they wait for one another, and a probe leaves a running forward alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tiny
import torch
from snapshots import differences, snapshot
from torch import nn

import regraft


def at_once(*works):
    """What each returns, all run at the same time in threads of their own."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result() for future in [threads.submit(run, work) for work in works]]


MODELS = {"bert": tiny.bert, "vit": tiny.vit, "encoder": tiny.encoder, "albert": tiny.albert}


def mixed_flags(model):
    for position, module in enumerate(model.modules()):
        module.training = position % 3 == 0
    return model


@pytest.mark.parametrize("name", ["bert", pytest.param("albert", marks=pytest.mark.slow)])
def test_inspecting_in_three_threads_changes_nothing(name):
    for _ in range(3):
        model = mixed_flags(MODELS[name]())
        before = snapshot(model)
        inspect = partial(regraft.inspect, model)
        views = at_once(inspect, inspect, inspect)
        assert differences(before, snapshot(model)) == []
        assert len({str([site.to_dict() for site in view.sites]) for view in views}) == 1


def forwards_beside(work, forward):
    """Outputs of forwards that ran while `work` did, until it was done."""
    ended = threading.Event()
    outputs = []

    def run():
        while not ended.is_set() or not outputs:
            outputs.append(forward())

    def end():
        try:
            work()
        finally:
            ended.set()

    at_once(run, end)
    return outputs


@pytest.mark.parametrize(("name", "times"), [("bert", 2), pytest.param("bert", 20, marks=pytest.mark.slow)])
def test_a_forward_beside_an_inspection_is_not_disturbed(name, times):
    model = MODELS[name]().eval()
    with torch.no_grad():
        expected = model(**tiny.tokens()).logits

    def forward():
        with torch.no_grad():
            return model(**tiny.tokens()).logits

    outputs = forwards_beside(lambda: [regraft.inspect(model) for _ in range(times)], forward)
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_real_probe_does_not_disturb_a_forward_either():
    class Branches(nn.Module):
        """It goes by its data, so it cannot run on fake tensors; its batch norm counts."""

        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)

        def forward(self, x):
            return self.drop(self.norm(x)) if x.sum() > 0 else x

    model = Branches().eval()
    x = torch.ones(3, 4)
    expected = model(x)
    outputs = forwards_beside(lambda: [regraft.inspect(model, inputs=x) for _ in range(5)], lambda: model(x))
    assert regraft.inspect(model, inputs=x).probe.how == "real forward"
    assert all(torch.equal(output, expected) for output in outputs)


def test_grafts_of_one_model_wait_for_one_another():
    model = tiny.bert(layers=1)
    before = snapshot(model)
    rules = [{"Dropout": "gaussian"}, {"Linear": "dropconnect(p=0.1)"}, {"Dropout": "uniform"}]
    reports = at_once(*(partial(regraft.apply, model, rule) for rule in rules))
    assert all(report.grafted for report in reports)
    assert at_once(partial(regraft.revert, model), partial(regraft.inspect, model))
    assert differences(before, snapshot(model)) == []


def test_two_threads_predict_by_one_model():
    model = mixed_flags(tiny.bert(layers=1))
    before = snapshot(model)
    predict = partial(regraft.mc_predict, model, 2, **tiny.tokens())
    results = at_once(predict, predict)
    assert all(result.variance.max() > 0 for result in results)
    assert differences(before, snapshot(model)) == []


def test_two_threads_forward_through_one_grafted_model():
    """Each with a mode of its own: what one thread draws is no part of the other's forward."""
    model = nn.Sequential(tiny.Calls(tiny.Calls(p=0.0)), tiny.Calls(p=0.25))
    regraft.apply(model, {"Dropout": "gaussian"}, inputs=torch.ones(2, 6))
    x = torch.ones(400, 6)
    outputs = at_once(*(lambda: [model(x) for _ in range(20)] for _ in range(2)))
    for output in (one for many in outputs for one in many):
        assert output.std() > 0.5
        assert not (output == 0).any()


def test_a_closure_over_a_module_is_probed_in_place():
    class Closes(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.3)
            self.call = lambda x: self.drop(x)

        def forward(self, x):
            return self.call(x)

    model = Closes().eval()
    before = snapshot(model)
    assert [site.calls for site in regraft.inspect(model, inputs=torch.ones(2, 3)).sites] == [1]
    assert differences(before, snapshot(model)) == []

"""A Ctrl-C at any line of an operation leaves the model as it was."""

from __future__ import annotations

import pytest
import tiny
import torch
from harness import broken_by, lines_of
from torch import nn

import regraft

RULES = {"Dropout": "gaussian(p=0.2)"}


def grafted_bert():
    model = tiny.bert(layers=1)
    regraft.apply(model, RULES)
    return model


def block(model):
    with regraft.grafted(model, RULES):
        pass


def bound(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regraft.max_norm(model, {"Linear": 3.0}, optimizer).remove()


MODELS = {
    "bert": lambda: tiny.bert(layers=1),
    "bart": tiny.bart,
    "llama": tiny.llama,
    "albert": tiny.albert,
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 8, 2, dropout=0.1)),
}
OPERATIONS = {
    "apply": lambda model: regraft.apply(model, RULES),
    "inspect": regraft.inspect,
    "grafted": block,
    "max_norm": bound,
}
CASES = {
    f"{operation} {name}": (OPERATIONS[operation], MODELS[name])
    for operation in OPERATIONS
    for name in MODELS
}
CASES |= {
    "revert bert": (regraft.revert, grafted_bert),
    "schedule bert": (lambda m: regraft.schedule(m, p={"start": 0.0, "end": 0.1, "steps": 9}), grafted_bert),
    "rdrop bert": (lambda model: regraft.rdrop(model, alpha=1.0), MODELS["bert"]),
    "rdrop llama": (lambda model: regraft.rdrop(model, alpha=1.0), MODELS["llama"]),
    "inspect grafted": (regraft.inspect, grafted_bert),
    "mc_predict bert": (
        lambda model: regraft.mc_predict(model, 2, input_ids=torch.ones(2, 4, dtype=torch.long)),
        lambda: tiny.bert(layers=1),
    ),
}
QUICK = ("apply mlp", "grafted mlp", "revert bert", "inspect grafted")
SAMPLES = {"few lines": 60, "every line": 1}


def _samples():
    for case in CASES:
        for name, step in SAMPLES.items():
            quick = pytest.mark.slow if case not in QUICK else ()
            marks = pytest.mark.weekly if step == 1 else quick
            yield pytest.param(case, step, id=f"{case}, {name}", marks=marks)


@pytest.mark.parametrize(("case", "step"), list(_samples()))
def test_an_interrupt_leaves_the_model_as_it_was(case, step):
    operation, build = CASES[case]
    lines = lines_of(operation, build)
    assert len(lines) > 50
    places = lines[step // 2 :: step]
    broken = {f"{file}:{line}": broken_by(operation, build, (file, line)) for file, line in places}
    assert {place: what for place, what in broken.items() if what} == {}

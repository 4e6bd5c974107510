"""Which parameters multiply, in what kind of product, and by which module they are read."""

from __future__ import annotations

import pytest
import torch
from lending import weights
from readers import CASES, Attends, ReadsTable, TiedAutoencoder
from recording import record_products
from torch import nn
from torch.nn import functional as F

import regraft

X = torch.randn(2, 5, 6)


def kinds(model: nn.Module, *args, **kwargs) -> dict[str, str]:
    found = weights(model, *args, **kwargs)
    return {name: f"{one.kind} direct" if one.direct else one.kind for name, one in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_that_multiplies_has_its_kind(case):
    build, wanted = CASES[case]
    assert kinds(build(), X) == wanted


def test_tables_are_no_weights_and_convolutions_are_of_kinds_of_their_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.head = nn.Embedding(5, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 2)

        def forward(self, ids):
            return self.head(self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2))

    assert kinds(Model(), torch.zeros(2, 4, dtype=torch.long)) == {
        "conv.weight": "Conv1d",
        "head.weight": "Linear direct",
    }


@pytest.mark.parametrize(
    ("use", "chooses"),
    [
        (lambda scores, x: (scores.argmax(-1) == 1).float().mean(), False),  # an accuracy
        (lambda scores, x: x[scores.argmax(-1) == 1].sum(), True),
        (lambda scores, x: (scores.topk(1).indices == 1) * x, True),
        (lambda scores, x: x.gather(-1, scores.topk(1).indices.unsqueeze(-1).squeeze(-1)), True),
    ],
    ids=["counted", "mask", "product", "gather"],
)
def test_a_router_is_one_whose_choice_is_used(use, chooses):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(6, 4)

        def forward(self, x):
            scores = self.scores(x)
            return scores.sum(), use(scores, x)

    kind = "router direct" if chooses else "Linear direct"
    assert kinds(Model(), X) == {"scores.weight": kind}


def test_a_matrix_that_nothing_used_is_no_part_of_the_count_and_skipped():
    class Sleeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.token = nn.Parameter(torch.randn(3, 6, 6)), nn.Parameter(torch.randn(1, 1, 6))
            self.places, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(x + self.places)

    report = regraft.apply(Sleeps(), {"Linear": "dropconnect"}, X)
    assert [edit.path for edit in report.grafted] == ["head"]
    assert [(skip.path, skip.reason) for skip in report.skipped] == [
        ("experts", "nothing used it in the probe")
    ]
    assert report.balance["matrices"] == {"multiply": 1, "reached": 1, "left": {}}


def test_a_cast_a_transpose_and_a_stack_still_name_their_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x.double() @ torch.cat([self.a, self.b]).double().t()

    assert {name for one in record_products(Model(), X).products for name in one.parameters} == {"a", "b"}


def test_a_weight_that_depends_on_the_input_is_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return x @ (self.scale * x.mean())

    assert record_products(Model(), X).products == []


def test_factors_of_a_weight_multiply_both():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            return x @ (self.a @ self.b)

    assert kinds(Model(), X) == {"a": "Linear", "b": "Linear"}


def test_a_router_is_known_by_what_becomes_of_its_scores():
    class Gate(nn.Module):
        def __init__(self, chooses):
            super().__init__()
            self.score, self.out, self.chooses = nn.Linear(6, 4), nn.Linear(4, 6), chooses

        def forward(self, x):
            share = self.score(x).float().sigmoid()
            if self.chooses:
                share = torch.zeros_like(share).scatter(-1, share.topk(2).indices, 1.0)
            return self.out(share)

    assert kinds(Gate(True), X) == {"score.weight": "router direct", "out.weight": "Linear direct"}
    assert kinds(Gate(False), X) == {"score.weight": "Linear direct", "out.weight": "Linear direct"}


def test_a_choice_behind_another_product_makes_no_router():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gate = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return F.one_hot(self.gate(self.embed(x)).argmax(-1), 4)

    assert kinds(Model(), X) == {"embed.weight": "Linear direct", "gate.weight": "router direct"}


def test_the_largest_values_alone_are_no_choice():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(6, 4)

        def forward(self, x):
            return self.score(x).topk(2).values

    assert kinds(Model(), X) == {"score.weight": "Linear direct"}


def test_the_reader_is_the_smallest_module_with_all_that_multiply():
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), TiedAutoencoder())
    found = weights(net, X)["1.encode.weight"]
    assert (found.reader_path, found.holder_path, found.calls) == ("1", "encode", 2)
    attention = weights(nn.Sequential(Attends()), X)["0.attention.out_proj.weight"]
    assert (attention.reader_path, attention.holder_path) == ("0.attention", "out_proj")


def test_a_table_that_is_looked_up_in_and_multiplied_by_one_module_has_an_obstacle():
    found = weights(ReadsTable(), X)["embed.weight"]
    assert "embedding" in found.obstacle[0]


def test_the_parameters_of_a_flattened_network_are_told_apart_by_offset():
    flat = torch.randn(24)
    net = nn.ParameterList([nn.Parameter(flat[:12].view(2, 6)), nn.Parameter(flat[12:].view(2, 6))])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = net

        def forward(self, x):
            return F.linear(x, self.both[1])

    assert kinds(Model(), X) == {"both.1": "Linear"}


def test_a_recorder_forgets_what_it_recorded_when_it_starts_anew():
    net = nn.Linear(6, 2)
    recorder = record_products(net, X)
    assert [one.calls for one in recorder.products] == [1]
    recorder.start({})
    assert recorder.products == []


def test_recording_leaves_the_model_alone():
    from snapshots import assert_same, snapshot

    net = nn.Sequential(Attends(), nn.LSTM(6, 4))
    before = snapshot(net)
    record_products(net, X)
    assert_same(before, net)

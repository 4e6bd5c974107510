"""The recorder counts what a person would count, once each."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .entries import LIBRARIES, entries, entry
from .recorder import record

EXPECTED = {
    "Sequential": {"dropout": 2},
    "TransformerEncoderLayer": {"multi_head_attention_forward": 1, "dropout": 3},
    "Transformer": {"multi_head_attention_forward": 6, "dropout": 14},
    "MultiheadAttention-weights": {"multi_head_attention_forward": 1},
    "LSTM": {"rnn": 1, "dropout": 1},
    "GRU-packed": {"rnn": 1, "dropout": 1},
    "functional": {"dropout": 5, "scaled_dot_product_attention": 1},
    "channels": {"dropout1d": 2, "dropout2d": 2, "dropout3d": 2},
    "alpha": {"alpha_dropout": 2, "feature_alpha_dropout": 2},
    "aliased": {"dropout": 7},
    "dead-twin": {"scaled_dot_product_attention": 1},
    "private": {"private dropout": 1, "drop_path": 1, "inline drop_path": 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_regularizer_is_counted_once(name):
    model, inputs = entry(f"torch:{name}").build()
    assert Counter(call.kind for call in record(model, inputs).calls) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_nothing_runs_in_eval(name):
    model, inputs = entry(f"torch:{name}").build()
    assert record(model.eval(), inputs).calls == []


def test_only_calls_inside_a_dropout_module_are_reached_by_a_walk():
    model, inputs = entry("torch:aliased").build()
    assert all(call.walked for call in record(model, inputs).calls)
    model, inputs = entry("torch:functional").build()
    assert not any(call.walked for call in record(model, inputs).calls)


def test_the_owner_is_the_innermost_module_and_the_line_is_the_models():
    model, inputs = entry("torch:private").build()
    owners = {call.kind: call.path for call in record(model, inputs).calls}
    assert owners == {"private dropout": "drop", "drop_path": "drop_path", "inline drop_path": ""}
    assert all("models_torch.py:" in call.source for call in record(model, inputs).calls)


def test_the_rate_is_the_one_that_ran():
    model, inputs = entry("torch:functional").build()
    assert [call.p for call in record(model, inputs).calls] == [0.1, 0.1, 0.1, 0.1, 0.5, 0.1]


def test_other_randomness_and_layer_drop_are_told_apart():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_layers, self.ran = 0.99, 0

        def forward(self, x):
            for _ in range(20):
                self.ran += not torch.rand([]) < self.drop_layers
            return F.dropout(x + torch.randn_like(x), 0.2)

    model = Noisy()
    seen = record(model, (torch.ones(2, 3),))
    assert [call.kind for call in seen.calls] == ["dropout"]
    assert len(seen.other) == 21
    assert model.ran == 20


def test_draws_of_the_code_under_test_are_its_own():
    model, inputs = entry("torch:private").build()
    here = __file__.rpartition("/")[0]
    seen = record(model, inputs, own=(here,))
    assert (seen.calls, seen.own_draws) == ([], 3)


def test_a_bert_has_a_call_for_each_of_its_sites():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=24, intermediate_size=24, max_position_embeddings=16)
    seen = record(
        BertForSequenceClassification(config).train(), {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    )
    assert Counter(call.kind for call in seen.calls) == {"dropout": 26, "scaled_dot_product_attention": 12}
    assert sum(call.walked for call in seen.calls) == 26


def test_the_zoo_is_as_large_as_promised():
    counted = Counter(one.library for one in entries())
    assert set(counted) == set(LIBRARIES)
    assert counted["hf"] >= 150
    assert counted["timm"] >= 80
    assert counted["torchvision"] >= 30
    assert counted["peft"] >= 6
    assert len({one.id for one in entries()}) == counted.total()

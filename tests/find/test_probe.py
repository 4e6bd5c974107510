"""The probe: what it learns of real models, and that it leaves them as they are."""

from __future__ import annotations

import functools
import random

import numpy
import pytest
import tiny
import torch
from snapshots import assert_same, snapshot
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import InputsError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, image_size=16, patch_size=8, hidden_dropout_prob=0.1)
    return ViTForImageClassification(config)


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **SMALL,
        vocab_size=30,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return Wav2Vec2ForSequenceClassification(config)


def longformer():
    from transformers import LongformerConfig, LongformerForSequenceClassification

    config = LongformerConfig(**SMALL, vocab_size=60, max_position_embeddings=64, attention_window=4)
    return LongformerForSequenceClassification(config)


MODELS = {
    "bert": (tiny.bert, "fake tensors"),
    "albert": (tiny.albert, "fake tensors"),
    "bart": (tiny.bart, "fake tensors"),
    "llama": (tiny.llama, "fake tensors"),
    "t5": (t5, "fake tensors"),
    "hf_vit": (hf_vit, "fake tensors"),
    "timm_vit": (tiny.vit, "fake tensors"),
    "wav2vec2": (wav2vec2, "fake tensors"),
    "longformer": (longformer, "real forward"),  # branches on data
}


@pytest.mark.parametrize(("build", "how"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.transformers5
def test_a_model_is_probed_without_inputs_and_left_as_it_was(build, how, training):
    model = build().train(training)
    model.get_submodule(next(name for name, _ in model.named_modules() if name)).train(not training)
    before, state = snapshot(model), torch.get_rng_state()
    python, others = random.getstate(), numpy.random.get_state()[1].copy()
    inspection = regraft.inspect(model)
    assert_same(before, model)
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == others).all()
    assert inspection.probe.how == how
    assert inspection.probe.seconds > 0
    assert any(site.calls for site in inspection.sites)
    assert all(site.calls is not None for site in inspection.sites)


class BranchesOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.steps, self.cache = 0, []

    def forward(self, x):
        self.steps += 1
        self.cache.append(x)
        self.seen += 1
        random.random()
        numpy.random.rand()
        x = self.norm(x + torch.rand_like(x))
        return self.drop(x) if x.sum() > -1e9 else x


def test_where_fake_tensors_fail_a_real_forward_is_undone():
    net = BranchesOnData()
    before = snapshot(net)
    values = {name: value.clone() for name, value in net.state_dict().items()}
    state, python, others = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    inspection = regraft.inspect(net, torch.ones(4, 3))
    assert inspection.probe.how == "real forward"
    assert "the forward cannot run on fake tensors" in inspection.probe.reason
    assert [site.calls for site in inspection.sites] == [1]
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert (net.steps, net.cache) == (0, [])
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == others).all()
    # Running statistics were written and put back: their versions alone may differ.
    changed = {name for name in before if name.endswith(":version")}
    after = snapshot(net)
    assert {k: v for k, v in after.items() if k not in changed}.keys() == before.keys() - changed


class AddsToItself(nn.Module):
    """As BigBird does on short inputs: the forward changes the model."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        self.extra = nn.Linear(3, 3)
        self.drop.p = 0.9
        self.drop.register_forward_hook(print)
        self.register_buffer("table", torch.zeros(2))
        self.training = False
        return self.drop(x)


def test_a_forward_that_changes_its_own_modules_is_undone():
    net = AddsToItself()
    before = snapshot(net)
    assert regraft.inspect(net, torch.ones(2, 3)).probe.ran
    assert_same(before, net)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        self.mark = 1
        raise RuntimeError("no such thing as a forward")


def test_given_inputs_on_which_the_forward_fails_are_an_error():
    net = Broken()
    before = snapshot(net)
    with pytest.raises(InputsError, match=r"no such thing as a forward[\s\S]*find/test_probe.py:"):
        regraft.apply(net, {"Dropout": "gaussian"}, torch.ones(2))
    assert_same(before, net)


def test_a_lazy_model_is_not_probed_and_stays_lazy():
    net = nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.1))
    before = snapshot(net)
    inspection = regraft.inspect(net, torch.ones(2, 5))
    assert not inspection.probe.ran
    assert "lazy" in inspection.probe.reason
    assert_same(before, net)
    assert net(torch.ones(2, 5)).shape == (2, 3)


def test_trap_6_looking_leaves_the_fused_fast_path_on():
    model = tiny.encoder().eval()
    before = snapshot(model)
    regraft.inspect(model, torch.ones(2, 4, 16))
    assert_same(before, model)
    calls = []
    original = torch._transformer_encoder_layer_fwd

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    torch._transformer_encoder_layer_fwd = counted
    try:
        with torch.no_grad():
            model(torch.ones(2, 4, 16))
    finally:
        torch._transformer_encoder_layer_fwd = original
    assert len(calls) == 2


def test_trap_6_out_proj_never_runs():
    sites = {site.path: site for site in regraft.inspect(nn.MultiheadAttention(4, 2)).sites}
    assert sites["out_proj"].calls == 0
    plan = regraft.plan(nn.MultiheadAttention(4, 2), {"Linear": "dropconnect(p=0.1)"})
    assert [skip.path for skip in plan.skipped] == ["out_proj"]
    assert "its forward never runs" in plan.skipped[0].reason


class ReadsTheWeight(nn.Module):
    """As timm's BEiT does with `qkv`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.linear(x, self.qkv.weight))


def test_trap_7_a_linear_whose_weight_is_read_by_its_parent_is_a_weight_lent_to_it():
    report = regraft.apply(ReadsTheWeight(), {"Linear": "dropconnect(p=0.1)"}, torch.ones(2, 4))
    assert [(edit.path, edit.kind) for edit in report.grafted] == [("qkv", "weight"), ("head", "module")]
    assert report.skipped == []


class Layers(nn.Module):
    """LayerDrop, as wav2vec2 has it: a scalar decides."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Dropout(0.1) for _ in range(4)])
        self.layerdrop = 0.9

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand([]) > self.layerdrop:
                x = layer(x)
        return x


def test_layer_drop_keeps_every_layer_while_probing():
    net = Layers()
    inspection = regraft.inspect(net, torch.ones(2, 3))
    assert [site.calls for site in inspection.sites] == [1, 1, 1, 1]
    assert net.layerdrop == 0.9
    assert any("LayerDrop" in finding.finding for finding in inspection.findings)


@pytest.mark.transformers5
def test_meta_models_are_probed():
    with torch.device("meta"):
        model = tiny.bert()
    inspection = regraft.inspect(model)
    assert inspection.probe.how == "fake tensors"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tied_weights_and_an_own_input_device_survive_the_probe():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Dropout(0.1), nn.Linear(4, 5, bias=False))
    net[2].weight = net[0].weight
    inspection = regraft.inspect(net, torch.zeros(2, 3, dtype=torch.long))
    assert inspection.probe.how == "fake tensors"
    assert net[2].weight is net[0].weight


class Twins(nn.Module):
    """Two dead dropouts of equal rates: which one a call reads its rate from can still be told."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Dropout(0.1), nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        return F.dropout(x, self.second.p, self.training)


def test_a_twin_is_found_by_the_rate_it_lends_not_by_its_value():
    sites = regraft.inspect(Twins(), torch.ones(2, 3)).sites
    assert [(site.paths, site.kind, site.calls) for site in sites] == [
        (("first",), "module", 0),
        (("", "second"), "call", 1),
        (("idle",), "module", 0),
    ]
    assert sites[1].p == 0.1


@functools.lru_cache
def _table(size):
    return torch.arange(size, dtype=torch.float32)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(x + _table(x.shape[-1]))


def test_a_function_that_remembers_keeps_no_fake_tensor_of_the_look():
    _table.cache_clear()
    model, x = Remembers().eval(), torch.ones(2, 3)
    assert regraft.inspect(model, x).probe.how == "fake tensors"
    assert torch.equal(model(x), x + torch.arange(3.0))

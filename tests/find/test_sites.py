"""The list of sites: what each says of itself, before and after a graft."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from torch import nn

import regraft

KEYS = {"path", "paths", "kind", "op", "type", "p", "calls", "source"}


def sites_of(model, inputs=None):
    return {(site.path, site.op): site for site in regraft.inspect(model, inputs).sites}


def test_a_site_says_all_that_the_json_carries():
    net = nn.Sequential(nn.Linear(4, 8, dtype=torch.float64), nn.Dropout(0.25), nn.Embedding(3, 8))
    net[1].eval()
    inspection = regraft.inspect(net)
    linear, drop, table = inspection.sites
    assert (linear.shape, linear.parameters, linear.device, linear.dtype) == ((4, 8), 40, "cpu", "float64")
    assert (drop.p, drop.training, drop.shape, drop.calls) == (0.25, False, None, None)
    assert (table.shape, table.family, table.p) == ((3, 8), "Embedding", None)
    written = json.loads(inspection.to_json())
    assert written["schema"] == 1
    assert all(KEYS <= site.keys() for site in written["sites"])
    assert [site["op"] for site in written["sites"]] == ["Linear", "Dropout", "Embedding"]


def test_sites_come_in_the_order_of_registration():
    inspection = regraft.inspect(tiny.bert())
    order = [name for name, _ in inspection.root.named_modules()]
    firsts = [min(order.index(path) for path in site.paths) for site in inspection.sites]
    assert sorted(firsts) == firsts or {site.kind for site in inspection.sites} == {"module", "call"}
    paths = [site.path for site in inspection.sites]
    assert paths.index("bert.embeddings.dropout") < paths.index("bert.encoder.layer.0.attention.self")
    assert paths[-1] == "classifier"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.transformers5
def test_bert_has_a_dead_twin_merged_into_each_attention_call(attention):
    sites = sites_of(tiny.bert(attention=attention))
    noise = [site for site in sites.values() if site.family == "Dropout"]
    calls = [site for site in noise if site.kind == "call"]
    assert len(noise) == 2 * 3 + 2  # per layer two dropouts and one attention; embeddings; head
    assert [site.paths[1] for site in calls] == [
        f"bert.encoder.layer.{layer}.attention.self.dropout" for layer in range(2)
    ]
    assert {site.calls for site in noise} == {1}
    op = "scaled_dot_product_attention" if attention == "sdpa" else "dropout"
    assert {site.op for site in calls} == {op}


def test_trap_2_one_object_that_runs_several_times_is_one_site():
    sites = sites_of(tiny.albert())
    shared = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert sites[f"{shared}.attention.output_dropout", "Dropout"].calls == 3
    assert sites[f"{shared}.attention", "scaled_dot_product_attention"].calls == 3
    assert sites[f"{shared}.dropout", "Dropout"].calls == 0  # ALBERT makes it and never uses it


def test_trap_2_rates_that_are_floats_on_the_module():
    sites = sites_of(tiny.bart())
    layer = "model.encoder.layers.0"
    assert sites[layer, "dropout"].p == pytest.approx(0.1)
    assert sites[layer, "dropout"].calls == 3
    assert sites[f"{layer}.self_attn", "scaled_dot_product_attention"].p == pytest.approx(0.2)
    assert sites[layer, "dropout"].source.startswith("bart/modeling_bart.py:")


def test_source_lines_are_the_models_own():
    from pathlib import Path

    site = sites_of(tiny.Calls(), torch.ones(2, 3))["", "dropout"]
    file, _, line = site.source.partition(":")
    assert file == "tests/tiny.py"
    assert "F.dropout" in Path(tiny.__file__).read_text().splitlines()[int(line) - 1]


def test_in_a_model_of_torchs_own_layers_the_line_is_torchs():
    sites = regraft.inspect(tiny.encoder(), torch.ones(2, 4, 16)).sites
    sources = {site.source for site in sites if site.calls and site.kind != "weight"}
    assert all(source.startswith("modules/transformer.py:") for source in sources)
    assert {site.source for site in regraft.inspect(tiny.mlp(), torch.ones(2, 6)).sites} == {None}


@pytest.mark.transformers5
def test_a_grafted_model_is_shown_as_it_was_and_with_what_it_has():
    model = tiny.bert()
    before = sites_of(model)
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)", "Linear@classifier": "dropconnect"})
    after = sites_of(model)
    assert list(before) == list(after)
    for key, site in after.items():
        assert (site.p, site.calls, site.type) == (before[key].p, before[key].calls, before[key].type)
        expected = site.family == "Dropout" or site.path == "classifier"
        assert (site.variant is not None) == expected
    assert after["dropout", "Dropout"].variant == "GaussianDropout(p=0.3)"
    assert (
        after["bert.encoder.layer.1.attention.self", "scaled_dot_product_attention"].variant
        == "gaussian_dropout(p=0.3)"
    )


@pytest.mark.parametrize(
    ("module", "variant"),
    [
        (nn.MultiheadAttention(4, 2, dropout=0.1), "dropout(p=0.3)"),
        (nn.LSTM(4, 4, 2, dropout=0.1), "dropout(p=0.3)"),
    ],
)
def test_a_rate_that_was_set_is_shown_too(module, variant):
    regraft.apply(module, {"Dropout": variant})
    site = next(site for site in regraft.inspect(module).sites if site.path == "")
    assert site.p == 0.1
    assert "p=0.3" in (site.variant or "")


def test_a_rate_that_somebody_set_after_the_graft_is_the_models():
    net = tiny.mlp()
    regraft.apply(net, {"Dropout": "gaussian(p=0.3)"})
    net[2].p = 0.4
    assert sites_of(net)["2", "Dropout"].p == 0.4


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.LazyLinear(3), "it is lazy"),
        (lambda: torch.jit.script(nn.Dropout(0.1)), "compiled TorchScript"),
    ],
)
def test_modules_where_a_graft_would_be_lost_are_named(build, reason):
    net = nn.Sequential(build())
    rule = {lambda site: True: "dropconnect" if reason == "it is lazy" else "gaussian"}
    plan = regraft.plan(net, rule)
    assert plan.grafted == []
    assert reason in plan.skipped[0].reason
    assert plan.skipped[0].remedy

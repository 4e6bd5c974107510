"""Graph nodes as sites: which there are, what each says of itself, and what the probe adds."""

from __future__ import annotations

import pickle

import pytest
import tiny
import torch
from torch import fx, nn
from torch.nn import functional as F

import regraft
from regraft.errors import ModelError, NoMatchError


class Made(nn.Module):
    """One expression as a forward."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)

    def forward(self, x):
        return self.function(x)


class Plain(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.linear, self.drop, self.p = nn.Linear(4, 8), nn.Dropout(0.1), p

    def forward(self, x):
        x = F.dropout(self.drop(self.linear(x)), self.p, self.training)
        return F.linear(torch.dropout(x, 0.2, self.training), self.linear.weight.T)


def noisy(x, rate, training=True):
    """A function that tracing does not enter, and that drops inside, twice."""
    return F.dropout(F.dropout(x, rate, training), rate, training) + F.dropout2d(x, 0.3, training)


fx.wrap("noisy")


class Wrapped(nn.Module):
    def forward(self, x):
        return noisy(noisy(x, 0.1, self.training), 0.0, training=self.training)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.other = fx.symbolic_trace(Plain())

    def forward(self, x):
        return self.one(x) + self.other(x)


def nodes_of(model, inputs=None):
    return [site for site in regraft.inspect(model, inputs).sites if site.kind == "node"]


def _attention(x):
    return F.scaled_dot_product_attention(x, x, x, None, 0.3)


@pytest.mark.parametrize(
    ("function", "op", "shape"),
    [
        (lambda x: F.dropout(x, 0.3, training=True), "dropout", (2, 4)),
        (lambda x: F.dropout(x, p=0.3), "dropout", (2, 4)),
        (lambda x: torch.dropout(x, 0.3, True), "dropout", (2, 4)),
        (lambda x: torch.dropout(x, p=0.3, train=True), "dropout", (2, 4)),
        (lambda x: F.dropout1d(x, 0.3), "dropout1d", (2, 3, 4)),
        (lambda x: F.dropout2d(x, 0.3), "dropout2d", (2, 3, 4, 4)),
        (lambda x: torch.feature_dropout(x, 0.3, True), "dropout2d", (2, 3, 4, 4)),
        (lambda x: F.dropout3d(x, 0.3), "dropout3d", (2, 3, 4, 4, 4)),
        (lambda x: F.alpha_dropout(x, 0.3, True), "alpha_dropout", (2, 4)),
        (lambda x: torch.alpha_dropout(x, 0.3, True), "alpha_dropout", (2, 4)),
        (lambda x: F.feature_alpha_dropout(x, 0.3, True), "feature_alpha_dropout", (2, 3, 4)),
        (_attention, "scaled_dot_product_attention", (2, 2, 3, 4)),
    ],
)
def test_every_function_that_drops_is_a_node_site_and_is_counted_once(function, op, shape):
    graph = fx.symbolic_trace(Made(function))
    for inputs in (None, torch.ones(shape)):
        (site,) = regraft.inspect(graph, inputs).sites
        assert (site.kind, site.op, site.p, site.family) == ("node", op, 0.3, "Dropout")
        assert site.path in [node.name for node in graph.graph.nodes]
        assert (site.type, site.draws_in_eval) == ("Made", True)
        assert site.calls == (None if inputs is None else 1)


def test_a_flag_or_a_rate_that_the_graph_computes_is_not_fixed():
    graph = fx.Graph()
    x, flag, rate = (graph.placeholder(name) for name in ("x", "flag", "rate"))
    first = graph.call_function(F.dropout, (x, 0.2, flag))
    second = graph.call_function(F.dropout, (first, rate), {"training": flag})
    graph.output(second)
    one, other = nodes_of(fx.GraphModule(nn.Module(), graph))
    assert (one.p, one.draws_in_eval, one.written) == (0.2, False, "dropout(p=0.2)")
    assert (other.p, other.draws_in_eval, other.written) == (None, False, "dropout")


def test_a_model_traced_in_eval_keeps_its_rates_and_says_that_they_do_nothing():
    inspection = regraft.inspect(fx.symbolic_trace(Plain().eval()))
    first = next(site for site in inspection.sites if site.kind == "node")
    assert (first.p, first.draws_in_eval) == (0.5, False)
    assert first.written == "dropout(p=0.5, training=False)"
    assert "not in training either" in inspection.findings[0].finding


def test_linears_are_nodes_with_the_shape_of_their_weight():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("linear.weight")
    graph.output(graph.call_function(F.linear, (graph.call_function(F.linear, (x, x)), weight)))
    computed, read = nodes_of(fx.GraphModule(Made(None), graph))
    assert (read.op, read.family, read.shape, read.dtype) == ("linear", "Linear", (4, 4), "float32")
    assert (read.p, read.written, computed.shape) == (None, "linear(4, 4)", None)


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        ("Dropout", {"drop", "dropout", "dropout_1"}),
        ("dropout", {"dropout", "dropout_1"}),
        ("*@dropout_1", {"dropout_1"}),
        ("Linear", {"linear", "linear_1"}),
        (nn.Dropout, {"drop"}),
        (lambda site: site.kind == "node" and site.p == 0.2, {"dropout_1"}),
    ],
)
def test_selectors_reach_nodes_by_kind_and_by_path(selector, paths):
    graph = fx.symbolic_trace(Plain())
    variant = "dropconnect" if selector == "Linear" else "dropout(p=0.3)"
    assert {edit.path for edit in regraft.plan(graph, {selector: variant}).grafted} == paths


def test_a_called_kind_is_meant_by_the_name_of_its_module():
    graph = fx.symbolic_trace(Made(lambda x: F.dropout2d(F.feature_alpha_dropout(x, 0.3, True), 0.3)))
    edits = regraft.plan(graph, {"Dropout2d": "gaussian", "FeatureAlphaDropout": "dropout"}).grafted
    assert [edit.op for edit in edits] == ["feature_alpha_dropout", "dropout2d"]
    with pytest.raises(NoMatchError, match="matches nothing"):
        regraft.plan(graph, {"Dropout": "gaussian"})


def test_modules_that_a_graph_calls_stay_module_sites():
    sites = {(site.path, site.kind): site for site in regraft.inspect(fx.symbolic_trace(Plain())).sites}
    assert list(sites) == [
        ("dropout", "node"),
        ("dropout_1", "node"),
        ("linear_1", "node"),
        ("linear", "module"),
        ("drop", "module"),
    ]


def test_a_graph_inside_a_model_prefixes_its_nodes_and_keeps_both_names():
    sites = nodes_of(Twice(), torch.ones(2, 4))
    assert [site.paths for site in sites[:2]] == [
        ("one.dropout", "other.dropout"),
        ("one.dropout_1", "other.dropout_1"),
    ]
    assert {site.calls for site in sites} == {2}


def test_a_function_that_drops_inside_is_found_by_the_probe_at_its_own_nodes():
    graph = fx.symbolic_trace(Wrapped())
    assert nodes_of(graph) == []
    sites = {(site.path, site.op): site for site in nodes_of(graph, torch.ones(2, 3, 4, 4))}
    first, second = sites["noisy", "dropout"], sites["noisy_1", "dropout"]
    assert (first.p, first.calls, first.draws_in_eval) == (0.1, 2, True)
    assert (second.p, second.calls, second.draws_in_eval) == (0.0, 2, False)
    assert sites["noisy_1", "dropout2d"].p == 0.3
    assert first.source.startswith("find/test_graph_sites.py:")


@pytest.mark.parametrize("kind", ["written out", "a function"])
def test_drop_paths_are_nodes(kind):
    if kind == "a function":
        layer = pytest.importorskip("torchvision.ops").StochasticDepth(0.25, "row")
    else:
        layer = pytest.importorskip("timm.layers").DropPath(0.25)
    (site,) = nodes_of(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), layer)), torch.ones(2, 4))
    assert (site.op, site.family, site.p, site.draws_in_eval) == ("DropPath", "DropPath", 0.25, True)
    # Traced itself, its class is still called so; but it is a graph, not a drop-path.
    alone = fx.symbolic_trace(layer)
    assert {site.kind for site in regraft.inspect(alone).sites} == {"node"}


def test_a_node_whose_result_is_not_used_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(F.dropout, (x, 0.5, True, True))
    graph.output(x)
    (skip,) = regraft.plan(fx.GraphModule(nn.Module(), graph), {"Dropout": "gaussian"}).skipped
    assert "nothing in the graph uses its result" in skip.reason


def test_what_tracing_fixed_is_a_finding_until_it_is_mended():
    graph = fx.symbolic_trace(Plain())
    x = torch.ones(2, 4)
    findings = regraft.inspect(graph, x).findings
    assert [(one.path, one.remedy[:31]) for one in findings] == [
        ("dropout", "apply {'Dropout': 'dropout'}: t"),
        ("dropout_1", "apply {'Dropout': 'dropout'}: t"),
    ]
    assert "it drops in eval too" in findings[0].finding
    regraft.apply(graph, {"Dropout": "dropout"}, x)
    assert regraft.inspect(graph, x).findings == []


def test_what_no_rule_can_mend_is_a_finding_too():
    def forward(x):
        x = F.batch_norm(x, None, None, training=True)
        return x * torch.empty_like(x).bernoulli_(0.5) * torch.bernoulli(x)

    findings = regraft.inspect(fx.symbolic_trace(Made(forward))).findings
    assert [(one.path, one.finding.partition(" ")[0]) for one in findings] == [
        ("batch_norm", "batch_norm"),
        ("bernoulli_", "bernoulli_"),
        ("bernoulli", "bernoulli"),
    ]


def test_trace_keeps_what_can_be_grafted_whole_and_the_lines_of_the_source():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.DropPath(0.2), regraft.nn.GaussianDropout(0.1), tiny.Calls())
    traced = regraft.trace(model)
    inspection = regraft.inspect(traced, torch.ones(2, 3))
    sites = [(site.path, site.kind) for site in inspection.sites]
    assert sites == [("dropout", "node"), ("0", "module"), ("1", "module")]
    assert inspection.sites[0].source.startswith("tests/tiny.py:")
    assert inspection.sites[1].source is None  # the line is generated code
    assert traced.get_submodule("1") is model[1]


def test_trace_leaves_the_model_alone_and_gives_its_weights_and_mode():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), nn.Dropout(0.2)).eval()
    model[1].train()
    before = {name: id(module) for name, module in model.named_modules()}
    traced = regraft.trace(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(one is other for one, other in zip(traced.parameters(), model.parameters(), strict=True))
    assert [module.training for module in traced.modules()] == [False, False, False, False, True]
    assert type(traced).__name__ == "Sequential"


def test_a_traced_model_can_be_loaded_without_regraft():
    data = pickle.dumps(regraft.trace(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))))
    assert b"regraft" not in data


def test_a_traced_timm_model_makes_its_own_inputs():
    pytest.importorskip("timm")
    assert regraft.inspect(regraft.trace(tiny.vit())).probe.ran


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_trace_says_in_one_sentence_why_it_fails_and_where():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Branches()))
    with pytest.raises(ModelError) as raised:
        regraft.trace(model)
    assert raised.value.what.startswith("torch.fx cannot trace Sequential.1.0: symbolically traced variables")
    assert "\n" not in raised.value.what
    assert raised.value.where.startswith("find/test_graph_sites.py:")
    assert "regraft.apply" in raised.value.remedy


def test_trace_takes_arguments_to_fix():
    class Optional(nn.Module):
        def forward(self, x, scale=None):
            return x if scale is None else x * scale

    traced = regraft.trace(Optional(), concrete_args={"scale": None})
    assert torch.equal(traced(torch.ones(2)), torch.ones(2))


def test_a_model_whose_own_forward_is_grafted_is_not_traced():
    model = tiny.Calls()
    regraft.apply(model, {"Dropout": "gaussian"}, torch.ones(2, 3))
    with pytest.raises(ModelError, match="forward is grafted"):
        regraft.trace(model)
    outer = nn.Sequential(nn.Linear(3, 3), model)
    traced = regraft.trace(outer)  # deeper down the grafted module is kept whole
    assert traced.get_submodule("1") is model


@pytest.mark.parametrize("what", [{}, nn.Linear, None])
def test_trace_refuses_what_is_no_model(what):
    with pytest.raises(ModelError):
        regraft.trace(what)

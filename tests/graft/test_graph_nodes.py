"""Grafts at graph nodes: what they do in training and in eval, and that nothing else of the graph changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from snapshots import same_in_eval
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import MisfitError, NoMatchError
from regraft.graft import classes, graph_nodes
from regraft.variants import registry


class Net(nn.Module):
    """Dropouts of several kinds as functions, between two modules."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = F.dropout(self.linear(x), 0.5, self.training)
        x = torch.dropout(self.drop(x), 0.2, self.training)
        x = F.dropout1d(x.unsqueeze(0), 0.3, self.training).squeeze(0)
        rate = 0.4 if self.training else 0.0
        q = x.reshape(x.shape[0], 2, 4)
        x = F.scaled_dot_product_attention(q, q, q, dropout_p=rate).flatten(1)
        return self.head(F.linear(x, self.linear.weight, self.linear.bias))


class One(nn.Module):
    def __init__(self, p=0.5, width=8):
        super().__init__()
        self.linear, self.p = nn.Linear(width, width), p

    def forward(self, x):
        return F.dropout(self.linear(x), self.p, self.training)


class Clashing(nn.Module):
    """Its attributes have the names that the nodes get."""

    def __init__(self):
        super().__init__()
        self.dropout, self.dropout_1_1 = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = F.dropout(self.dropout(x), 0.5, self.training)
        return F.dropout(x, 0.5, self.training) * self.dropout_1_1


class Outer(nn.Module):
    """A functional dropout around a graph that has one too."""

    def __init__(self):
        super().__init__()
        self.inner = fx.symbolic_trace(One())

    def forward(self, x):
        return F.dropout(self.inner(x), 0.3, self.training)


def noisy(x, rate, training=True):
    return F.dropout(x, rate, training)


def careless(x):
    """It drops whatever the mode, and has no flag to say so."""
    return F.dropout(x, 0.5)


fx.wrap("noisy")
fx.wrap("careless")


class Wrapped(nn.Module):
    def forward(self, x):
        return careless(noisy(x, 0.5, self.training))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def looks(graph):
    """What a graph module is, but for its code's own objects."""
    kept = [(node, node.name, node.op, node.target, node.args, node.kwargs) for node in graph.graph.nodes]
    return kept, graph.code, dict(graph._modules), list(graph.state_dict()), graph.__dict__.keys()


def random_in(graph, x=X):
    with torch.no_grad():
        return not torch.equal(graph(x), graph(x))


def zeros(model, x=None):
    return (model(torch.ones(400, 8) if x is None else x) == 0).float().mean().item()


def test_trap_10_a_traced_model_is_random_in_eval_until_its_dropouts_follow_the_mode():
    net = Net()
    graph = fx.symbolic_trace(net)
    graph.eval()
    assert random_in(graph)
    report = regraft.apply(graph, {"Dropout": "dropout", "Dropout1d": "dropout"}, X)
    assert not random_in(graph)
    assert same_in_eval(graph, net, X)
    graph.train()
    assert random_in(graph)
    assert [one.path for one in report.mended] == [
        "dropout",
        "dropout_1",
        "dropout1d",
        "scaled_dot_product_attention",
    ]
    assert "training=True" in report.mended[0].what
    assert next(one for one in report.grafted if one.kind == "module").path == "drop"


def test_a_model_traced_in_eval_drops_in_training_again():
    net = One(0.5).eval()
    graph = fx.symbolic_trace(net)
    (mended,) = regraft.apply(graph, {"Dropout": "dropout"}).mended
    assert "training=False" in mended.what
    assert same_in_eval(graph, net, X)
    assert zeros(graph.train()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "name", [one for one in registry.names() if "Dropout" in registry.spec(one).families]
)
def test_every_variant_of_dropouts_at_every_kind_of_node(name):
    net = Net()
    graph = fx.symbolic_trace(net)
    before, spec = looks(graph), registry.spec(name)
    skipped = spec.state is not None and spec.adds_state(registry.complete_options(spec, {}))
    report = regraft.apply(graph, {"Dropout": name, "Dropout1d": name}, X)
    graph.graph.lint()
    assert [key for key in graph.state_dict() if key not in report.state_keys] == list(before[3])
    assert set(graph.state_dict()) == {*before[3], *report.state_keys}
    if skipped:
        assert {one.path for one in report.skipped} == {"dropout", "dropout_1", "dropout1d"} | {
            "scaled_dot_product_attention"
        }
        assert all("a node has no module" in one.reason for one in report.skipped)
    elif spec.attention:
        assert [one.path for one in report.grafted] == ["scaled_dot_product_attention"]
    elif spec.activations:
        assert [one.path for one in report.skipped] == ["scaled_dot_product_attention"]
    elif spec.changes_eval is None:
        assert same_in_eval(graph, net, X)
        assert random_in(graph.train()) == (name != "off")
    graph(X).sum().backward()
    regraft.revert(graph)
    assert looks(graph) == before


@pytest.mark.parametrize("name", [one for one in registry.names() if "Linear" in registry.spec(one).families])
def test_every_variant_of_linears_at_a_node(name):
    net = Net()
    graph = fx.symbolic_trace(net)
    before, spec = looks(graph), registry.spec(name)
    report = regraft.plan(graph, {"Linear@linear_1": f"{name}(p=0.3)" if spec.rated else name})
    regraft.apply(graph, report)
    regraft.apply(graph, {"Dropout": "off", "Dropout1d": "off"})
    if report.grafted:
        assert report.grafted[0].op == "linear"
        assert random_in(graph)
        graph(X).sum().backward()
        assert net.linear.weight.grad is not None  # the very weight the node had
    else:
        assert spec.state is not None or name == "off"
    assert same_in_eval(graph, net, X)
    regraft.revert(graph)
    assert looks(graph) == before


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("dropout", 0.4), ("dropout(p='x2')", 0.8), ("dropout(p=0.1)", 0.1), ("off", 0.0), ("spatial", 0.4)],
)
def test_a_node_drops_at_the_rate_it_carries_unless_the_rule_has_one(variant, expected):
    graph = fx.symbolic_trace(One(0.4))
    regraft.apply(graph, {"Dropout": variant.replace("'x2'", '"x2"')})
    x = torch.ones(400, 8) if variant != "spatial" else torch.ones(400, 3, 8)
    assert zeros(graph, x) == pytest.approx(expected, abs=0.06)


def test_a_rate_of_0_is_skipped_unless_the_rule_has_one():
    graph = fx.symbolic_trace(One(0.0))
    report = regraft.apply(graph, {"Dropout": "gaussian"})
    assert (report.grafted, report.skipped[0].reason) == ([], "its rate is 0")
    regraft.apply(graph, {"Dropout": "dropout(p=0.5)"})
    assert zeros(graph) == pytest.approx(0.5, abs=0.06)


def test_attention_keeps_its_kernel_for_a_rate_and_is_written_out_for_noise():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            rate = 0.5 if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=True)

    q, k, v = torch.randn(3, 2, 4, 5, 6).unbind()
    graph, node = fx.symbolic_trace(Attention()), "scaled_dot_product_attention"
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    regraft.apply(graph, {"Dropout": "dropout(p=0.0)"})
    assert torch.equal(graph(q, k, v), expected)
    regraft.apply(graph, {"Dropout": "gaussian(sigma=1e-6)"})
    assert torch.allclose(graph(q, k, v), expected, atol=1e-4)
    assert not torch.equal(graph(q, k, v), expected)
    assert torch.equal(graph.eval()(q, k, v), expected)
    (skip,) = regraft.plan(graph, {"Dropout": "gaussian"}, fused="keep").skipped
    assert (skip.path, "kernel is kept" in skip.reason) == (node, True)


def test_a_function_that_drops_inside_follows_the_mode_with_and_without_a_flag():
    graph = fx.symbolic_trace(Wrapped())
    before, x = looks(graph), torch.ones(400, 8)
    plan = regraft.plan(graph, {"Dropout": "dropout(p=0.2)"}, x)
    assert [edit.path for edit in plan.grafted] == ["noisy", "careless"]
    assert len(regraft.apply(graph, plan).mended) == 2
    assert zeros(graph, x) == pytest.approx(1 - 0.8**2, abs=0.06)
    assert torch.equal(graph.eval()(x), x)
    again = pickle.loads(pickle.dumps(graph))
    assert torch.equal(again(x), x)
    assert regraft.revert(again).code == before[1]  # with what declares the functions as not to be traced
    pickle.loads(pickle.dumps(again))
    regraft.revert(graph)
    assert looks(graph) == before


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_drop_paths_written_out_or_called_are_made_to_follow_the_mode(kind):
    layers = pytest.importorskip("timm.layers" if kind == "timm" else "torchvision.ops")
    layer = layers.DropPath(0.5) if kind == "timm" else layers.StochasticDepth(0.5, "row")
    graph = fx.symbolic_trace(nn.Sequential(layer))
    before, x = looks(graph), torch.ones(400, 8)
    (mended,) = regraft.apply(graph, {"DropPath": "droppath"}, x).mended
    y = graph(x)
    assert bool((y == y[:, :1]).all())
    assert zeros(graph, x) == pytest.approx(0.5, abs=0.1)
    assert torch.equal(graph.eval()(x), x)
    assert mended.what.startswith("tracing had fixed DropPath(p=0.5")
    regraft.apply(graph, {"DropPath": "droppath(p=0.1)"}, x)
    assert zeros(graph.train(), x) == pytest.approx(0.1, abs=0.06)
    regraft.revert(graph)
    assert looks(graph) == before


def test_applied_twice_is_applied_once_and_reverted_twice_is_reverted_once():
    graph, rules = fx.symbolic_trace(Net()), {"Dropout": "gaussian", "Linear@linear_1": "dropconnect"}
    before, sites = looks(graph), regraft.inspect(graph, X).sites
    regraft.apply(graph, rules, X)
    once = looks(graph)
    regraft.apply(graph, rules, X)
    assert looks(graph) == once
    after = regraft.inspect(graph, X).sites
    assert [(s.path, s.op, s.p, s.calls, s.written) for s in after] == [
        (s.path, s.op, s.p, s.calls, s.written) for s in sites
    ]
    assert {s.path: s.variant for s in after if s.kind == "node"}["dropout"] == "gaussian_dropout(p=0.5)"
    regraft.revert(regraft.revert(graph))
    assert looks(graph) == before


def test_untouched_nodes_and_their_names_stay():
    graph = fx.symbolic_trace(Net())
    before = {node: (node.name, node.args, node.kwargs) for node in graph.graph.nodes}
    regraft.apply(graph, {"Dropout@dropout_1": "gaussian"})
    assert {node: (node.name, node.args, node.kwargs) for node in graph.graph.nodes} == before
    assert [node.name for node in graph.graph.nodes if node.op == "call_module"] == [
        "linear",
        "drop",
        "dropout_1",
        "head",
    ]


def test_reverted_in_part():
    graph = fx.symbolic_trace(Net())
    before = looks(graph)
    regraft.apply(graph, {"Dropout@dropout": "gaussian"})
    part = graph.code
    regraft.apply(graph, {"Dropout": "gaussian"})
    with pytest.raises(NoMatchError, match="dropout_1"):
        regraft.revert(graph, "Dropout@nowhere")
    for selector in ("Dropout@dropout_1", "scaled_dot_product_attention", "*@drop"):
        regraft.revert(graph, selector)
    assert graph.code == part
    assert list(graph._modules) == ["linear", "drop", "head", "dropout"]
    regraft.revert(graph, "Dropout@dropout")
    assert looks(graph) == before


def test_grafted_for_a_block_restores_what_was_there_also_after_an_error():
    graph = fx.symbolic_trace(Net())
    before = looks(graph)
    with regraft.grafted(graph, {"Dropout": "mc", "Dropout1d": "mc"}, X):
        assert random_in(graph.eval())
    assert looks(graph) == before
    regraft.apply(graph, {"Dropout@dropout": "gaussian"})
    some = looks(graph)
    with pytest.raises(KeyError), regraft.grafted(graph, {"Dropout": "uniform"}, X):
        raise KeyError
    assert looks(graph) == some
    (site,) = (one for one in regraft.inspect(graph).sites if one.path == "dropout")
    assert site.variant == "gaussian_dropout(p=0.5)"


@pytest.mark.parametrize("fails", ["at a node", "at the end"])
def test_an_error_on_the_way_leaves_the_graph_as_it_was(fails, monkeypatch):
    graph = fx.symbolic_trace(Net())
    before, calls = looks(graph), []

    def fail(*args):
        calls.append(args)
        if len(calls) == (3 if fails == "at a node" else 1):
            raise RuntimeError("broken")
        return original(*args)

    place = (graph_nodes, "set_graft") if fails == "at a node" else (graph_nodes, "compile_graph")
    original = getattr(*place)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(RuntimeError, match="broken"):
        regraft.apply(graph, {"Dropout": "gaussian"})
    monkeypatch.undo()
    assert len(calls) > 1
    assert looks(graph) == before
    assert graph.forward.__code__.co_code == fx.symbolic_trace(Net()).forward.__code__.co_code


@pytest.mark.parametrize("way", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_copy_is_grafted_too_and_reverts_by_itself(way):
    net = Net()
    graph = fx.symbolic_trace(net)
    code, names = graph.code, [node.name for node in graph.graph.nodes]
    regraft.apply(graph, {"Dropout": "gaussian", "Dropout1d": "uniform", "Linear@linear_1": "dropconnect"})
    grafted, other = graph.code, way(graph)
    assert other.code == grafted
    assert random_in(other)
    assert same_in_eval(other, net, X)
    assert {site.path for site in regraft.inspect(other).sites if site.variant} == {
        site.path for site in regraft.inspect(graph).sites if site.variant
    }
    regraft.revert(other)
    assert (other.code, [node.name for node in other.graph.nodes]) == (code, names)
    assert list(other._modules) == ["linear", "drop", "head"]
    assert graph.code == grafted
    assert random_in(graph)


def test_names_that_are_taken_are_avoided():
    net = Clashing()
    graph = fx.symbolic_trace(net)
    before, paths = looks(graph), [s.path for s in regraft.inspect(graph).sites if s.kind == "node"]
    graph.add_module(paths[1], nn.Identity())
    regraft.apply(graph, {"Dropout": "gaussian"})
    graph.graph.lint()
    assert same_in_eval(graph, net, torch.randn(3, 4))
    assert [one.path for one in regraft.inspect(graph).sites if one.variant] == paths
    again = pickle.loads(pickle.dumps(graph))
    regraft.revert(graph, f"Dropout@{paths[1]}")
    regraft.revert(graph)
    assert isinstance(graph._modules.pop(paths[1]), nn.Identity)
    assert looks(graph) == before
    assert [one.path for one in regraft.inspect(again).sites if one.variant] == paths


def test_a_call_around_a_graph_does_not_reach_into_it():
    model = Outer()
    code = model.inner.code
    report = regraft.apply(model, [("Dropout", "gaussian(p=1e-6)"), ("Dropout@inner.*", "dropout(p=0.5)")], X)
    assert [(one.path, one.kind) for one in report.grafted] == [("", "call"), ("inner.dropout", "node")]
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert zeros(one.train()) == pytest.approx(0.5, abs=0.06)
        assert torch.equal(one.eval()(X), model.inner.linear(X))
        one.inner.recompile()  # others may edit the graph as well
        assert zeros(one.train()) == pytest.approx(0.5, abs=0.06)
    regraft.revert(model, "Dropout@inner.*")
    assert model.inner.code == code
    assert zeros(model) == pytest.approx(0.5, abs=0.06)
    regraft.revert(model)
    assert zeros(model) == pytest.approx(1 - 0.5 * 0.7, abs=0.06)
    assert not hasattr(model.inner, "_regraft")


def test_a_graph_is_grafted_below_r_drop():
    graph = regraft.trace(One())
    before = graph.code
    regraft.rdrop(graph, criterion=F.mse_loss, task="regression")
    layered = type(graph)
    regraft.apply(graph, {"Dropout": "gaussian"}, X)
    assert type(graph) is layered
    other = copy.deepcopy(graph)
    assert "passes" in other._regraft
    assert classes.compile_graph(other).src == graph.code
    regraft.revert(graph)
    assert graph.code == before
    assert zeros(graph) > 0.4


def test_what_other_tools_do_to_the_graph_since():
    graph = fx.symbolic_trace(Net())
    code = graph.code
    regraft.apply(graph, {"Dropout": "gaussian"})
    rewritten = fx.Transformer(graph).transform()
    regraft.revert(rewritten)
    assert rewritten.code == code
    regraft.apply(graph, {"Dropout": "gaussian"})
    node = next(one for one in graph.graph.nodes if one.name == "dropout_1")
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    graph.recompile()
    graph(X)
    regraft.revert(graph)
    assert [one.name for one in graph.graph.nodes if one.target in (F.dropout, torch.dropout)] == ["dropout"]


def test_accelerates_hook_runs_the_new_code():
    hooks = pytest.importorskip("accelerate.hooks")
    graph = fx.symbolic_trace(One())
    hooks.add_hook_to_module(graph, hooks.ModelHook())
    regraft.apply(graph, {"Dropout": "dropout"})
    graph.eval()
    assert not random_in(graph)
    regraft.revert(graph)
    assert random_in(graph)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_the_same_noise(reentrant):
    graph = regraft.trace(Net())
    regraft.apply(graph, {"Dropout": "gaussian", "Dropout1d": "uniform"}, X)
    gradients = []
    for forward in (graph, lambda x: checkpoint(graph, x, use_reentrant=reentrant)):
        graph.zero_grad()
        torch.manual_seed(3)
        forward(X.clone().requires_grad_()).square().sum().backward()
        gradients.append(graph.linear.weight.grad.clone())
    assert torch.equal(*gradients)


def test_compiled_in_one_graph():
    graph = regraft.trace(One())
    regraft.apply(graph, {"Dropout": "gaussian"}, X)
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    assert random_in(compiled)
    graph.eval()
    assert torch.equal(compiled(X), graph.linear(X))


def test_a_plan_is_kept_and_fits_only_a_graph_with_its_nodes(tmp_path):
    graph = fx.symbolic_trace(Net())
    regraft.apply(graph, {"Dropout": "gaussian", "Linear@linear_1": "dropconnect"})
    regraft.save_plan(graph, tmp_path)
    again = fx.symbolic_trace(Net())
    report = regraft.load_plan(again, tmp_path)
    assert again.code == graph.code
    assert len(report.mended) == 3
    regraft.load_plan(graph, tmp_path)
    assert again.code == graph.code
    with pytest.raises(MisfitError, match="dropout_1: the plan has node dropout, this model nothing"):
        regraft.load_plan(fx.symbolic_trace(One()), tmp_path)


def _torchvision(name, **options):
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=5, **options)


def _timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options)


MODELS = {
    "torchvision resnet18": lambda: _torchvision("resnet18"),
    "torchvision densenet121": lambda: _torchvision("densenet121", drop_rate=0.2),
    "torchvision efficientnet_b0": lambda: _torchvision("efficientnet_b0"),
    "torchvision swin": lambda: _torchvision(
        "SwinTransformer",
        patch_size=[2, 2],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[4, 4],
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "torchvision vit": lambda: _torchvision(
        "VisionTransformer",
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "timm resnet18": lambda: _timm("resnet18", drop_rate=0.1, drop_path_rate=0.1),
    "timm vit_tiny": lambda: _timm(
        "vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1
    ),
    "timm convnext": lambda: _timm("convnext_atto", drop_rate=0.1, drop_path_rate=0.1),
}
NODES = {"torchvision densenet121": 58, "torchvision swin": 4, "timm resnet18": 1, "timm vit_tiny": 2}
"""How many of the sites are nodes; of the others all dropouts are modules."""


@pytest.mark.parametrize("name", MODELS)
def test_models_traced_and_grafted_compute_what_the_untraced_model_does(name):
    model, x = MODELS[name](), tiny.images()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # a head of zeros would hide everything
    traced = regraft.trace(model)
    before = looks(traced)
    sites = [site for site in regraft.inspect(traced, x).sites if site.family in ("Dropout", "DropPath")]
    assert sum(site.kind == "node" for site in sites) == NODES.get(name, 0)
    assert not any(site.kind == "call" for site in sites)
    found = {"DropPath" if site.family == "DropPath" else "Dropout" for site in sites}
    rules = {kind: {"Dropout": "gaussian", "DropPath": "droppath"}[kind] for kind in sorted(found)}
    report = regraft.apply(traced, rules, x)
    traced.graph.lint()
    assert len(report.mended) == NODES.get(name, 0)
    assert len(report.grafted) + len(report.skipped) == len(sites)
    # torch.fx keeps modules in the order of their use.
    assert set(traced.state_dict()) == set(model.state_dict())
    assert same_in_eval(traced, model, x)
    assert random_in(traced.train(), x) == bool(report.grafted)
    regraft.revert(traced)
    assert looks(traced) == before

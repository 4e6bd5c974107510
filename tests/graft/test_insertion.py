"""Insertion: dropout where a model has none. In front of modules and behind them, on what really flows there."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import ModelError, NoMatchError, RuleSyntaxError, WrongKindError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def resnet():
    import timm

    return timm.create_model("resnet10t", num_classes=5)


def vit(**rates):
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=5, **rates
    )


def llama():
    return tiny.llama(0.0)


REAL = {
    "llama": (
        llama,
        lambda model: model(**tiny.tokens(), labels=tiny.tokens()["input_ids"])[:2],
        {
            "after:Embedding@model.embed_tokens": "dropout(p=0.1)",
            "after:LlamaMLP": "spatial(p=0.1)",
            "after:LlamaAttention": "droppath(p=0.2)",
            "before:Linear@lm_head": "dropout",
        },
    ),
    "resnet": (
        resnet,
        lambda model: ((out := model(tiny.images(4, 64))).square().sum(), out),
        {
            "before:ResNet": "dropout(p=0.1)",
            "after:re:layer[34]": "dropblock(p=0.1, block_size=3)",
            "before:Linear@fc": "gaussian",
            "after:BatchNorm2d@layer*.*.bn2": "droppath(p=0.3)",
        },
    ),
    "vit": (
        vit,
        lambda model: ((out := model(tiny.images())).square().sum(), out),
        {
            "after:PatchEmbed": "token(p=0.1)",
            "after:Identity@blocks.*.drop_path{1..2}": "droppath(p=0.3)",
            "after:GELU": "dropout(p=0.1)",
        },
    ),
}


@pytest.mark.parametrize(("build", "run", "rules"), REAL.values(), ids=REAL)
def test_models_with_every_rate_at_0_train_with_it_and_come_back(build, run, rules):
    torch.manual_seed(0)
    model = build()
    classes = {name: (type(one), set(vars(one))) for name, one in model.named_modules()}
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = run(model.eval())[1].clone()
    report = regraft.apply(model, rules)
    assert {edit.rule for edit in report.grafted} == set(range(len(rules)))
    assert {edit.kind for edit in report.grafted} == {"inserted"}
    assert report.state_keys == []
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(run(model)[1], expected)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        run(model)[0].backward()
        optimizer.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 0.9 * len(before)
    with torch.no_grad():
        model.apply(lambda one: setattr(one, "momentum", 0.0) if isinstance(one, nn.BatchNorm2d) else None)
        assert not torch.equal(run(model)[1], run(model)[1])
        regraft.revert(model)
        assert torch.equal(run(model)[1], run(model)[1])
    assert list(model.state_dict()) == keys
    assert {name: (type(one), set(vars(one))) for name, one in model.named_modules()} == classes


def test_it_is_on_exactly_what_flows_there():
    model = mlp().train()
    regraft.apply(model, {"after:ReLU": "dropout(p=0.5)", "before:Linear@0": "dropout(p=0.25)"})
    seen = {}
    model[1].register_forward_hook(lambda _, given, out: seen.update(relu=(given[0], out)))
    torch.manual_seed(3)
    y = model(X)
    plain = mlp()
    torch.manual_seed(3)
    x = torch.nn.functional.dropout(X, 0.25)
    hidden = plain[1](plain[0](x))
    kept = torch.nn.functional.dropout(hidden, 0.5)
    assert torch.equal(seen["relu"][0], plain[0](x))
    assert torch.equal(seen["relu"][1], kept)
    assert torch.equal(y, plain[2](kept))
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2"]
    assert torch.equal(model.eval()(X), mlp()(X))


def test_the_default_rate_is_the_low_end_of_the_range():
    report = regraft.apply(mlp(), {"after:ReLU": "dropout"})
    assert (report.grafted[0].options["p"], report.grafted[0].after) == (0.2, "ReLU, then Dropout(p=0.2)")


KEYS = [
    ("after:ReLU", ["1"]),
    (regraft.after("ReLU"), ["1"]),
    (regraft.after(nn.ReLU), ["1"]),
    (regraft.after(lambda site: site.path == "1"), ["1"]),
    ("after:Linear@{0..1}", ["0"]),
    ("before:re:[02]", ["0", "2"]),
    ("after:*@**", ["", "0", "1", "2"]),
    ("before:Sequential", [""]),
]


@pytest.mark.parametrize(("key", "paths"), KEYS, ids=[str(getattr(key, "text", key)) for key, _ in KEYS])
def test_keys_of_every_kind(key, paths):
    report = regraft.apply(mlp(), {key: "dropout"}, X)
    assert [edit.path for edit in report.grafted] == paths
    position = "before" if str(getattr(key, "text", key)).startswith("before") else "after"
    assert all(edit.op.startswith(f"{position}:") for edit in report.grafted)


def test_none_leaves_a_place_alone_and_the_later_rule_wins():
    rules = {"after:Linear": "dropout", "after:Linear@0": None, "after:Linear@2": "gaussian(p=0.3)"}
    report = regraft.apply(mlp(), rules, X)
    assert [(edit.path, edit.variant, edit.rule) for edit in report.grafted] == [("2", "gaussian", 2)]


class Pair(NamedTuple):
    steps: int
    states: Tensor
    more: Tensor


class Several(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, count, x, *, other=None):
        y = x + 1
        outputs = {
            "tuple": (count, y, x),
            "list": [None, [y, x]],
            "named": Pair(count, y, x),
            "dict": {"loss": y.sum(), "states": y, "more": x},
        }
        return outputs[self.how] if other is None else other


@pytest.mark.parametrize("how", ["tuple", "list", "named", "dict"])
def test_the_first_tensor_of_several(how):
    torch.manual_seed(0)
    model = Several(how)
    plain = copy.deepcopy(model)(3, X)
    report = regraft.apply(model, {"after:Several": "dropout(p=0.5)"}, (3, X))
    assert len(report.grafted) == 1, report
    made = model(3, X)
    flat = [one for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, Tensor)]
    same = [one for one in torch.utils._pytree.tree_leaves(plain) if isinstance(one, Tensor)]
    at = 1 if how == "dict" else 0
    assert type(made) is type(plain)
    assert [torch.equal(a, b) for a, b in zip(flat, same, strict=True)] == [i != at for i in range(len(flat))]
    kept = flat[at] != 0
    torch.testing.assert_close(flat[at][kept], 2 * same[at][kept])


def test_a_named_part_of_an_output_or_an_argument():
    model = Several("named")
    regraft.apply(model, {"after:Several#more": "dropout(p=0.5)"}, (3, X))
    made = model(3, X)
    assert torch.equal(made.states, X + 1)
    assert not torch.equal(made.more, X)
    regraft.revert(model)
    regraft.apply(model, {regraft.after("Several", field="1"): "dropout(p=0.5)"}, (3, X))
    assert not torch.equal(model(3, X).states, X + 1)
    regraft.revert(model)
    key = regraft.before(Several, field="x")
    assert key.text == "before:Several#x"
    regraft.apply(model, {key: "dropout(p=0.5)"}, (3, X))
    for made in (model(3, X), model(3, x=X), model(count=3, x=X)):
        assert (made.more == 0).any()
        assert torch.equal(made.states, made.more + 1)
    regraft.revert(model)
    regraft.apply(model, {"before:Several#other": "dropout(p=0.5)"}, (3, X))
    assert (model(3, X, other=X) == 0).any()
    with pytest.raises(ModelError, match="no 'other' in its input"):
        model(3, X)
    regraft.revert(model)
    regraft.apply(model, {"after:Several#nothing": "dropout(p=0.5)"}, (3, X))
    with pytest.raises(ModelError, match="no 'nothing' in its output"):
        model(3, X)
    assert model.eval()(3, X).steps == 3


def test_an_output_of_transformers_stays_one():
    model = tiny.llama(0.0).train()
    regraft.apply(model, {"after:LlamaModel#last_hidden_state": "dropout(p=0.5)"})
    out = model.model(**tiny.tokens(), output_hidden_states=True)
    assert type(out).__name__ == "BaseModelOutputWithPast"
    assert out.last_hidden_state is out["last_hidden_state"] is out[0]
    assert (out.last_hidden_state == 0).float().mean() > 0.3
    assert not (out.hidden_states[-1] == 0).any()


def test_drop_paths_grow_with_depth_as_timm_would_have_built_them():
    built, inserted = vit(drop_path_rate=0.3), vit()
    rates = {
        f"{path}.drop_path{n}": getattr(block, f"drop_path{n}").drop_prob
        for path, block in built.named_modules()
        if path.count(".") == 1 and path.startswith("blocks.")
        for n in (1, 2)
        if hasattr(getattr(block, f"drop_path{n}"), "drop_prob")
    }
    report = regraft.apply(inserted, {"after:Identity@blocks.*.drop_path{1..2}": "droppath(p=0.3)"})
    assert {edit.path: edit.options["p"] for edit in report.grafted} == pytest.approx(rates)
    assert {skip.path for skip in report.skipped} == {"blocks.0.drop_path1", "blocks.0.drop_path2"}
    assert "growing rates" in report.skipped[0].reason
    inserted.load_state_dict(built.state_dict())
    x = tiny.images(16)
    torch.manual_seed(1)
    expected = built.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(inserted.train()(x), expected)


def test_a_whole_block_keeps_its_input_and_loses_what_it_adds():
    model = tiny.llama(0.0).train()
    report = regraft.apply(model, {"after:LlamaDecoderLayer": "droppath(p=0.5)"})
    assert [(edit.path, edit.options["p"]) for edit in report.grafted] == [("model.layers.1", 0.5)]
    assert report.grafted[0].after == "LlamaDecoderLayer, then DropPath(p=0.5) on what it adds"
    seen = {}
    model.model.layers[1].register_forward_hook(
        lambda _, given, out: seen.update(x=given[0], y=out if isinstance(out, Tensor) else out[0])
    )
    tokens = {name: value.repeat(16, 1) for name, value in tiny.tokens().items()}
    model(**tokens)
    dropped = (seen["x"] == seen["y"]).flatten(1).all(1)
    assert 4 < dropped.sum() < 28
    regraft.revert(model)
    each = {"after:LlamaDecoderLayer": regraft.variant("droppath", p=lambda site: 0.1)}
    assert [edit.options["p"] for edit in regraft.plan(model, each).grafted] == [0.1, 0.1]


def test_a_block_that_is_no_residual_one_is_skipped():
    class Half(nn.Module):
        def forward(self, x):
            return x[:, ::2]

    model = nn.Sequential(Half(), nn.Linear(3, 3), nn.Linear(3, 3))
    report = regraft.apply(model, {"after:*@{0..2}": "droppath(p=0.4, adds=True)"}, X)
    assert [(edit.path, edit.options["p"]) for edit in report.grafted] == [("1", 0.2), ("2", 0.4)]
    assert report.skipped[0].path == "0"
    assert "no residual block" in report.skipped[0].reason


def test_whole_numbers_are_skipped_with_the_place_to_take():
    report = regraft.apply(tiny.llama(), {"before:Embedding": "dropout", "after:Embedding": "dropout"})
    assert [skip.reason for skip in report.skipped] == ["its input is token numbers"]
    assert "after:Embedding" in report.skipped[0].remedy
    with pytest.raises(ModelError, match="int64, and cannot be dropped"):
        model = tiny.llama().train()
        regraft.apply(model, {"before:LlamaForCausalLM": "dropout"})
        model(**tiny.tokens())


def test_what_never_runs_is_skipped():
    model = nn.Sequential(nn.MultiheadAttention(6, 2, batch_first=True))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.spare = model[0], nn.Linear(6, 6)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    report = regraft.apply(Net(), {"after:*@**": "dropout"}, X[None])
    assert [edit.path for edit in report.grafted] == ["", "attention"]
    assert {skip.path: skip.reason for skip in report.skipped} == {
        "attention.out_proj": "its forward was never called in the probe",
        "spare": "its forward was never called in the probe",
    }


def test_a_dropout_of_the_module_around_does_not_see_it():
    model = tiny.Calls(nn.Linear(6, 6), p=0.5).train()
    regraft.apply(model, {"dropout": "off", "after:Linear": "dropout(p=0.5)"}, X)
    assert 0.3 < (model(X) == 0).float().mean() < 0.7
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert 0.3 < (compiled(X) == 0).float().mean() < 0.7


class Written(nn.Module):
    """Functions between modules, for torch.fx to trace."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.first(x)) + x
        return nn.functional.linear(x, self.last.weight)


NODES = {
    "after": ({"after:relu": "dropout(p=0.5)"}, [("relu", "relu, then Dropout(p=0.5)")]),
    "before": ({"before:linear": "dropout(p=0.5)"}, [("linear", "Dropout(p=0.5), then linear")]),
    "path": ({"after:*@add": "droppath(p=0.5, adds=False)"}, [("add", "add, then DropPath(p=0.5)")]),
    "module": ({"after:Linear@first": "dropout"}, [("first", "Linear(6, 6), then Dropout(p=0.2)")]),
    "whole": ({regraft.before(lambda site: site.path == ""): "dropout"}, [("", None)]),
    "stacked": (
        {"linear": "dropconnect(p=0.2)", "after:linear": "dropout(p=0.1)"},
        [("linear", "dropconnect(6, 6, p=0.2, mask='batch')"), ("linear", "linear, then Dropout(p=0.1)")],
    ),
}


@pytest.mark.parametrize(("rules", "expected"), NODES.values(), ids=NODES)
def test_nodes_of_a_graph(rules, expected):
    model = torch.fx.symbolic_trace(Written()).train()
    x = torch.randn(64, 6)
    plain, code = model(x), model.code
    report = regraft.apply(model, rules, x)
    for edit, (path, said) in zip(report.grafted, expected, strict=True):
        assert (edit.path, edit.after) == (path, said or edit.after)
    inserted = [site for site in regraft.inspect(model, x).sites if site.kind == "inserted"]
    assert [(site.path, site.type, site.calls) for site in inserted] == [
        (expected[-1][0], "Linear" if expected[-1][0] == "first" else "Written", 1)
    ]
    for one in (model, copy.deepcopy(model)):
        assert not torch.equal(one.train()(x), one(x))
        assert torch.equal(one.eval()(x), plain)
        one.train()
        schedule = regraft.schedule(one, {"start": 0.0, "end": 0.5, "steps": 2}, None, x)
        assert torch.equal(one(x), plain)
        schedule.remove()
        regraft.apply(one, regraft.Plan.from_json(regraft.plan(one, rules, x).to_json()))
        assert not torch.equal(one(x), one(x))
        regraft.revert(one, "after:linear" if "linear" in rules else None)
        regraft.revert(one)
        assert torch.equal(one(x), plain)
        assert one.code == code
        assert [name for name, _ in one.named_modules()] == ["", "first", "last"]


def test_insertions_stack_with_grafts_and_with_each_other_and_applying_twice_is_applying_once():
    model = mlp().train()
    regraft.apply(model, {"Linear@2": "dropconnect(p=0.2)", "after:Linear@2": "dropout(p=0.5)"})
    regraft.apply(model, {"after:Linear@2": "gaussian(p=0.1)"})
    regraft.apply(model, {"after:Linear@2": "dropout(p=0.25)"})
    cls = type(model[2])
    regraft.apply(model, {"after:Linear@2": "dropout(p=0.25)"})
    assert type(model[2]) is cls
    there = [site for site in regraft.inspect(model).sites if site.kind == "inserted"]
    assert sorted(site.p for site in there) == [0.1, 0.25]
    regraft.revert(model, "after:Linear@2")
    assert repr(model[2]).startswith("DropConnectLinear")
    assert not [site for site in regraft.inspect(model).sites if site.kind == "inserted"]
    regraft.revert(model)
    assert type(model[2]) is nn.Linear


def test_part_of_it_reverts_and_a_block_of_code_has_it_for_its_length():
    model = mlp()
    regraft.apply(model, {"after:ReLU": "dropout", "before:Linear@0": "dropout", "Linear@2": "dropconnect"})
    assert len([s for s in regraft.inspect(model).sites if s.kind == "inserted"]) == 2
    regraft.revert(model, "before:Linear")
    assert [site.path for site in regraft.inspect(model).sites if site.kind == "inserted"] == ["1"]
    regraft.revert(model, "Dropout")
    assert not [site for site in regraft.inspect(model).sites if site.kind == "inserted"]
    assert repr(model[2]).startswith("DropConnectLinear")
    with regraft.grafted(model, {"after:ReLU": "dropout"}):
        assert type(model[1]) is not nn.ReLU
    assert type(model[1]) is nn.ReLU


def test_plans_go_through_json_and_files(tmp_path):
    model = tiny.llama(0.0)
    rules = {
        "after:LlamaDecoderLayer": "droppath(p=0.5)",
        regraft.after("LlamaModel", "last_hidden_state"): "dropout",
    }
    plan = regraft.plan(model, rules)
    assert plan.rules[1] == ["after:LlamaModel#last_hidden_state", "dropout"]
    again = regraft.Plan.from_json(plan.to_json())
    regraft.apply(model, again)
    regraft.save_plan(model, tmp_path)
    other = tiny.llama(0.0)
    report = regraft.load_plan(other, tmp_path)
    assert {(edit.path, edit.op) for edit in report.grafted} == {
        (edit.path, edit.op) for edit in plan.grafted
    }
    other.load_state_dict(model.state_dict())
    outputs = []
    for one in (model, other):
        torch.manual_seed(0)
        outputs.append(one.train()(**tiny.tokens()).logits)
    assert torch.equal(*outputs)


def test_copies_and_pickles_keep_it():
    model = mlp().train()
    regraft.apply(model, {"after:ReLU": "dropout(p=0.5)"})
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(made(X), made(X))
        regraft.revert(made)
        assert torch.equal(made(X), made(X))
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_draws_the_same_mask(reentrant):
    model = mlp().train()
    regraft.apply(model, {"after:Linear@0": "dropout(p=0.5)"})
    x = X.clone().requires_grad_()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        x.grad = None
        run(x).sum().backward()
        gradients.append(x.grad.clone())
    assert torch.equal(*gradients)


def test_one_graph_when_compiled_and_a_scheduled_rate_compiles_once_more():
    import torch._dynamo.testing

    torch._dynamo.reset()
    model = tiny.llama(0.0).train()
    regraft.apply(model, {"after:LlamaMLP": "dropout(p=0.1)", "after:LlamaDecoderLayer": "droppath(p=0.2)"})
    schedule = regraft.schedule(model, {"start": 0.05, "end": 0.5, "steps": 8}, "after:LlamaMLP")
    assert [one.path for one in schedule.rates] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(8):
        compiled(**tiny.tokens()).logits.sum().backward()
        schedule.step()
    assert counter.frame_count == 2
    schedule.remove()
    assert {one.p for one in regraft.inspect(model).sites if one.kind == "inserted" and "MLP" in one.op} == {
        0.1
    }
    torch._dynamo.reset()


def test_passes_differ_and_monte_carlo_dropout_can_be_inserted():
    model = mlp().eval()
    regraft.apply(model, {"after:ReLU": "mc(p=0.5)"})
    assert not torch.equal(model(X), model(X))
    regraft.revert(model)
    regraft.apply(model.train(), {"after:ReLU": "dropout(p=0.5)"})
    passes = regraft.stochastic_passes(model, 3, X)
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[1], passes[2])


def test_an_encoder_layer_in_eval_leaves_the_fused_path_for_what_acts_there():
    model = tiny.encoder().eval()
    x = torch.randn(2, 4, 16)
    regraft.apply(model, {"after:Linear@layers.0.linear1": "mc(p=0.5)"}, x)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    regraft.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_the_views_show_it_as_inserted():
    model = mlp()
    report = regraft.apply(model, {"after:ReLU": "dropout"}, X)
    assert "+ ReLU, then Dropout(p=0.2)" in str(report)
    (site,) = [one for one in regraft.inspect(model, X).to_dict()["sites"] if one["kind"] == "inserted"]
    assert (site["path"], site["op"], site["type"], site["p"], site["calls"]) == (
        "1",
        "after:ReLU",
        "ReLU",
        0.2,
        1,
    )
    assert site["variant"] == "ReLU, then Dropout(p=0.2)"
    assert "after:ReLU: 1 site" in str(regraft.inspect(model, X))
    assert "every rate is 0" not in str(regraft.inspect(model, X))


BAD = [
    ({"after:Tanh": "dropout"}, NoMatchError, "this model has Linear"),
    ({"after:Lineer": "dropout"}, NoMatchError, "did you mean 'Linear'"),
    ({"after:Linear": "dropconnect"}, WrongKindError, "cannot be inserted"),
    ({"after:Linear": "off"}, WrongKindError, "cannot be inserted"),
    ({"after:Linear": "neftune"}, WrongKindError, "cannot be inserted"),
    ({"after:Linear": "concrete"}, WrongKindError, "brings state of its own"),
    ({"after:": "dropout"}, RuleSyntaxError, "is empty"),
]


@pytest.mark.parametrize(("rules", "error", "said"), BAD, ids=[str(rules) for rules, *_ in BAD])
def test_bad_rules_change_nothing(rules, error, said):
    model = mlp()
    with pytest.raises(error, match=said):
        regraft.apply(model, {"after:ReLU": "dropout", **rules}, X)
    assert [type(one) for one in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_path_of_one_word_is_not_a_type_and_the_error_says_what_to_write():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 3))
    with pytest.raises(NoMatchError, match="'head' is a path: write 'before:\\*@head'"):
        regraft.apply(model, {"before:head": "dropout(p=0.5)"}, X)
    assert len(regraft.apply(model, {"before:*@head": "dropout(p=0.5)"}, X).grafted) == 1


def test_bad_keys():
    with pytest.raises(RuleSyntaxError, match="says where already"):
        regraft.after("before:Linear")
    with pytest.raises(RuleSyntaxError, match="is no name"):
        regraft.after("Linear", field=3)

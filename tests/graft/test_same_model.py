"""Promises 1 to 3: the same weights, the same model otherwise, the same eval output."""

from __future__ import annotations

import inspect
import tracemalloc

import pytest
import tiny
import torch
from snapshots import assert_same, same_in_eval, snapshot
from torch import nn

import regraft

IMAGES, TOKENS = (tiny.images(),), tiny.tokens()
MODELS = {
    "bert": (tiny.bert, (), TOKENS),
    "bert-eager": (lambda: tiny.bert(attention="eager"), (), TOKENS),
    "albert": (tiny.albert, (), TOKENS),
    "bart": (tiny.bart, (), TOKENS),
    "llama": (tiny.llama, (), TOKENS),
    "vit": (tiny.vit, IMAGES, {}),
    "densenet": (tiny.densenet, IMAGES, {}),
    "encoder": (tiny.encoder, (torch.ones(2, 5, 16),), {}),
    "transformer": (
        lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        (torch.ones(2, 5, 16), torch.ones(2, 4, 16)),
        {},
    ),
}
models = pytest.mark.parametrize(("build", "args", "kwargs"), MODELS.values(), ids=MODELS)
VARIANTS = ("gaussian", "multisample", "dropout(p=0.3)", "off", "spatial", "standout", "uniform", "token")


def given(args, kwargs):
    return kwargs or args


@models
def test_promise_1_the_same_weights(build, args, kwargs):
    model = build()
    before = dict(model.named_parameters(remove_duplicate=False))
    buffers, keys = dict(model.named_buffers(remove_duplicate=False)), list(model.state_dict())
    report = regraft.apply(
        model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}, given(args, kwargs)
    )
    assert len(report.grafted) > 2
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers(remove_duplicate=False))
    assert list(model.state_dict()) == keys
    assert report.state_keys == []
    build().load_state_dict(model.state_dict(), strict=True)


def test_promise_1_a_graft_allocates_no_parameter_memory():
    net = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)], nn.Dropout(0.1))
    regraft.apply(tiny.mlp(), {"Linear": "dropconnect(p=0.1)", "Dropout": "gaussian"})  # loads what it loads
    storages = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as seen:
        regraft.apply(net, {"Linear": "dropconnect(p=0.1)", "Dropout": "gaussian"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(max(0, event.cpu_memory_usage) for event in seen.events()) < 4096
    assert peak < 1_000_000
    assert {parameter.untyped_storage().data_ptr() for parameter in net.parameters()} == storages


def test_trap_13_an_optimizer_built_before_keeps_working():
    model = tiny.bert()
    decay = [p for name, p in model.named_parameters() if p.dim() > 1]
    rest = [p for name, p in model.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 0.01
    )
    regraft.apply(model, {"Dropout": "multisample", "Linear@classifier": "dropconnect(p=0.2)"})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert "classifier.weight" in moved
    assert len(moved) > 0.9 * len(before)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }


def test_tied_weights_stay_tied():
    model = tiny.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    regraft.apply(
        model, {"Linear@lm_head": "dropconnect(p=0.1)", "Embedding": "neftune", "Dropout": "gaussian"}
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(list(tiny.llama().parameters())) - 1


@models
def test_promise_2_owners_and_roots_keep_their_names_and_signatures(build, args, kwargs):
    model, other = build(), build()
    report = regraft.apply(model, {"Dropout": "gaussian"}, given(args, kwargs))
    leaves = {
        edit.path for edit in report.grafted if edit.kind == "module" and edit.op != "MultiheadAttention"
    }
    for (name, module), original in zip(model.named_modules(), other.modules(), strict=True):
        assert isinstance(module, type(original))
        assert inspect.signature(module.forward) == inspect.signature(original.forward)
        if name in leaves:
            assert repr(module).startswith("GaussianDropout(p=0.")
            continue
        assert list(module.children()) or repr(module) == repr(original)
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(module), attribute) == getattr(type(original), attribute)


def test_promise_2_everything_but_classes_rates_and_the_record_is_the_same_object():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.BatchNorm1d(3).double(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net[2].eval()
    net[0].register_forward_hook(lambda *_: None)
    net[1].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    net[1].register_full_backward_hook(lambda *_: None)
    net[3].register_state_dict_post_hook(lambda *_: None)
    net[3].note = ["mine"]
    before = snapshot(net)
    regraft.apply(net, {"Dropout": "gaussian(p=0.2)", "Linear": "dropconnect(p=0.1)"})
    after = snapshot(net)
    differ = {n for n in before.keys() | after.keys() if before.get(n) is not after.get(n)}
    differ = {n for n in differ if before.get(n) != after.get(n)}
    changed = {name.rpartition(".")[2].partition(":")[0] for name in differ}
    assert changed <= {"_regraft", "p", "0", "1", "3"} | {":class"}
    assert [module.training for module in net] == [True, True, False, True]
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    assert isinstance(net[1].p, float)


def test_hooks_still_run_and_see_the_variants_output():
    net, seen = tiny.mlp(p=0.5), []
    net[2].register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].shape)))
    net[2].register_forward_hook(lambda module, args, output: seen.append(("post", output)))
    regraft.apply(net, {"Dropout": "gaussian"})
    net(torch.ones(2, 6))
    assert [kind for kind, _ in seen] == ["pre", "post"]
    hidden = net[1](net[0](torch.ones(2, 6)))
    ratio = (seen[1][1] / hidden)[hidden > 0]
    assert ratio.unique().numel() == ratio.numel()  # gaussian noise, not a mask


def test_trap_1_a_variant_has_a_float_p_that_a_parent_may_read():
    net = tiny.bert()
    regraft.apply(net, {"Dropout": "multisample"})
    twin = net.bert.encoder.layer[0].attention.self.dropout
    assert twin.p == 0.1
    for module in net.modules():
        if type(module).__name__ == "MultiSampleDropout":
            assert isinstance(module.p, float)


def test_trap_4_training_flags_are_the_modules_own():
    net = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).eval()
    net[1].train()
    regraft.apply(net, {"Dropout": "gaussian"})
    assert [module.training for module in net] == [False, True]
    x = torch.ones(5)
    assert net[0](x) is x
    assert not torch.equal(net[1](x), x)


@models
@pytest.mark.parametrize("variant", VARIANTS)
def test_promise_3_eval_is_bit_for_bit_the_originals(build, args, kwargs, variant):
    torch.manual_seed(3)
    original = build()
    torch.manual_seed(3)
    model = build()
    report = regraft.apply(model, {"Dropout": variant}, given(args, kwargs))
    assert report.mended == []
    assert same_in_eval(original, model, *args, **kwargs)
    if variant != "off":
        model.train()
        first, second = (tiny.logits(model(*args, **kwargs)) for _ in range(2))
        assert not torch.equal(first, second)
    original.load_state_dict(model.state_dict())  # batch norm has counted the training forwards
    regraft.revert(model)
    assert same_in_eval(original, model, *args, **kwargs)


def test_off_makes_training_deterministic():
    model = tiny.bert()
    regraft.apply(model, {"Dropout": "off"})
    first, second = (model(**TOKENS).logits for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(first, model.eval()(**TOKENS).logits)


@models
def test_a_plan_changes_nothing(build, args, kwargs):
    model = build()
    before, state = snapshot(model), torch.get_rng_state()
    plan = regraft.plan(model, {"Dropout": "gaussian", "Linear": "mixout(p=0.1)"}, given(args, kwargs))
    assert plan.grafted
    assert_same(before, model)
    assert torch.equal(state, torch.get_rng_state())
    assert str(plan)
    assert plan._repr_html_()
    assert plan.to_markdown()

"""Promises 6 and 7: what other tools do to a model, before a graft and after it."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
from snapshots import differences, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import regraft

X = torch.randn(5, 6)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(module)


REPARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm (hook)": old_weight_norm,
    "spectral_norm (hook)": torch.nn.utils.spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
}
wraps = pytest.mark.parametrize("wrap", REPARAMETRIZED.values(), ids=REPARAMETRIZED)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1))


@wraps
def test_trap_16_reparametrized_before_the_graft(wrap):
    net, plain = linear(), linear()
    wrap(net[0])
    plain.load_state_dict(net.state_dict(), strict=False)
    before = snapshot(net)
    report = regraft.apply(net, {"Linear": "dropconnect(p=0.5)", "Dropout": "gaussian"})
    assert [edit.op for edit in report.grafted] == ["Linear", "Dropout"]
    first, second = net(X), net(X)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    regraft.revert(net)
    assert moved(before, net) == []
    assert torch.equal(net.eval()(X), net(X))


def moved(before, model):
    """What differs, but for the tensors that these tools compute anew at each forward."""
    anew = (".weight", ":version", "_buffers:entries")
    return [name for name in differences(before, snapshot(model)) if not name.endswith(anew)]


@wraps
def test_trap_16_reparametrized_after_the_graft(wrap):
    net = linear()
    kept = type(net[0])
    regraft.apply(net, {"Linear": "dropconnect(p=0.5)", "Dropout": "gaussian"})
    wrap(net[0])
    assert not torch.equal(net(X), net(X))
    net.eval()
    expected = net(X)
    torch.testing.assert_close(net(X), expected)
    regraft.revert(net)
    torch.testing.assert_close(net(X), expected)
    assert type(net[1]) is nn.Dropout
    names = [one.__name__ for one in type(net[0]).__mro__]
    assert not any("DropConnect" in name for name in names)
    assert issubclass(type(net[0]), kept)
    assert list(net.state_dict()) == list(_wrapped(wrap).state_dict())
    net.train()
    net(X).sum().backward()


def _wrapped(wrap):
    net = linear()
    wrap(net[0])
    return net


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrization_taken_off_a_grafted_layer_leaves_the_graft(wrap):
    net = linear()
    regraft.apply(net, {"Linear": "dropconnect(p=0.5)"})
    wrap(net[0])
    parametrize.remove_parametrizations(net[0], "weight")
    assert not torch.equal(net[0](X), net[0](X))
    regraft.revert(net)
    assert type(net[0]) is nn.Linear
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


def test_parametrized_and_grafted_in_turns():
    net = linear()
    parametrizations.weight_norm(net[0])
    kept = type(net[0])
    for _ in range(3):
        regraft.apply(net, {"Linear": "dropconnect(p=0.5)"})
        regraft.revert(net)
        assert type(net[0]) is kept
    regraft.apply(net, {"Linear": "dropconnect(p=0.5)"})
    parametrizations.weight_norm(net[0], "bias", dim=None)  # adds a property to the class on top
    regraft.revert(net)
    assert set(net[0].parametrizations) == {"weight", "bias"}
    assert torch.equal(net.eval()(X), net(X))
    net[0].bias.sum().backward()


def test_a_parametrized_model_is_deep_copied_with_its_grafts():
    net = linear()
    parametrizations.weight_norm(net[0])
    regraft.apply(net, {"Linear": "dropconnect(p=0.5)", "Dropout": "gaussian"})
    other = copy.deepcopy(net)
    torch.manual_seed(3)
    expected = net(X)
    torch.manual_seed(3)
    assert torch.equal(other(X), expected)
    regraft.revert(other)
    assert not torch.equal(net[0](X), net[0](X))
    assert torch.equal(other[0](X), other[0](X))


def dispatched(model):
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("build", [tiny.bert, tiny.vit], ids=["bert", "vit"])
def test_trap_5_accelerates_hooks_and_grafts(order, build):
    model = build()
    batch = tiny.tokens() if hasattr(model, "config") else {"x": tiny.images()}
    rules = {"Dropout": "gaussian(p=0.5)", "Linear": "dropconnect(p=0.5)"}
    if order == "before":
        dispatched(model)
        before = snapshot(model)
    report = regraft.apply(model, rules, batch)
    if order == "after":
        dispatched(model)
    else:
        regraft.revert(model)
        names = [name for name in differences(before, snapshot(model)) if not name.endswith("._old_forward")]
        assert names == []  # a bound method is a new object each time it is read
        assert all(
            module._old_forward.__func__ is type(module).forward
            for module in model.modules()
            if "_old_forward" in module.__dict__
        )
        regraft.apply(model, rules, batch)
    assert len(report.grafted) > 5
    assert any("_hf_hook" in module.__dict__ for module in model.modules())
    drawn = {id(m) for m in runs_variants(model, batch)}
    expected = {id(model.get_submodule(edit.path)) for edit in report.grafted if edit.kind == "module"}
    assert expected <= drawn
    regraft.revert(model)
    assert runs_variants(model, batch) == []
    assert any("_hf_hook" in module.__dict__ for module in model.modules())
    model.eval()
    assert torch.equal(tiny.logits(model(**batch)), tiny.logits(model(**batch)))


def runs_variants(model, batch):
    """Modules whose variant's forward really runs: seen by its read of the record."""
    from regraft.graft import modules

    seen, original = [], modules._settings

    def settings(module):
        seen.append(module)
        return original(module)

    modules._settings = settings
    try:
        model.train()
        model(**batch)
    finally:
        modules._settings = original
    return seen


def test_dispatch_model_after_a_graft_of_calls_keeps_the_calls_grafted():
    model = tiny.bart()
    regraft.apply(model, {"Dropout": "off"})
    dispatched(model)
    batch = {**tiny.tokens(), "decoder_input_ids": tiny.tokens()["input_ids"]}
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    regraft.revert(model)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_accelerate_prepare_in_mixed_precision_then_revert():
    accelerate = pytest.importorskip("accelerate")
    model = tiny.Calls(nn.Linear(6, 6), p=0.5)
    regraft.apply(model, {"Dropout": "gaussian"}, X)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared(torch.ones(64, 6)).unique().numel() > 100
    regraft.revert(model)
    zeros = (prepared(torch.ones(64, 6)) == 0).float().mean()
    assert 0.3 < zeros < 0.7  # the plain dropout again
    accelerator.free_memory()

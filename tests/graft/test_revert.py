"""Promise 6: a way back, exact, in part, and whatever has happened to the model since."""

from __future__ import annotations

import pytest
import tiny
import torch
from snapshots import assert_same, same_in_eval, snapshot
from torch import nn

import regraft
from regraft.errors import NoMatchError, RevertError

RULES = {"Dropout": "gaussian", "Linear": "standout(gate='learned')", "Embedding": "neftune"}
MODELS = {
    "bert": (tiny.bert, None),
    "albert": (tiny.albert, None),
    "llama": (tiny.llama, None),
    "vit": (tiny.vit, None),
    "densenet": (tiny.densenet, tiny.images()),
    "encoder": (tiny.encoder, torch.ones(2, 4, 16)),
    "lstm": (lambda: nn.LSTM(4, 4, 2, dropout=0.1), torch.ones(2, 3, 4)),
}


def rules_for(model, inputs):
    families = {site.family for site in regraft.inspect(model, inputs).sites}
    rules = [(key, value) for key, value in RULES.items() if key in families]
    return [("Dropout", "dropout(p=0.3)")] if isinstance(model, nn.LSTM) else rules


@pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)
def test_revert_is_exact_to_the_identity_of_each_object(build, inputs):
    model = build()
    before, keys = snapshot(model), list(model.state_dict())
    report = regraft.apply(model, rules_for(model, inputs), inputs)
    assert report.grafted
    assert not report.state_keys or list(model.state_dict()) != keys
    assert regraft.revert(model) is model
    assert list(model.state_dict()) == keys
    assert_same(before, model)


def test_a_second_revert_is_a_no_op_and_so_is_one_without_grafts():
    model = tiny.bert()
    before = snapshot(model)
    regraft.revert(model)
    assert_same(before, model)
    regraft.apply(model, RULES)
    regraft.revert(model)
    regraft.revert(model)
    assert_same(before, model)


def test_apply_and_revert_many_times_makes_no_new_classes():
    model = tiny.mlp()
    classes = set()
    for _ in range(3):
        regraft.apply(model, {"Dropout": "gaussian"})
        classes.add(type(model[2]))
        regraft.revert(model)
        classes.add(type(model[2]))
    assert len(classes) == 2


def test_trained_weights_and_what_others_changed_survive():
    model = tiny.mlp(p=0.2)
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)", "Linear": "mixout(p=0.1)"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    hook = model[2].register_forward_hook(lambda *_: None)
    model[2].note = "mine"
    model[2].eval()
    model.to(torch.float64)
    model[0].bias.requires_grad_(False)
    regraft.revert(model)
    assert all(torch.equal(a, b.double()) for a, b in zip(model.parameters(), trained, strict=True))
    assert model[2].note == "mine"
    assert list(model[2]._forward_hooks) == [hook.id]
    assert [module.training for module in model] == [True, True, False, True]
    assert not model[0].bias.requires_grad
    assert model[2].p == 0.2
    assert list(model.state_dict()) == list(tiny.mlp().state_dict())


def test_a_rate_set_since_is_not_ours_to_undo():
    model = tiny.mlp(p=0.2)
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)"})
    model[2].p = 0.45
    regraft.revert(model)
    assert model[2].p == 0.45
    assert type(model[2]) is nn.Dropout


def test_revert_in_part():
    model = tiny.bert()
    before = snapshot(model)
    regraft.apply(model, {"Dropout": "gaussian", "Linear@classifier": "dropconnect(p=0.2)"})
    regraft.revert(model, "Linear@classifier")
    assert type(model.classifier) is nn.Linear
    assert type(model.dropout).__name__ == "GaussianDropout"
    regraft.revert(model, "Dropout@**.layer.0.**")
    grafted = {site.path for site in regraft.inspect(model).sites if site.variant}
    assert grafted == {
        "bert.embeddings.dropout",
        "bert.encoder.layer.1.attention.self",
        "bert.encoder.layer.1.attention.output.dropout",
        "bert.encoder.layer.1.output.dropout",
        "dropout",
    }
    regraft.revert(model, lambda site: site.kind == "call")
    regraft.revert(model, nn.Dropout)
    assert_same(before, model)


def test_the_last_part_takes_its_boundaries_along():
    model = tiny.Calls(tiny.Calls(tiny.Calls()))
    before = snapshot(model)
    regraft.apply(model, {"Dropout": "gaussian", "*@child": None}, torch.ones(2, 3))
    assert type(model.child) is not tiny.Calls  # a boundary
    regraft.revert(model, "re:")
    assert type(model.child) is tiny.Calls
    assert torch.equal(model.child.child.eval()(torch.ones(3)), torch.ones(3))
    regraft.revert(model, "*@child.child")
    for module in model.modules():
        module.train()
    assert_same(before, model)


@pytest.mark.parametrize("selector", ["Linear", "Dropout@nowhere", "*@2.x"])
def test_a_selector_that_matches_no_graft_is_an_error_that_lists_them(selector):
    model = tiny.mlp()
    regraft.apply(model, {"Dropout": "gaussian"})
    before = snapshot(model)
    with pytest.raises(NoMatchError, match="matches no graft[\\s\\S]*help: grafted: 2") as caught:
        regraft.revert(model, selector)
    assert isinstance(caught.value, LookupError)
    assert_same(before, model)
    regraft.revert(model)
    with pytest.raises(NoMatchError, match="the model has no grafts"):
        regraft.revert(model, "Dropout")


def test_a_class_that_nobody_knows_on_top_is_refused_with_the_remedy():
    model = tiny.mlp()
    regraft.apply(model, {"Dropout": "gaussian"})
    below = type(model[2])
    model[2].__class__ = type("Strange", (below,), {})
    before = snapshot(model)
    with pytest.raises(
        RevertError, match="made from a grafted class[\\s\\S]*help: undo that first"
    ) as caught:
        regraft.revert(model)
    assert isinstance(caught.value, RuntimeError)
    assert_same(before, model)
    model[2].__class__ = below
    regraft.revert(model)
    assert type(model[2]) is nn.Dropout


def test_a_refused_revert_puts_back_what_it_had_undone():
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.1))
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)", "Linear": "standout(gate='learned')"})
    model[2].__class__ = type("Strange", (type(model[2]),), {})
    keys, weights = list(model.state_dict()), dict(model.named_parameters())
    with pytest.raises(RevertError):
        regraft.revert(model)
    assert list(model.state_dict()) == keys
    assert all(model.get_parameter(name) is value for name, value in weights.items())
    assert [module.p for module in model] == [0.3, 0.2, 0.3]
    assert type(model[0]).__name__ == "GaussianDropout"


@pytest.mark.parametrize("build", [tiny.mlp, lambda: tiny.Calls(p=0.1)], ids=["module", "call"])
def test_a_method_that_somebody_kept_does_what_the_original_does_after_revert(build):
    """Accelerate's mixed precision binds the forward it finds."""
    model = build()
    inputs = torch.ones(64, 6)
    regraft.apply(model, {"Dropout": "gaussian"}, inputs)
    kept = [module.forward for module in model.modules()]
    regraft.revert(model)
    values = kept[-2 if isinstance(model, nn.Sequential) else 0](torch.ones(1000)).unique()
    assert values.numel() == 2  # dropped or scaled: no noise


def test_eval_is_the_originals_after_training_and_revert():
    model = tiny.bert()
    regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"})
    model(**tiny.tokens(), labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    plain = tiny.bert()
    plain.load_state_dict(model.state_dict(), strict=True)
    regraft.revert(model)
    assert same_in_eval(plain, model, **tiny.tokens())

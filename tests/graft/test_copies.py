"""Promise 7: copies and files. A copy is grafted, reverts by itself, and leaves the original alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
from snapshots import assert_same, snapshot
from torch import nn

import regraft
from regraft.errors import ModelError
from regraft.files.verdicts import role_of
from regraft.record import read_layer

X = torch.randn(2, 4, 16)
CASES = {
    "mlp": (tiny.mlp, torch.randn(2, 6), {"Dropout": "gaussian", "Linear": "standout(gate='learned')"}),
    "calls": (lambda: tiny.Calls(tiny.Calls()), X, {"Dropout": "multisample", "*@child": None}),
    "attention": (tiny.Attention, X, {"Dropout": "gaussian"}),
    "encoder": (tiny.encoder, X, {"Dropout": "mc"}),
    "vit": (tiny.vit, tiny.images(), {"Dropout": "multisample", "Linear@head": "mixout(p=0.2)"}),
    "bert": (tiny.bert, tiny.tokens(), {"Dropout": "concrete", "Dropout@**.self": "gaussian"}),
    "lstm": (lambda: nn.LSTM(16, 4, 2, dropout=0.1), X, {"Dropout": "dropout(p=0.5)"}),
}
cases = pytest.mark.parametrize(("build", "inputs", "rules"), CASES.values(), ids=CASES)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def run(model, inputs, seed=7):
    torch.manual_seed(seed)
    return tiny.logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))


@cases
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_does_the_same_and_goes_its_own_way(build, inputs, rules, duplicate):
    model = build()
    plain = snapshot(model)
    regraft.apply(model, rules, inputs)
    classes = [type(m) for m in model.modules()]
    other = duplicate(model)
    assert torch.equal(run(model, inputs), run(other, inputs))
    for one, two in zip(model.modules(), other.modules(), strict=True):
        assert type(one) is type(two)
        assert one is not two
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    regraft.apply(other, {"Dropout": "off"}, inputs)
    regraft.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in build().modules()]
    assert list(other.state_dict()) == list(build().state_dict())
    assert [type(m) for m in model.modules()] == classes
    regraft.revert(model)
    assert_same(plain, model)


def test_a_deepcopy_of_a_call_site_runs_its_own_module():
    """Trap 12: a closure on the instance keeps calling the original."""
    model = tiny.Attention()
    regraft.apply(model, {"Dropout": "gaussian(p=0.1)"}, X)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        other.out.weight.zero_()
        other.out.bias.zero_()
    assert not other(X).any()
    assert model(X).any()


def test_shared_modules_stay_shared_in_a_copy():
    net = nn.Module()
    net.a = net.b = nn.Dropout(0.1)
    regraft.apply(net, {"Dropout": "gaussian"})
    other = copy.deepcopy(net)
    assert other.a is other.b is not net.a


class Reduced(nn.Dropout):
    """A class with a way to be pickled of its own."""

    def __init__(self, p, note):
        super().__init__(p)
        self.note = note

    def __reduce_ex__(self, protocol):
        return remade, (self.p, self.note, self.training)


def remade(p, note, training):
    made = Reduced(p, f"{note} again")
    made.training = training
    return made


def test_the_users_own_reduce_is_respected():
    net = nn.Sequential(Reduced(0.2, "note").eval())
    regraft.apply(net, {"Dropout": "gaussian"})
    other = pickle.loads(pickle.dumps(net))
    assert other[0].note == "note again"
    assert isinstance(other[0], Reduced)


FRESH = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
assert "tests" not in sys.modules
x = torch.ones(2, 6)
torch.manual_seed(7)
first = model(x)
print(type(model[2]).__name__, first.flatten().tolist())
import regraft
regraft.revert(model)
print([type(one).__name__ for one in model], list(model.state_dict()))
print(torch.equal(model.eval()(x), torch.load(sys.argv[2])))
"""


def test_a_saved_model_loads_in_a_fresh_interpreter(tmp_path):
    model, x = tiny.mlp(), torch.ones(2, 6)
    with torch.no_grad():
        torch.save(model.eval()(x), tmp_path / "expected.pt")
    keys = list(model.train().state_dict())
    regraft.apply(model, {"Dropout": "multisample(p=0.3)", "Linear@3": "standout(gate='learned')"})
    torch.save(model, tmp_path / "model.pt")
    torch.manual_seed(7)
    expected = model(x).flatten().tolist()
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.pt"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    first, second, third = done.stdout.strip().splitlines()
    assert first == f"MultiSampleDropout {expected}"
    assert second == f"['Linear', 'ReLU', 'Dropout', 'Linear'] {keys}"
    assert third == "True"


def test_save_pretrained_writes_a_plain_checkpoint(tmp_path):
    from transformers import BertForSequenceClassification

    model = tiny.bert()
    regraft.apply(model, {"Dropout": "gaussian", "Linear@classifier": "dropconnect(p=0.1)"})
    model.save_pretrained(tmp_path)
    again, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.architectures == ["BertForSequenceClassification"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**tiny.tokens()).logits, model.eval()(**tiny.tokens()).logits)


@pytest.mark.parametrize("build", ["os:system_layer", "regraft.graft.apply:apply", "torch.hub:load"])
def test_a_pickle_can_name_no_builder_but_regrafts_own(build):
    with pytest.raises(ModelError, match="builds no layer"):
        read_layer(build, ())


def test_a_layer_with_a_function_of_its_own_is_not_known_in_a_file():
    assert role_of("regraft.record", "Layer") == "unknown"
    assert role_of("regraft.record", "read_layer") == "value"


def test_a_class_that_is_defined_anew_is_freed_after_revert():
    """As in a notebook whose cell runs again."""

    def used():
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(4, 4), type("Drop", (nn.Dropout,), {})(0.2))

            def forward(self, x):
                return nn.functional.dropout(self.layers(x), 0.1, self.training)

        model = Net()
        regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}, torch.ones(2, 4))
        model(torch.ones(2, 4))
        regraft.revert(model)
        return weakref.ref(Net), weakref.ref(type(model.layers[1]))

    classes = used()
    for _ in range(3):  # a class is part of a circle, and what is made of it goes first
        gc.collect()
    assert [reference() for reference in classes] == [None, None]

"""Every bad input: a RegraftError that is also the builtin, what, where and help, and nothing changed."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import tiny
import torch
import torch.distributed.fsdp
from snapshots import assert_same, snapshot
from torch import nn

import regraft
from regraft import errors

NET = tiny.mlp()
X = torch.ones(2, 6)
BAD_RULES = [
    # a rule that matches nothing, with the nearest names
    ({"Dropot": "gaussian"}, "NoMatchError", LookupError,
     "the rule matches nothing\n  --> rule 0: 'Dropot'\n  help: did you mean 'Dropout'?; this model has Dropout, Linear; functional dropout is seen only by the probe, which did not run"),
    ({"Linear@4": "dropconnect"}, "NoMatchError", LookupError, "there are Linear sites, but none at that path"),
    ({"Conv2d": None}, "NoMatchError", LookupError, "rule 0: 'Conv2d'"),
    ({"Dropout": "gaussian", "*@head": "off"}, "NoMatchError", LookupError, "rule 1: '*@head'"),
    ({"re:nothing": "gaussian"}, "NoMatchError", LookupError, "the rule matches nothing"),
    ({nn.Conv2d: "gaussian"}, "NoMatchError", LookupError, "rule 0: 'Conv2d'"),
    ({lambda site: False: "gaussian"}, "NoMatchError", LookupError, "rule 0: '<<lambda>>'"),
    # an unknown variant, an unknown option, with did you mean
    ({"Dropout": "gausian"}, "UnknownVariantError", LookupError,
     "no variant is called 'gausian'\n  help: did you mean 'gaussian'? the variants are alpha, "),
    ({"Dropout": "multisample(num_sample=4)"}, "OptionError", TypeError,
     "'multisample' has no option 'num_sample'\n  --> variant 'multisample'\n  help: did you mean 'num_samples'? its options are p, num_samples, match, exact"),
    ({"Dropout": "off(p=0.1)"}, "OptionError", TypeError, "'off' has no option 'p'\n  --> variant 'off'\n  help: it has no options"),
    # options out of range
    ({"Dropout": "multisample(num_samples=0)"}, "RateError", ValueError, "num_samples=0 is out of range\n  --> variant 'multisample'\n  help: give a whole number from 1 to 255"),
    ({"Dropout": "multisample(num_samples=2.5)"}, "OptionError", TypeError, "num_samples=2.5 is not a whole number"),
    ({"Dropout": "gaussian(sigma=-1)"}, "RateError", ValueError, "sigma=-1 is out of range"),
    ({"Linear": "dropconnect(mask='batches')"}, "OptionError", TypeError, "mask='batches' is not 'batch' or 'example'\n  --> variant 'dropconnect'\n  help: did you mean 'batch'?"),
    # a variant that cannot replace the kind it matched
    ({"Linear": "gaussian"}, "WrongKindError", TypeError,
     "'gaussian' cannot replace Linear: it takes the place of Dropout\n  --> rule 0: 'Linear', first at '0'\n  help: `regraft variants` lists"),
    ({"Dropout": "dropconnect"}, "WrongKindError", TypeError, "'dropconnect' cannot replace Dropout: it takes the place of Linear"),
    ({"*@2": "neftune"}, "WrongKindError", TypeError, "'neftune' cannot replace Dropout"),
    # p outside [0, 1)
    ({"Dropout": "gaussian(p=1)"}, "RateError", ValueError, "p=1 drops everything: a dead layer is no regularizer\n  --> variant 'gaussian'\n  help: give a rate below 1; 'off' takes a regularizer out"),
    ({"Dropout": "gaussian(p=1.0)"}, "RateError", ValueError, "p=1 drops everything"),
    ({"Dropout": "gaussian(p=-0.1)"}, "RateError", ValueError, "p=-0.1 is not in [0, 1)\n  --> variant 'gaussian'\n  help: p is the probability to drop"),
    ({"Dropout": "gaussian(p=50)"}, "RateError", ValueError, "p=50 is not in [0, 1)"),
    ({"Dropout": "gaussian(p=True)"}, "RateError", ValueError, "a rate is a number in [0, 1), not True"),
    ({"Dropout": "gaussian(p='half')"}, "OptionError", TypeError, "p='half' is no rate\n  --> variant 'gaussian'\n  help: a number in [0, 1), or relative: 'x0.5'"),
    ({"Dropout": "gaussian(p='x100')"}, "RateError", ValueError, "p='x100' of a rate of 0.1 is 10, not in [0, 1)\n  --> rule 0: 'Dropout', at '2'\n  help: a smaller factor"),
    # what cannot be read
    ({"Dropout": "gaussian("}, "RuleSyntaxError", ValueError, "the variant 'gaussian(' cannot be read: it is not `name` or `name(option=value)`\n  help: for example"),
    ({"Dropout": "gaussian(0.1)"}, "RuleSyntaxError", ValueError, "options are written option=value"),
    ({"Dropout": "gaussian(p=q)"}, "RuleSyntaxError", ValueError, "p is not a Python literal"),
    ({"Dropout": "a.b(p=1)"}, "RuleSyntaxError", ValueError, "cannot be read"),
    ({"Dropout": ""}, "RuleSyntaxError", ValueError, "cannot be read"),
    ({"Dropout": 0.1}, "RuleSyntaxError", ValueError, "0.1 is no variant\n  --> rule for 'Dropout'\n  help: write 'dropout(p=0.1)'"),
    ({"Dropout": nn.Dropout}, "RuleSyntaxError", ValueError, "is no variant"),
    ("gaussian", "RuleSyntaxError", ValueError, "'gaussian' is no set of rules\n  help: write {'Dropout': 'gaussian'}"),
    (None, "RuleSyntaxError", ValueError, "None is no set of rules"),
    (["Dropout", "gaussian"], "RulesError", ValueError, "'Dropout' is no pair of a selector and a variant"),
    ([("Dropout", "gaussian", 3)], "RuleSyntaxError", ValueError, "is no pair of a selector and a variant"),
    ({"Dropout@a.{3..1}": "gaussian"}, "RuleSyntaxError", ValueError, "help: write it upwards: {1..3}"),
    ({3: "gaussian"}, "RuleSyntaxError", ValueError, "3 selects nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "name", "builtin", "message"),
    BAD_RULES,
    ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD_RULES)],
)
def test_a_bad_rule(rules, name, builtin, message):
    before, state = snapshot(NET), torch.get_rng_state()
    for verb in (regraft.plan, regraft.apply):
        with pytest.raises(builtin) as caught:
            verb(NET, rules)
        assert isinstance(caught.value, regraft.RegraftError)
        assert type(caught.value) is getattr(errors, name)
        assert message in str(caught.value)
    with pytest.raises(builtin), regraft.grafted(NET, rules):
        raise AssertionError
    assert_same(before, NET)
    assert torch.equal(state, torch.get_rng_state())


class FullyShardedDataParallel(torch.distributed.fsdp.FullyShardedDataParallel):
    """Torch's, without the process group that it needs to be of use."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


BAD_MODELS = [
    (None, "expected a torch.nn.Module, got a NoneType\n  --> None\n  help: give the model itself"),
    ([tiny.mlp()], "expected a torch.nn.Module, got a list"),
    (tiny.mlp().state_dict(), "expected a torch.nn.Module, got an OrderedDict[\\s\\S]*help: a state dict holds weights, not layers"),
    (nn.Linear, r"Linear is a class, not a model\n  --> [\s\S]*help: make one: Linear\(...\)"),
    ("model.pt", "expected a torch.nn.Module, got a str\n  --> 'model.pt'\n  help: load it first; on the command line: regraft inspect model.pt"),
    ("resnet50", "help: build it first[\\s\\S]*regraft inspect timm:resnet50, or hf:resnet50"),
    (torch.ones(2), "expected a torch.nn.Module, got a Tensor"),
    (lambda x: x, "expected a torch.nn.Module, got a function"),
    (FullyShardedDataParallel(), "flattens the parameters[\\s\\S]*help: graft before wrapping, or wrap with torch.distributed.fsdp.fully_shard"),
    (torch.jit.script(nn.Sequential(nn.Dropout(0.1))), "is compiled TorchScript[\\s\\S]*help: graft the Python model"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "message"), BAD_MODELS, ids=[type(row[0]).__name__ for row in BAD_MODELS])
@pytest.mark.parametrize(
    "verb",
    [
        regraft.inspect,
        lambda model: regraft.plan(model, {"Dropout": "gaussian"}),
        lambda model: regraft.apply(model, {"Dropout": "gaussian"}),
        regraft.revert,
    ],
    ids=["inspect", "plan", "apply", "revert"],
)
def test_a_bad_model(model, message, verb):
    with pytest.raises(TypeError, match=message) as caught:
        verb(model)
    assert type(caught.value) is errors.ModelError


def test_no_rules_are_no_error_and_no_change():
    before = snapshot(NET)
    report = regraft.apply(NET, {})
    assert (report.grafted, report.skipped) == ([], [])
    assert_same(before, NET)


def test_several_problems_are_one_error_that_has_each():
    with pytest.raises(
        errors.RulesError, match="3 problems, nothing was changed:\n- the rule matches nothing"
    ) as caught:
        regraft.plan(NET, {"Dropot": "off", "Linear": "gaussian", "Conv2d": "off"})
    kinds = [type(problem) for problem in caught.value.problems]
    assert kinds == [errors.NoMatchError, errors.WrongKindError, errors.NoMatchError]
    assert str(caught.value).count("  help: ") >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "this is no JSON[\\s\\S]*help: give what plan.to_json"),
        ("", "this is no JSON"),
        ("[]", "this JSON is no plan that this version can read\n  --> schema None, expected 1"),
        ('{"schema": 99, "fingerprint": {}}', "--> schema 99, expected 1"),
        ('{"schema": 1, "fingerprint": {}}', "this JSON is no whole plan"),
        (
            '{"schema": 1, "fingerprint": {}, "grafted": [{"path": 3}], "skipped": []}',
            "this JSON is no whole plan",
        ),
    ],
)
def test_a_plan_that_cannot_be_read(text, message, tmp_path):
    with pytest.raises(OSError, match=message) as caught:
        regraft.Plan.from_json(text)
    assert type(caught.value) is errors.FileError
    file = tmp_path / "regraft.json"
    file.write_text(text)
    with pytest.raises(errors.FileError, match=re.escape(str(file))):
        regraft.load_plan(NET, file)


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(errors.FileError, match="the plan cannot be read: No such file[\\s\\S]*nowhere.json"):
        regraft.load_plan(NET, tmp_path / "nowhere.json")


BAD_REGISTRATIONS = [
    ({"name": "Gaussian"}, "'Gaussian' is no name for a variant\n  help: use [a-z][a-z0-9_]*"),
    ({"name": "my noise"}, "is no name for a variant"),
    ({"name": "gaussian"}, "'gaussian' is a built-in variant\n  help: choose another name"),
    ({"name": "mine", "replaces": "Dropuot"}, "replaces='Dropuot' is not one of Dropout, DropPath, Linear, Embedding\n  --> variant 'mine'\n  help: did you mean 'Dropout' or 'DropPath'?"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_REGISTRATIONS)
def test_a_bad_registration(arguments, message, registered):
    before = registered.names()
    with pytest.raises(errors.OptionError) as caught:
        regraft.register(arguments.pop("name"), **arguments)
    assert message in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert registered.names() == before


@pytest.mark.parametrize(
    ("function", "replaces"),
    [
        (lambda x: x, "Dropout"),
        (lambda x, p, strength: x, "Dropout"),
        (lambda x, p, *, strength: x, "Dropout"),
        (lambda x, p: x, "Linear"),
    ],
)
def test_a_function_of_another_shape_is_shown_the_right_one(function, replaces, registered):
    wanted = "x, weight, bias, p" if replaces == "Linear" else "x, p"
    with pytest.raises(
        errors.OptionError, match=re.escape(f"is written def mine({wanted}, *, option=default)")
    ):
        regraft.register("mine", replaces=replaces)(function)
    assert "mine" not in registered.names()


CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.RegraftError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_a_builtin_and_survives_a_pickle_and_a_copy(kind):
    if kind is errors.RegraftError:
        return
    assert issubclass(kind, (ValueError, TypeError, LookupError, OSError, RuntimeError))
    inner = errors.RateError("what", where="where", remedy="remedy")
    made = kind([inner]) if kind is errors.RulesError else kind("what", where="where", remedy="remedy")
    for other in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert type(other) is kind
        assert str(other) == str(made)
    assert "what\n  --> where\n  help: remedy" in str(made)


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("gausian", ["gaussian", "uniform"], "did you mean 'gaussian'?"),
        ("DROPOUT", ["Dropout", "dropout"], "did you mean 'Dropout'?"),
        ("xyz", ["gaussian"], ""),
        ("head", [], ""),
    ],
)
def test_nearest(name, names, hint):
    assert errors.nearest(name, names) == hint

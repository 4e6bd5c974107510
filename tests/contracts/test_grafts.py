"""Every registered variant, grafted at every kind of site it fits x everything a graft promises.

A new variant is tested by being registered: the cases are read from the registry.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from snapshots import assert_same, differences, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import OptionError, RateError
from regraft.variants.registry import complete_options, names, parse_variant, spec

WIDTH = 6
OPTIONS = {
    "standout": ["", "rescale=False", f"gate='learned', features={WIDTH}"],
    "dropconnect": ["mask='batch'", "mask='example'", "exact=True"],
    "multisample": ["", "num_samples=3, match='variance', exact=True"],
    "gaussian": ["", "sigma=0.5"],
    "dropkey": ["", "keys='element'"],
    "shaped": ["noise_shape=None"],
}
"""Options with which a variant is tested; without an entry, its defaults."""


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((len(x), *[1] * (x.dim() - 1))).bernoulli_(keep) / keep


class Host(nn.Module):
    """A site of one kind in the middle of a small model."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.middle = middle
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.inner(self.table(tokens))))


class Call(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 2, 0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


SITES = {
    "Dropout": {
        "module": (lambda: nn.Dropout(0.3), "Dropout"),
        "call": (Call, "Dropout"),
        "attention": (Fused, "Dropout"),
        "multihead": (Heads, "Dropout"),
        "recurrent": (Recurrent, "Dropout"),
    },
    "DropPath": {"module": (lambda: DropPath(0.3), "DropPath")},
    "Linear": {"module": (nn.Identity, "Linear@head")},
    "Embedding": {"module": (nn.Identity, "Embedding")},
}
TOKENS = torch.arange(20).view(4, 5).remainder(9)


def stateful(name: str, options: str) -> bool:
    return spec(name).adds_state(complete_options(spec(name), options_of(name, options)))


def options_of(name: str, options: str) -> dict:
    return dict(parse_variant(f"{name}({options})").options)


def rule(name: str, options: str, p: float | str | None = None) -> str:
    rated = spec(name).rated and "sigma" not in options  # which takes the place of a rate
    rate = [f"p={p!r}"] if p is not None and rated else []
    return f"{name}({', '.join(filter(None, [*rate, options]))})"


CASES = [
    pytest.param(name, options, build, selector, id="-".join(filter(None, [name, family, place, options])))
    for name in names()
    for family in spec(name).families
    for place, (build, selector) in SITES[family].items()
    for options in OPTIONS.get(name, [""])
    if (place == "module" or not stateful(name, options))
    and (not spec(name).attention or place in ("attention", "multihead"))
    and not (spec(name).activations and place in ("attention", "multihead"))
    # There is nothing to take out at a plain layer.
    and not (name == "off" and family in ("Linear", "Embedding"))
]
cases = pytest.mark.parametrize(("name", "options", "build", "selector"), CASES)
traced = pytest.mark.parametrize(
    ("name", "options", "build", "selector"),
    # torch can neither vmap nor trace its recurrent kernels, grafted or not; `stochastic_passes` runs them.
    [case for case in CASES if case.values[2] is not Recurrent],
)


class Case:
    """A host with its variant grafted, and its twin without."""

    def __init__(self, name, options, build, selector, p=0.3, dtype=torch.float32, device="cpu"):
        torch.manual_seed(1)
        self.plain = Host(build()).to(device=device, dtype=dtype)
        self.model = copy.deepcopy(self.plain)
        self.tokens = TOKENS.to(device)
        self.before = snapshot(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.rules = {selector: rule(name, options, p)}
        self.report = regraft.apply(self.model, self.rules, self.tokens)
        if name == "mixout":
            with torch.no_grad():  # as after some steps of training: at first both weights are one
                self.model.head.mixout_weight.add_(0.1)
        self.found = spec(name)
        complete = complete_options(self.found, options_of(name, options))
        self.changes_eval = self.found.changes_eval is not None and self.found.changes_eval(complete)
        self.draws = name != "off"

    def output(self, model=None, seed=3, training=True):
        torch.manual_seed(seed)
        return (self.model if model is None else model).train(training)(self.tokens)

    def out_of_eval(self, model=None):
        """Eval with a run begun by the same seed: `consistent` draws its mask then."""
        torch.manual_seed(4)
        with torch.no_grad():
            return (self.model if model is None else model).eval()(self.tokens)


@pytest.fixture
def case(name, options, build, selector):
    return Case(name, options, build, selector)


@cases
def test_the_site_is_grafted_and_known_to_run(case):
    (edit,) = case.report.grafted
    assert edit.calls == 1
    assert case.report.skipped == []
    assert edit.variant == case.found.name


@cases
def test_eval_is_bit_for_bit_the_originals(case):
    state = torch.get_rng_state()
    equal = torch.equal(case.model.eval()(case.tokens), case.plain.eval()(case.tokens))
    assert equal != case.changes_eval
    assert case.changes_eval or torch.equal(state, torch.get_rng_state())


@cases
def test_training_draws_and_gradients_are_finite(case):
    first, second = case.output(seed=3), case.output(seed=4)
    assert torch.equal(first, case.output(seed=3))
    assert torch.equal(first, second) != case.draws
    first.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.model.parameters())
    assert case.model.head.weight.grad.any()


@cases
def test_the_same_parameters_under_the_same_keys(case):
    now = dict(case.model.named_parameters())
    assert all(now[name] is value for name, value in case.parameters.items())
    added = [key for key in case.model.state_dict() if key not in case.plain.state_dict()]
    assert added == case.report.state_keys
    assert bool(added or now.keys() - case.parameters.keys()) <= (case.found.state is not None)
    assert [key for key in case.model.state_dict() if key in case.plain.state_dict()] == list(
        case.plain.state_dict()
    )


@cases
def test_names_classes_and_rates(case):
    (edit,) = case.report.grafted
    for (path, one), other in zip(case.model.named_modules(), case.plain.modules(), strict=True):
        assert isinstance(one, type(other))
        if edit.kind == "module" and path == edit.path and edit.op not in ("MultiheadAttention", "GRU"):
            assert type(one).__name__ == case.found.module_for(case_family(case, edit)).__name__
            assert repr(one).startswith(type(one).__name__)
            if case.found.rated:
                assert isinstance(getattr(one, "drop_prob" if edit.op == "DropPath" else "p"), float)
        else:
            assert (type(one).__name__, type(one).__module__) == (
                type(other).__name__,
                type(other).__module__,
            )


def case_family(case, edit):
    return "Dropout" if edit.op == "Dropout" else edit.op


@cases
def test_revert_is_exact(case):
    case.output()
    regraft.revert(case.model)
    assert_same(case.before, case.model)


@cases
def test_twice_is_once(case):
    once = snapshot(case.model)
    regraft.apply(case.model, case.rules, case.tokens)
    assert differences(once, snapshot(case.model)) == []


@cases
def test_eval_train_eval_train(case):
    first = case.out_of_eval()
    training = case.output()
    assert torch.equal(case.out_of_eval(), first)
    assert torch.equal(case.output(), training)
    assert case.model.inner.training


@cases
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "save"])
def test_copies(case, kind):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    duplicate = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved}[
        kind
    ]
    other = duplicate(case.model)
    assert torch.equal(case.output(other), case.output())
    assert torch.equal(case.out_of_eval(other), case.out_of_eval())
    regraft.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in case.plain.modules()]
    assert list(other.state_dict()) == list(case.plain.state_dict())
    assert torch.equal(case.out_of_eval(other), case.out_of_eval(case.plain))
    assert torch.equal(case.output(seed=3), case.output(seed=4)) != case.draws


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_precisions(name, options, build, selector, dtype):
    case = Case(name, options, build, selector, dtype=dtype)
    output = case.output()
    assert output.dtype == dtype
    assert output.isfinite().all()
    output.sum().backward()
    assert case.changes_eval or torch.equal(case.out_of_eval(), case.out_of_eval(case.plain))
    later = Case(name, options, build, selector)
    later.model.to(dtype)
    assert later.output().dtype == dtype


@cases
def test_a_model_on_the_meta_device(name, options, build, selector):
    case = Case(name, options, build, selector, device="meta")
    assert case.report.grafted
    assert case.output().shape == (4, 5, 3)
    assert all(tensor.is_meta for tensor in case.model.state_dict().values())
    regraft.revert(case.model)
    assert_same(case.before, case.model)


@cases
@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9])
def test_rates(name, options, build, selector, p):
    case = Case(name, options, build, selector, p=p)
    assert case.output().isfinite().all()
    needed = case.found.rated and (
        case.found.needs_rate is None
        or case.found.needs_rate(complete_options(case.found, options_of(name, options)))
    )
    if p == 0 and needed:
        case.model.double()
        with regraft.grafted(case.model, dict.fromkeys(case.rules, "off"), case.tokens):
            without = case.output()
        torch.testing.assert_close(case.output(), without, atol=1e-13, rtol=1e-12)


@cases
@pytest.mark.parametrize("p", [1, 1.0, -0.1, 2])
def test_a_rate_outside_its_range_is_refused_and_nothing_changed(name, options, build, selector, p):
    if not spec(name).rated:
        with pytest.raises(TypeError, match="has no option 'p'"):
            regraft.variant(name, p=p)
        return
    if "sigma" in options:
        with pytest.raises(
            (OptionError, RateError), match=r"p plays no part beside sigma|p=1 drops|not in \[0, 1\)"
        ):
            regraft.variant(name, p=p, sigma=0.5)
        return
    model = Host(build())
    before = snapshot(model)
    with pytest.raises(RateError, match=r"p=1 drops everything|not in \[0, 1\)"):
        regraft.apply(model, {selector: rule(name, options, p)}, TOKENS)
    assert_same(before, model)


@traced
def test_compiled_in_one_graph(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    # A few seeds: droppath keeps or drops four samples, and two draws of that are often the same.
    first, *others = [case.output(compiled, seed=seed) for seed in range(3, 11)]
    assert first.isfinite().all()
    assert all(torch.equal(first, other) for other in others) != case.draws
    first.sum().backward()
    made = case.out_of_eval(compiled)
    if not case.changes_eval:
        torch.testing.assert_close(made, case.out_of_eval(case.plain))


@cases
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(case, reentrant):
    def gradients(run):
        case.model.zero_grad()
        torch.manual_seed(5)
        run(hidden).square().sum().backward()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    case.model.train()
    hidden = torch.randn(4, 5, WIDTH, requires_grad=True)
    table, case.model.table = case.model.table, nn.Identity()
    if case.report.grafted[0].path == "table":
        case.model.table = Feeds(table)
    plain = gradients(case.model)
    kept = gradients(lambda x: checkpoint(case.model, x, use_reentrant=reentrant))
    assert plain.keys() == kept.keys()
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value)


class Feeds(nn.Module):
    """Gives an embedding its tokens, and adds what has a gradient."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table(TOKENS) + x


@cases
def test_an_optimizer_built_before(name, options, build, selector):
    torch.manual_seed(1)
    model = Host(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    regraft.apply(model, {selector: rule(name, options, 0.3)}, TOKENS)
    before = model.inner.weight.detach().clone()
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.inner.weight, before)


@cases
def test_autocast(case):
    with torch.autocast("cpu", torch.bfloat16):
        output = case.output()
    assert output.isfinite().all()
    output.float().sum().backward()


@traced
def test_vmap_draws_for_each_pass(case):
    run = torch.func.vmap(lambda _: case.model(case.tokens), randomness="different")
    case.model.train()
    torch.manual_seed(2)
    passes = run(torch.zeros(2))
    assert torch.equal(passes[0], passes[1]) != case.draws


@cases
def test_a_block_ends(case):
    before = snapshot(case.model)
    with regraft.grafted(case.model, dict.fromkeys(case.rules, "off"), case.tokens):
        assert torch.equal(case.output(seed=3), case.output(seed=4))
        case.output()
    case.model.train()
    moved = [
        name
        for name in differences(before, snapshot(case.model))
        if not name.endswith((":version", ":order"))
    ]
    assert [name for name in moved if "_regraft" not in name and ":entries" not in name] == []
    assert torch.equal(case.output(seed=3), case.output(seed=4)) != case.draws


@cases
def test_a_plan_as_json_does_the_same(case):
    other = copy.deepcopy(case.plain)
    plan = regraft.plan(other, case.rules, case.tokens)
    regraft.apply(other, regraft.Plan.from_json(plan.to_json()))
    kept = dict(case.model.state_dict().items())
    other.load_state_dict(kept, strict=True)
    torch.manual_seed(0)
    assert torch.equal(case.output(other), case.output())


def test_every_registered_variant_is_covered():
    assert {case.values[0] for case in CASES} == set(names())
    assert all(spec(name).families for name in names())


def test_a_variant_is_tested_by_being_registered(registered):
    @regraft.register("my_noise")
    def my_noise(x, p, *, strength=1.0):
        return x + strength * p * torch.randn_like(x)

    assert "my_noise" in registered.names()
    case = Case("my_noise", "strength=2.0", *SITES["Dropout"]["call"])
    test_training_draws_and_gradients_are_finite(case)
    test_eval_is_bit_for_bit_the_originals(case)
    test_revert_is_exact(case)

"""Random models under random rules: what holds for every graft, whatever it is put on."""

from __future__ import annotations

import copy
import io

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from snapshots import assert_same, same_in_eval, snapshot
from tiny import Attention, Calls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import regraft
from regraft.errors import RegraftError

WIDTH = 16
rates = st.sampled_from([0.0, 0.1, 0.5])


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Recurrent(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, 2, dropout=p, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=p, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self, inner):
        super().__init__()
        self.first = self.second = inner

    def forward(self, x):
        return self.second(self.first(x))


leaves = st.one_of(
    st.builds(lambda p: nn.Dropout(p), rates),
    st.builds(lambda p: nn.Dropout1d(p), rates),
    st.builds(lambda p: nn.AlphaDropout(p), rates),
    st.builds(lambda: nn.Linear(WIDTH, WIDTH)),
    st.builds(lambda: nn.LayerNorm(WIDTH)),
    st.builds(lambda p: Calls(p=p), rates),
    st.builds(lambda p: Attention(WIDTH, p=p), rates),
    st.builds(SelfAttention, rates),
    st.builds(Recurrent, rates),
)
models = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(lambda parts: nn.Sequential(*parts)),
        inner.map(Residual),
        inner.map(Twice),
        st.builds(lambda child, p: Calls(child, p), inner, rates),
    ),
    max_leaves=8,
).map(lambda inner: nn.Sequential(nn.Linear(WIDTH, WIDTH), inner))
selectors = st.sampled_from(
    ["Dropout", "Dropout1d", "AlphaDropout", "Linear", "*@0", "after:Linear@0", "re:1.*"]
)
acting_in_eval = ("consistent(p=0.2)", "mc(p=0.3)")
variants = st.sampled_from(
    [
        *(
            "gaussian",
            "gaussian(p=0.3)",
            "multisample(p=0.2)",
            "dropout(p=0.4)",
            "uniform(p=0.1)",
            "off",
            None,
        ),
        *("dropconnect(p=0.2)", "mixout(p=0.3)", "standout", "concrete", "spatial(p=0.2)", "token(p=0.2)"),
        *("droppath(p=0.2)", *acting_in_eval),
    ]
)
rules = st.lists(st.tuples(selectors, variants), min_size=1, max_size=3)


def example():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def apply(model, chosen):
    """The report, or None where the rules are refused."""
    before = snapshot(model)
    try:
        return regraft.apply(model, chosen, inputs=example())
    except RegraftError as error:
        event(f"refused: {type(error).__name__}")
        assert_same(before, model)
        return None


def outputs(model):
    torch.manual_seed(3)
    return model.train()(example())


trees = given(model=models, chosen=rules)


@trees
def test_apply_and_revert_is_the_identity(model, chosen):
    before = snapshot(model)
    if apply(model, chosen) is None:
        return
    regraft.revert(model)
    assert_same(before, model)


@trees
def test_twice_is_once(model, chosen):
    if apply(model, chosen) is None:
        return
    before, state = snapshot(model), torch.get_rng_state()
    apply(model, chosen)
    assert_same(before, model)
    assert torch.equal(state, torch.get_rng_state())


@trees
def test_a_plan_through_json_is_the_direct_graft(model, chosen):
    other = copy.deepcopy(model)
    report = apply(model, chosen)
    if report is None:
        return
    plan = regraft.plan(other, chosen, inputs=example())
    regraft.apply(other, regraft.Plan.from_json(plan.to_json()))
    assert torch.equal(outputs(model), outputs(other))


@trees
def test_copies_and_pickles_are_grafted_alike(model, chosen):
    if apply(model, chosen) is None:
        return
    expected = outputs(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(other), expected)
        regraft.revert(other)
        assert not any("_regraft" in vars(module) for module in other.modules())


@trees
def test_eval_is_the_originals(model, chosen):
    plain = copy.deepcopy(model)
    if not {variant for _, variant in chosen} & set(acting_in_eval) and apply(model, chosen):
        assert same_in_eval(plain, model, example())


class StockDraws(TorchDispatchMode):
    """Counts what torch's own dropouts draw: `bernoulli_` and `native_dropout`, fused or not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (torch.ops.aten.bernoulli_, torch.ops.aten.native_dropout)
        return func(*args, **(kwargs or {}))


@trees
def test_no_stock_dropout_is_left_that_the_report_does_not_name(model, chosen):
    """`uniform` draws by `rand`, so a Bernoulli draw is one that was not replaced."""
    report = apply(model, [("Dropout", "uniform(p=0.3)")])
    if report is None or report.skipped:
        return
    others = {site.op for site in regraft.inspect(model, inputs=example()).sites} & {
        "Dropout1d",
        "AlphaDropout",
    }
    if not others:
        with StockDraws() as draws:
            model.train()(example())
        assert draws.count == 0

"""A weight lent to its reader: perturbed while the reader's forward runs, and untouched otherwise."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from lending import lend, weights
from readers import CASES, Attends, Experts, ParentReads, Raw, ReadsTable, Recurs, TiedAutoencoder, TiedWords
from snapshots import assert_same, differences, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regraft.errors import ModelError
from regraft.find.walk import named_modules
from regraft.find.weights import weights_of

X = torch.randn(2, 5, 6)
MULTIPLIES = {name: case for name, case in CASES.items() if name != "learned"}


@pytest.mark.parametrize("case", MULTIPLIES)
def test_training_is_perturbed_and_nothing_else_is_changed(case):
    model = MULTIPLIES[case][0]()
    model(X)  # recurrent networks and hooks settle
    before, keys = snapshot(model), list(model.state_dict())
    plain, in_eval = model(X), model.eval()(X)
    model.train()
    taken = lend(model, weights(model, X))
    assert taken.count >= 1
    assert not torch.allclose(model(X), plain)
    assert torch.equal(model.eval()(X), in_eval)
    model.train()
    assert list(model.state_dict()) == keys
    model(X).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for parameter in model.parameters():
        parameter.grad = None
    taken()
    # A hook computes the weight anew before each forward.
    assert set(differences(before, snapshot(model))) <= (
        {"0.weight"} if case in ("hooked", "pruned") else set()
    )
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("case", ["parent", "attention", "raw", "bilinear", "experts", "gru"])
def test_every_weight_by_itself_reaches_the_output(case):
    model = MULTIPLIES[case][0]()
    plain = model(X)
    for name, weight in weights(model, X).items():
        if weight.kind == "router":
            continue
        back = lend(model, {name: weight})
        assert not torch.allclose(model(X), plain), name
        back()


def test_the_mean_of_many_forwards_is_the_plain_one():
    model = Attends().double()
    model.attention.in_proj_weight.requires_grad_(False)
    x = X.double()
    chosen = {name: one for name, one in weights(model, x).items() if one.kind == "out_proj"}
    plain = model(x)
    lend(model, chosen, p=0.25)
    runs = torch.stack([model(x) for _ in range(2000)])
    # The out-projection is linear in its weight: variance p/(1-p) times a sum of squares.
    spread = runs.std(0) / 2000**0.5
    assert ((runs.mean(0) - plain).abs() < 5 * spread).all()


def test_the_gradient_is_that_of_the_weight_that_multiplied():
    seen = {}

    class Looks(ParentReads):
        def forward(self, x):
            seen.update(qkv=self.qkv.weight, step=self.step.weight)
            return super().forward(x)

    model, x = Looks().double(), X.double()
    lend(model, weights(model, x), p=0.5)
    model(x).square().sum().backward()
    got = model.qkv.weight.grad
    mask = (seen["qkv"] / model.qkv.weight).detach()
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    q, k, v = F.linear(x, leaf := (model.qkv.weight.detach() * mask).requires_grad_()).chunk(3, -1)
    out = (seen["step"].detach() @ (q * k + v).transpose(-1, -2)).transpose(-1, -2)
    out.square().sum().backward()
    torch.testing.assert_close(got, leaf.grad * mask)


def test_one_draw_serves_all_reads_in_one_forward():
    model = TiedAutoencoder()
    with torch.no_grad():
        model.encode.weight.fill_(1.0)
        model.encode.bias.fill_(0.0)
    lend(model, weights(model, X), p=0.5)
    x = torch.eye(6).abs()
    out = model(x)
    # With one mask m the product is m^T m: symmetric, whatever m is.
    assert torch.equal(out, out.T)
    assert not torch.equal(out, model(x))


def test_a_tied_weight_is_drawn_on_the_side_that_multiplies():
    model = TiedWords()
    before = model.embed(torch.arange(7))
    lend(model, weights(model, X))
    seen = []
    hook = model.embed.register_forward_hook(lambda module, args, out: seen.append(module.weight))
    model(X)
    hook.remove()
    assert seen[0] is model.embed.weight
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed(torch.arange(7)), before)


def test_a_table_that_is_looked_up_too_is_left_alone():
    model = ReadsTable()
    assert lend(model, weights(model, X)).count == 0


def test_a_state_dict_taken_inside_the_forward_has_the_parameters():
    model = ParentReads()
    seen = {}
    model.step.register_forward_pre_hook(lambda *_: None)
    original = ParentReads.forward

    class Looks(ParentReads):
        def forward(self, x):
            seen.update(self.state_dict())
            seen["read"] = self.qkv.weight
            return original(self, x)

    looks = Looks()
    lend(looks, weights(looks, X))
    looks(X)
    assert torch.equal(seen["qkv.weight"], looks.qkv.weight)
    assert not torch.equal(seen["read"], looks.qkv.weight)


def test_an_error_in_the_forward_gives_the_weight_back():
    model = Attends()
    before = snapshot(model)
    taken = lend(model, weights(model, X))
    with pytest.raises(Exception):
        model(torch.randn(2, 5, 7))
    taken()
    assert_same(before, model)


def test_a_checkpoint_around_the_reader_recomputes_the_same():
    for reentrant in (False, True):
        model = Attends().double()
        x = X.double().requires_grad_()
        lend(model, weights(model, x))
        torch.manual_seed(1)
        model(x).square().sum().backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        torch.manual_seed(1)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


class ChecksInside(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.reentrant = nn.Parameter(torch.randn(6, 6)), reentrant

    def forward(self, x):
        if not self.training:
            return x @ self.a
        return checkpoint(lambda x: x @ self.a, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_reader_is_refused(reentrant):
    model = ChecksInside(reentrant)
    model.eval()
    chosen = weights(model, X)
    model.train()
    lend(model, chosen)
    with pytest.raises(ModelError, match="checkpoints a function of its own"):
        model(X.clone().requires_grad_())


def test_reading_without_gradients_is_no_checkpoint():
    class Norms(Raw):
        def forward(self, x):
            with torch.no_grad():
                size = self.o.norm()
            return super().forward(x) / size

    model = Norms()
    lend(model, weights(model, X))
    model(X).sum().backward()


def test_two_threads_never_mix_their_weights():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(64, 64))

        def forward(self, x):
            first = x @ self.w
            for _ in range(20):
                torch.randn(64).sum()
            return first - x @ self.w  # one draw: always 0

    model = Slow()
    x = torch.randn(4, 64)
    lend(model, weights(model, x))
    wrong = []

    def run():
        for _ in range(40):
            if model(x).abs().max() > 0:
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("case", ["parent", "attention", "lstm", "experts"])
def test_a_deep_copy_lends_its_own_weights(case):
    model = MULTIPLIES[case][0]()
    taken = lend(model, weights(model, X))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(X).abs().max() == 0
    assert model(X).abs().max() > 0
    taken()
    assert not torch.equal(twin.train()(X), model(X)) or twin(X).abs().max() == 0


@pytest.mark.parametrize("case", ["parent", "attention", "lstm", "experts"])
def test_a_pickle_lends_too(case):
    model = MULTIPLIES[case][0]()
    lend(model, weights(model, X))
    twin = pickle.loads(pickle.dumps(model))
    torch.manual_seed(5)
    wanted = model(X)
    torch.manual_seed(5)
    assert torch.equal(twin(X), wanted)


def test_a_recurrent_network_loads_its_state_dict_both_ways():
    plain, lent = Recurs(nn.LSTM), Recurs(nn.LSTM)
    lend(lent, weights(lent, X), keep=lambda one: "hh" in one.name)
    lent.load_state_dict(plain.state_dict())
    plain.load_state_dict(lent.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lent.eval()(X), plain.eval()(X))
        lent.train()(X).sum().backward()


@pytest.mark.parametrize("build", [ParentReads, Attends, Experts, Raw], ids=lambda one: one.__name__)
def test_a_compiled_reader_lends_in_one_graph(build):
    model = build()
    lend(model, weights(model, X), p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    a, b = compiled(X), compiled(X)
    assert not torch.equal(a, b)
    a.sum().backward()
    assert torch.equal(compiled.eval()(X), model.eval()(X))


def test_vmap_draws_for_each_of_its_passes():
    model = ParentReads()
    lend(model, weights(model, X))
    out = torch.func.vmap(lambda _: model(X), randomness="different")(torch.zeros(3))
    assert not torch.equal(out[0], out[1])


def test_autocast_lends_too():
    model = Attends()
    lend(model, weights(model, X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X)
    out.float().sum().backward()
    assert model.attention.in_proj_weight.grad.dtype is torch.float32


def test_a_model_from_a_traced_graph_has_the_same_weights():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.inner = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return torch.matmul(x, self.w) + F.linear(x, self.inner.weight) + x @ self.w

    eager = Reads()
    traced = torch.fx.symbolic_trace(eager)
    assert [(o.name, o.kind) for o in weights(eager, X).values()] == [
        (o.name, o.kind) for o in weights(traced, X).values()
    ]
    plain = traced(X)
    taken = lend(traced, weights(traced, X))
    assert not torch.allclose(traced(X), plain)
    taken()
    assert torch.equal(traced(X), plain)


def test_what_was_recorded_in_a_grafted_model_is_the_same():
    from recording import record_products

    model = nn.Sequential(Attends(), Experts())
    before = {name: (one.kind, one.reader_path) for name, one in weights(model, X).items()}
    lend(model, weights(model, X))
    recorder = record_products(model, X)
    after = weights_of(recorder, named_modules(model))
    assert {one.name: (one.kind, one.reader_path) for one in after} == before


@pytest.mark.parametrize("options", [{"mask": "batch"}, {"mask": "example"}], ids=str)
def test_what_a_dropped_linear_returns_may_be_changed_in_place(options):
    from regraft.nn import DropConnectLinear

    layer = nn.Sequential(DropConnectLinear(6, 4, p=0.5, **options), nn.ReLU(inplace=True))
    layer(X).sum().backward()
    assert layer[0].weight.grad.isfinite().all()

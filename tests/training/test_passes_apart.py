"""Modules that vmap cannot run, as routed experts: once for each pass outside it, the rest shared as ever."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import regraft
from regraft.errors import ModelError
from regraft.training.passes.analyze import Inputs, analysis_of
from regraft.training.passes.intercept import Interception

WIDTH = 6


class Experts(nn.Module):
    """Each row goes to one of two experts, found by `nonzero`: a shape that depends on values."""

    def __init__(self, p=0.0):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.p = p

    def forward(self, x):
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((x.sum(-1) > 0) == bool(number)).squeeze(-1)
            total = total.index_add(0, rows, F.dropout(expert(x[rows]), self.p, self.training))
        return total


class Routed(nn.Module):
    """Gives what went into the experts too, so that a test can make their part again."""

    def __init__(self, experts, p=0.5):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(p)
        self.experts = experts
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        dropped = self.dropout(self.stem(x))
        return {"dropped": dropped, "logits": self.head(self.experts(dropped))}


def rows(count=5):
    return torch.randn(count, WIDTH, dtype=torch.float64)


def shared(model, x, n=3):
    return regraft.stochastic_passes(model, n, x, strategy="shared")


def test_each_pass_is_the_model_s_own_and_its_gradients_are():
    model, x, weight = Routed(Experts()).double(), rows(), torch.randn(4, 5, 3, dtype=torch.float64)
    passes = shared(model, x, 4)
    assert len({tuple(one.flatten().tolist()) for one in passes["dropped"]}) == 4
    (passes["logits"] * weight).sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    # The same masks again, pass after pass, through the model's own modules.
    before = model.stem(x)
    masks = (passes["dropped"] != 0).double() * 2
    logits = torch.stack([model.head(model.experts(before * mask)) for mask in masks])
    torch.testing.assert_close(passes["logits"], logits, rtol=1e-12, atol=1e-12)
    (logits * weight).sum().backward()
    for one, expected in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


def test_only_what_vmap_cannot_run_is_apart():
    model, x = Routed(Experts()).double(), rows()
    calls = {"stem": 0, "head": 0, "experts": 0, "an expert": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    analysis = analysis_of(model, Inputs(((x,), {})))
    assert analysis.per_pass == {Experts: False}
    assert not analysis.decides
    model.stem.register_forward_hook(count("stem"))
    model.head.register_forward_hook(count("head"))
    model.experts.register_forward_hook(count("experts"))
    model.experts.experts[0].register_forward_hook(count("an expert"))
    shared(model, x, 3)
    assert calls == {"stem": 1, "head": 1, "experts": 1, "an expert": 3}
    assert "forward" not in model.experts.__dict__


def test_without_noise_before_them_they_run_once_for_all_passes():
    model, x = nn.Sequential(Experts(), nn.Dropout(0.5), Experts()).double(), rows()
    calls = {0: 0, 2: 0}

    def count(number):
        def hook(*_):
            calls[number] += 1

        return hook

    for number in calls:
        model[number].experts[0].register_forward_hook(count(number))
    regraft.stochastic_passes(model, 3, x)
    calls.update({0: 0, 2: 0})
    shared(model, x)
    assert calls == {0: 1, 2: 3}


def test_noise_inside_them_is_of_each_pass():
    model, x = Routed(Experts(p=0.5), p=0.1).double(), rows(2)
    with torch.no_grad():
        model.head = nn.Identity()
        for expert in model.experts.experts:
            expert.weight.zero_()
            expert.bias.fill_(1.0)
        kept = shared(model, x, 2000)["logits"]
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    # 4 standard errors of a mean of 2000 fair coins of 0 and 2, and of the product of two of them.
    assert (kept.mean(0) - 1).abs().max() < 4 * (1 / 2000) ** 0.5
    assert ((kept[1:] - 1) * (kept[:-1] - 1)).mean(0).abs().max() < 4 * (1 / 1999) ** 0.5


def test_a_graft_inside_them_acts():
    model, x = Routed(Experts(p=0.5)).double(), rows()
    regraft.apply(model, {"Dropout": "gaussian"}, inputs=x)
    model.head = nn.Identity()
    passes = shared(model, x)["logits"]
    assert passes.ne(0).all()
    assert analysis_of(model, Inputs(((x,), {}))).per_pass


class Cosine(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.cos if func is torch.sin else func)(*args, **(kwargs or {}))


class Waves(Experts):
    def forward(self, x):
        return torch.sin(super().forward(x) * 0)


def test_a_function_mode_of_the_user_s_reaches_into_them():
    model, x = Routed(Waves()).double(), rows()
    with Cosine():
        passes = shared(model, x)["logits"]
    torch.testing.assert_close(passes[0], model.head(torch.ones_like(x)))


class InPlace(Experts):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 1.0)


def test_one_that_writes_into_its_argument_is_apart_with_what_is_around_it():
    model, x = Routed(Around(InPlace())).double(), rows()
    assert analysis_of(model, Inputs(((x,), {}))).per_pass == {InPlace: False, Around: False}
    passes = shared(model, x)
    logits = torch.stack([model.head(model.experts(one)) for one in passes["dropped"]])
    torch.testing.assert_close(passes["logits"], logits, rtol=1e-12, atol=1e-12)


class Counting(nn.Module):
    """Gives how many rows went to an expert as a number, which is not the same in all passes."""

    def forward(self, x):
        return x, (x.sum(-1) > 0).sum().item()


class Counted(Around):
    def forward(self, x):
        x, count = self.inner(x)
        return x * count


def test_one_whose_outputs_cannot_be_stacked_is_apart_with_what_is_around_it():
    model, x = Routed(Counted(Counting())).double(), rows(9)
    assert analysis_of(model, Inputs(((x,), {}))).per_pass == {Counting: False, Counted: False}
    passes = shared(model, x)
    logits = torch.stack([model.head(model.experts(one)) for one in passes["dropped"]])
    torch.testing.assert_close(passes["logits"], logits, rtol=1e-12, atol=1e-12)


class Remembering(Experts):
    def forward(self, x):
        self.routed = super().forward(x)
        return self.routed


class Logged(Experts):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(super().forward(x))
        return self.log[-1]


@pytest.mark.parametrize("experts", [Remembering, Logged])
def test_one_that_keeps_a_tensor_is_not_shared(experts):
    model, x = Routed(experts()).double(), rows()
    with pytest.raises(ModelError, match="a shape depends on values"):
        shared(model, x)
    assert regraft.stochastic_passes(model, 3, x)["logits"].shape == (3, 5, 3)


def test_outputs_that_a_hook_inside_them_gathers_are_not_shared():
    class Gathering(Routed):
        def forward(self, x):
            gathered = []
            handle = self.experts.experts[0].register_forward_hook(
                lambda *args: gathered.append(args[2].mean())
            )
            outputs = super().forward(x)
            handle.remove()
            return {**outputs, "means": tuple(gathered)}

    model, x = Gathering(Experts()).double(), rows()
    with pytest.raises(ModelError, match="a shape depends on values"):
        shared(model, x)
    assert len(regraft.stochastic_passes(model, 3, x)["means"]) == 1


class Store:
    """What a module finds in it is what came before."""

    def __init__(self):
        self.total = 0.0

    def add(self, x):
        self.total = self.total + x.detach().mean()
        return self.total


class Cache(Store):
    """The same, by the names that caches of keys and values have in Transformers."""

    def get_seq_length(self):
        return 0

    def reorder_cache(self, order):
        pass


class Storing(Experts):
    def forward(self, x, store=None):
        return super().forward(x) + (0.0 if store is None else store.add(x))


class Stored(Routed):
    def __init__(self, store):
        super().__init__(Storing())
        self.make = store

    def forward(self, x, cache=None):
        dropped = self.dropout(self.stem(x))
        store = self.make() if cache is None else cache
        return {"dropped": dropped, "logits": self.head(self.experts(dropped, store))}


def test_what_one_pass_leaves_in_an_object_is_not_found_by_the_next():
    model, x = Stored(Store).double(), rows()
    with pytest.raises(ModelError, match="a shape depends on values"):
        shared(model, x)
    assert regraft.stochastic_passes(model, 3, x)["logits"].shape == (3, 5, 3)


def test_a_cache_that_the_forward_makes_is_left_out_and_one_that_it_is_given_counts():
    model, x = Stored(Cache).double(), rows()
    passes = shared(model, x)
    logits = torch.stack([model.head(model.experts(one)) for one in passes["dropped"]])
    torch.testing.assert_close(passes["logits"], logits, rtol=1e-12, atol=1e-12)
    with pytest.raises(ModelError, match="a shape depends on values"):
        regraft.stochastic_passes(model, 3, x, cache=Cache(), strategy="shared")


class Normalizing(Experts):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_a_batch_norm_in_training_inside_them_is_refused():
    model, x = Routed(Normalizing()).double(), rows()
    with pytest.raises(ModelError, match="a BatchNorm in training comes behind the first random operation"):
        shared(model, x)
    model.experts.norm.eval()
    assert shared(model, x)["logits"].shape == (3, 5, 3)


class Skipping(nn.Module):
    """LayerDrop: the layer runs or does not, for the whole batch."""

    def __init__(self, p):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.p = p

    def forward(self, x):
        if self.training and torch.rand([]) < self.p:
            return x
        return x + F.dropout(self.layer(x), 1e-9, self.training)


@pytest.mark.parametrize("before", [0.0, 1e-9], ids=["before any noise", "behind a dropout"])
def test_a_layer_that_is_skipped_at_random_is_so_in_each_pass_by_itself(before):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(before), Skipping(0.25)).double()
    x = rows(2)
    analysis = analysis_of(model, Inputs(((x,), {})))
    assert analysis.per_pass == {Skipping: not before}
    assert analysis.decides
    with torch.no_grad():
        whole = model.eval()(x)
        model.train()
        passes = shared(model, x, 2000)
        skipped = (passes - model[0](x)).abs().amax((1, 2)) < 1e-6
    assert torch.equal(skipped, ~((passes - whole).abs().amax((1, 2)) < 1e-6))
    assert abs(skipped.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    with pytest.raises(ModelError, match="it draws once for the whole batch"):
        regraft.stochastic_passes(model, 2, x, strategy="batch")


def test_other_threads_and_entries_of_their_own_are_left_alone():
    module = nn.Linear(2, 2)
    own = module.forward
    module.forward = own
    x, seen = torch.ones(1, 2), []

    def called():
        torch.func.vmap(lambda row: seen.append(module(row)) or row)(x)
        return seen.pop()

    with Interception(None, {module: lambda *_: "routed"}).active():
        assert called() == "routed"
        assert torch.equal(module(x), own(x))  # outside vmap
        thread = threading.Thread(target=lambda: seen.append(module(x)))
        thread.start()
        thread.join()
        assert torch.equal(seen.pop(), own(x))
        with Interception(None, {module: lambda *_: "inner"}).active():
            assert called() == "inner"
        assert called() == "routed"
    assert module.__dict__["forward"] is own


def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).train()


def test_r_drop_of_routed_experts_learns_by_sharing():
    torch.manual_seed(0)
    model, ids = switch(), torch.randint(1, 64, (2, 6))
    names = [
        cls.__name__ for cls in analysis_of(model, Inputs(((), {"input_ids": ids, "labels": ids}))).per_pass
    ]
    assert names == ["SwitchTransformersExperts"]
    regraft.rdrop(model, alpha=1.0, strategy="shared")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

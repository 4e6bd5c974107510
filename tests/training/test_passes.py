"""`stochastic_passes`: every strategy gives independent passes, in the model's own type of output."""

import copy
import dataclasses
import functools
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regraft
from regraft.errors import InputsError, ModelError, RateError
from regraft.training.passes.analyze import Inputs, analysis_of
from regraft.training.passes.intercept import Interception
from regraft.training.passes.measure import on_fake_tensors
from regraft.training.passes.vmap import shared_forward
from tests.training.models import DropPath, FusedAttention, bert, headed_bert, images, tokens, vit

STRATEGIES = ["shared", "batch", "loop"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Held:
    logits: torch.Tensor
    name: str


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "named tuple": lambda x: Pair(x, x + 1),
    "dict": lambda x: {"logits": x, "count": 3},
    "nested": lambda x: [{"a": (x, [x * 2])}, "text"],
    "dataclass": lambda x: Held(x, "name"),
}


class Giving(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(6, 3), make

    def forward(self, x):
        return self.make(F.dropout(self.linear(x), 0.5, self.training))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return tensors(list(vars(value).values()))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [one for part in parts for one in tensors(part)]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_type_with_a_new_first_axis(name, strategy):
    model, x = Giving(OUTPUTS[name]), torch.randn(4, 6)
    plain = model(x)
    stacked = regraft.stochastic_passes(model, 3, x, strategy=strategy)
    assert type(stacked) is type(plain)
    assert [one.shape for one in tensors(stacked)] == [(3, *one.shape) for one in tensors(plain)]
    if name == "dict":
        assert stacked["count"] == 3
    first = tensors(stacked)[0]
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_model_outputs_keep_their_type(strategy):
    model = bert()
    stacked = regraft.stochastic_passes(
        model, 2, input_ids=tokens(), strategy=strategy, output_hidden_states=True
    )
    assert type(stacked).__name__ == "SequenceClassifierOutput"
    assert stacked.logits.shape == (2, 4, 2)
    assert [one.shape for one in stacked.hidden_states] == [(2, 4, 8, 32)] * 3
    assert stacked.loss is None


# Every way of drawing that vmap, a repeated batch or both could get wrong.
NOISE = {
    "dropout": nn.Dropout(0.5),
    "dropout in place": nn.Dropout(0.5, inplace=True),
    "dropout1d": nn.Dropout1d(0.5),
    "dropout2d": nn.Dropout2d(0.5),
    "dropout2d in place": nn.Dropout2d(0.5, inplace=True),
    "alpha dropout": nn.AlphaDropout(0.5),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.5),
    "drop path": DropPath(),
    "fused attention": FusedAttention(),
    "gaussian": regraft.nn.GaussianDropout(0.5),
}
SHAPES = {"dropout1d": (16, 8, 3), "gaussian": (16, 8, 3)}


class Noisy(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return self.noise(x * 1)


def correlation(a, b):
    a, b = (one.flatten(1) - one.flatten(1).mean(1, keepdim=True) for one in (a, b))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NOISE)
def test_passes_are_independent_and_distributed_as_single_passes(name, strategy):
    model = Noisy(NOISE[name]).train()
    x = torch.randn(SHAPES.get(name, (16, 8, 3, 3)))
    n = 60
    passes = regraft.stochastic_passes(model, n, x, strategy=strategy)
    singles = torch.stack([model(x) for _ in range(n)])
    noise, expected = passes - passes.mean(0), singles - singles.mean(0)
    # Each element's mean and spread over the passes, to the precision that n passes allow.
    spread = expected.square().mean()
    assert (passes.mean(0) - singles.mean(0)).square().mean() < 4 * spread / n
    assert noise.square().mean() / spread == pytest.approx(1, abs=0.15)
    # Neighbouring passes have nothing in common: a mask that two of them share would correlate at 1.
    assert abs(correlation(noise[1:], noise[:-1])) < 0.1


class First(nn.Module):
    """A recurrent network without its state, whose first axis is that of the layers."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, input):
        return self.cell(input)[0]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_draw_for_each_pass(cell, strategy):
    # vmap alone lets these draw once for all passes, without a word.
    model = First(cell(6, 6, 2, dropout=0.5, batch_first=True))
    outputs = regraft.stochastic_passes(model, 3, torch.randn(4, 5, 6), strategy=strategy)
    assert outputs.shape == (3, 4, 5, 6)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3


MODELS = {
    "bert": (lambda p: bert(hidden_dropout_prob=p, attention_probs_dropout_prob=p), {"input_ids": tokens()}),
    "vit": (lambda p: vit(proj_drop_rate=p, attn_drop_rate=p, drop_path_rate=p), {"x": images()}),
    "encoder": (
        lambda p: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True), 2),
        {"src": torch.randn(3, 5, 16)},
    ),
    "lstm": (lambda p: First(nn.LSTM(6, 6, 2, dropout=p, batch_first=True)), {"input": torch.randn(3, 5, 6)}),
}


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_at_rate_0_every_pass_is_the_plain_forward(name, strategy):
    build, inputs = MODELS[name]
    model = build(0.0).double().train()
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
    plain = tensors(model(**inputs))[0]
    stacked = tensors(regraft.stochastic_passes(model, 2, **inputs, strategy=strategy))[0]
    torch.testing.assert_close(stacked, torch.stack([plain, plain]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_at_rate_0_are_the_plain_ones(name, strategy):
    build, inputs = MODELS[name]
    model = build(0.0).train()
    weight = torch.randn(2, *tensors(model(**inputs))[0].shape)
    (tensors(model(**inputs))[0] * weight.sum(0)).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    (tensors(regraft.stochastic_passes(model, 2, **inputs, strategy=strategy))[0] * weight).sum().backward()
    for found, wanted in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", ["dropout", "drop path", "fused attention"])
def test_gradients_of_shared_noise(noise):
    model = nn.Sequential(nn.Linear(3, 3), Noisy(NOISE[noise]), nn.Linear(3, 2)).double().train()

    def run(x):
        torch.manual_seed(1)
        return regraft.stochastic_passes(model, 2, x, strategy="shared")

    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)


def test_auto_shares_a_long_prefix_and_repeats_where_there_is_none(caplog):
    ids = tokens()
    head, everywhere = headed_bert(), bert()
    assert analysis_of(head, Inputs(((), {"input_ids": ids}))).prefix > 0.9
    assert analysis_of(everywhere, Inputs(((), {"input_ids": ids}))).prefix < 0.1
    counts = {"head": 0, "everywhere": 0}

    def count(name):
        def hook(module, args):
            counts[name] = len(args[0]) if args else 0

        return hook

    head.bert.embeddings.word_embeddings.register_forward_pre_hook(count("head"))
    everywhere.bert.embeddings.word_embeddings.register_forward_pre_hook(count("everywhere"))
    regraft.stochastic_passes(head, 3, input_ids=ids)
    regraft.stochastic_passes(everywhere, 3, input_ids=ids)
    assert counts == {"head": 4, "everywhere": 12}


def test_the_look_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[1].register_buffer("mine", torch.zeros(1))
    x = torch.randn(8, 6)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    analysis_of(model, Inputs(((x,), {})))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    first = regraft.stochastic_passes(model, 2, x)
    torch.manual_seed(3)
    model.load_state_dict(before)
    assert torch.equal(regraft.stochastic_passes(model, 2, x), first)


def test_a_rate_raised_later_is_seen():
    model, x = headed_bert(p=0.0), tokens()
    equal = regraft.stochastic_passes(model, 2, input_ids=x).logits
    assert torch.equal(equal[0], equal[1])
    model.dropout.p = 0.5
    model.bert.embeddings.dropout.p = 0.5
    apart = regraft.stochastic_passes(model, 2, input_ids=x).logits
    assert not torch.equal(apart[0], apart[1])


BATCH_NORM = {"loop": 3, "shared": 1, "auto": 1}


@pytest.mark.parametrize("strategy", BATCH_NORM)
def test_running_statistics_before_the_fork(strategy):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))
    regraft.stochastic_passes(model, 3, torch.randn(8, 6), strategy=strategy)
    assert model[0].num_batches_tracked == BATCH_NORM[strategy]


def test_batch_norm_behind_the_fork_is_refused_and_falls_back(caplog):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)), torch.randn(8, 6)
    with pytest.raises(ModelError, match="a BatchNorm in training comes behind the first random operation"):
        regraft.stochastic_passes(model, 3, x, strategy="shared")
    model = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "regraft"):
        for _ in range(3):
            regraft.stochastic_passes(model, 3, x)
    assert model[2].num_batches_tracked == 9  # a loop
    assert len([one for one in caplog.messages if "BatchNorm" in one]) == 1  # once, with the reason
    with pytest.raises(ModelError, match="the rows of its first axis see one another"):
        regraft.stochastic_passes(model, 3, x, strategy="batch")
    model.eval()
    assert regraft.stochastic_passes(model, 3, x, strategy="shared").shape == (3, 8, 6)


def test_a_mask_of_weights_is_not_shared_by_passes():
    model, x = nn.Sequential(nn.Linear(6, 3), nn.ReLU()), torch.randn(4, 6)
    regraft.apply(model, {"Linear": "dropconnect(p=0.5)"}, inputs=x)
    with pytest.raises(ModelError, match="it draws once for the whole batch"):
        regraft.stochastic_passes(model, 2, x, strategy="batch")
    for strategy in ("auto", "shared", "loop"):
        passes = regraft.stochastic_passes(model, 2, x, strategy=strategy)
        assert not torch.equal(passes[0], passes[1])


@functools.lru_cache(maxsize=4)
def positions(count):
    return torch.arange(count, dtype=torch.float32)


class Remembering(nn.Module):
    """Makes a table once for all its forwards, as detectors make their anchors."""

    def forward(self, x):
        table = positions(x.shape[1])
        assert float(table[-1]) == x.shape[1] - 1  # a fake tensor has no value
        return F.dropout(x, 0.5) + table


def test_the_look_leaves_nothing_in_a_functions_memory():
    positions.cache_clear()
    model, x = Remembering(), torch.randn(4, 6)
    with on_fake_tensors(model, ((x,), {})), FakeTensorMode():
        positions(6)
    assert positions.cache_info().currsize == 0
    assert regraft.stochastic_passes(model, 2, x).shape == (2, 4, 6)
    kept = positions(6)
    assert positions(6) is kept
    with on_fake_tensors(model, ((x,), {})):
        positions(6)
    assert positions(6) is kept  # nothing was made, so nothing is forgotten


class Checking(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        x = F.dropout(x, 0.5, self.training)
        if (x > self.limit).any():
            x = x * 0
        return x


def test_a_branch_that_all_passes_take_is_shared():
    x = torch.ones(1, 6)
    passes = regraft.stochastic_passes(Checking(9), 4, x, strategy="shared")
    assert not torch.equal(passes[0], passes[1])
    # Each pass of one element is 0 or 2, so 30 of them take both branches: a model such as this is repeated.
    model, x = Checking(1), torch.ones(1, 1)
    with pytest.raises(Exception, match="branches on a value that differs between the passes"):
        shared_forward(model, 30, ((x,), {}))
    assert regraft.stochastic_passes(model, 30, x).shape == (30, 1, 1)


def test_a_layer_that_is_dropped_is_dropped_by_each_pass_for_itself():
    class Dropping(nn.Module):
        rate = 0.5

        def forward(self, x):
            return F.dropout(x, 0.1) * (0 if torch.rand([]) < self.rate else 1)

    x = torch.tensor([[1.0], [2.0]]).expand(2, 30)
    for strategy in ("shared", "batch"):
        with pytest.raises(
            ModelError, match="branches on a value that differs|draws once for the whole batch"
        ):
            regraft.stochastic_passes(Dropping(), 2, x, strategy=strategy)
    passes = [regraft.stochastic_passes(Dropping(), 2, x) for _ in range(60)]
    agreed = sum(bool((one[0].sum() > 0) == (one[1].sum() > 0)) for one in passes)
    assert 15 < agreed < 45
    model = Dropping()
    model.rate = 0.0  # the number is drawn all the same, and decides nothing
    for strategy in STRATEGIES:
        assert regraft.stochastic_passes(model, 2, x, strategy=strategy).sum() > 0


def test_a_cache_that_nobody_asked_for_is_left_out():
    from transformers import DynamicCache

    class Filling(nn.Module):
        def forward(self, x, **kwargs):
            return {"logits": F.dropout(x, 0.5), "past_key_values": DynamicCache()}

    for strategy in [*STRATEGIES, "auto"]:
        found = regraft.stochastic_passes(Filling(), 2, torch.randn(4, 6), strategy=strategy)
        assert found["logits"].shape == (2, 4, 6)
        assert found["past_key_values"] is None


def test_a_gradient_asked_for_on_the_way_does_not_stop_the_sharing():
    class Asking(nn.Module):
        def forward(self, x):
            x = x * 1
            x.requires_grad_(True)
            return F.dropout(x, 0.5)

    assert regraft.stochastic_passes(Asking(), 2, torch.ones(4, 6), strategy="shared").shape == (2, 4, 6)


class Adding(nn.Module):
    """Adds noise to a value that all passes share, as adapters of weights do."""

    def __init__(self, aliased):
        super().__init__()
        self.aliased = aliased

    def forward(self, x):
        result = alias = x * 1
        result += F.dropout(x, 0.5)
        result.mul_(2)
        result -= F.dropout(x, 0.5)
        return alias * 1 if self.aliased else result


def test_noise_added_in_place_is_shared_unless_the_old_name_is_read():
    torch.manual_seed(1)
    passes = regraft.stochastic_passes(Adding(False), 3, torch.ones(4, 9), strategy="shared")
    assert set(passes.flatten().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert not torch.equal(passes[0], passes[1])
    with pytest.raises(ModelError, match="used after a change in place"):
        regraft.stochastic_passes(Adding(True), 2, torch.ones(4, 9), strategy="shared")
    assert set(regraft.stochastic_passes(Adding(True), 3, torch.ones(4, 9)).flatten().tolist()) == {
        0,
        2,
        4,
        6,
    }


class Leaking(nn.Module):
    """Reads a tensor again that its dropout changed in place."""

    def forward(self, x):
        x = x * 1
        F.dropout(x, 0.5, self.training, inplace=True)
        return x.flatten(1) * 2


def test_a_tensor_read_after_an_in_place_dropout_is_not_shared():
    x = torch.ones(4, 30)
    with pytest.raises(ModelError, match="used after a change in place"):
        regraft.stochastic_passes(Leaking(), 2, x, strategy="shared")
    passes = regraft.stochastic_passes(Leaking(), 2, x)
    assert set(passes.flatten().tolist()) == {0.0, 4.0}
    assert not torch.equal(passes[0], passes[1])


def test_labels_give_a_loss_for_each_pass_or_an_error():
    model, y = bert(), torch.tensor([0, 1, 0, 1])
    for strategy in ("auto", "shared", "loop"):
        outputs = regraft.stochastic_passes(model, 3, input_ids=tokens(), labels=y, strategy=strategy)
        each = [F.cross_entropy(one, y) for one in outputs.logits]
        torch.testing.assert_close(outputs.loss, torch.stack(each))
    with pytest.raises(InputsError, match="'loss' is one number for all passes together"):
        regraft.stochastic_passes(model, 3, input_ids=tokens(), labels=y, strategy="batch")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_chunks(strategy, chunk):
    model, rows = Giving(OUTPUTS["dict"]), []
    model.linear.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    x = torch.randn(4, 6)
    stacked = regraft.stochastic_passes(model, 5, x, strategy=strategy, chunk=chunk)
    assert stacked["logits"].shape == (5, 4, 3)
    assert len({tuple(one.flatten().tolist()) for one in stacked["logits"]}) == 5
    real = rows[-{"loop": 5}.get(strategy, -(-5 // chunk)) :]
    assert max(real) == (4 * min(chunk, 5) if strategy == "batch" else 4)


def checkpointed(model, reentrant):
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


def gradients_of_passes(model, strategy):
    torch.manual_seed(1)
    model.zero_grad()
    outputs = regraft.stochastic_passes(model, 2, input_ids=tokens(), strategy=strategy)
    outputs.logits.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_checkpointed_before_the_first_draw(strategy, reentrant):
    model = headed_bert().train()
    expected = gradients_of_passes(model, strategy)
    checkpointed(model, reentrant)
    for found, wanted in zip(gradients_of_passes(model, strategy), expected, strict=True):
        torch.testing.assert_close(found, wanted)


class Checkpointed(nn.Module):
    """Checkpoints what comes behind its dropout, by a way of torch's, or by one that nobody foresaw."""

    def __init__(self, way, closure):
        super().__init__()
        self.way, self.closure = way, closure
        self.first, self.drop, self.last = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        x = self.drop(self.first(x))
        captured = x.detach()
        block = (lambda _: self.block(captured)) if self.closure else self.block
        return {"dropped": x, "outputs": self.way(block, x)}

    def block(self, x):
        return self.last(x).tanh()


class _Recomputing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, anchor, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs) + 0 * anchor

    @staticmethod
    def backward(ctx, gradient):
        inputs = [one.detach().requires_grad_() for one in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        torch.autograd.backward(outputs, gradient)
        return None, None, *(one.grad for one in inputs)


class _RecomputingForVmap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function, anchor, *inputs):
        with torch.no_grad():
            return function(*inputs) + 0 * anchor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    backward = _Recomputing.backward


def _hooked(function, *args):
    # As a library of its own would recompute: by hooks on saved tensors.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return function(*args)


WAYS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "a function of autograd": lambda *call: _Recomputing.apply(
        call[0], torch.ones((), requires_grad=True), *call[1:]
    ),
    "one that vmap takes": lambda *call: _RecomputingForVmap.apply(
        call[0], torch.ones((), requires_grad=True), *call[1:]
    ),
    "hooks": _hooked,
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["shared", "auto"])
def test_what_is_recomputed_behind_the_first_draw_is_right_or_refused(way, closure, strategy):
    model, x = Checkpointed(WAYS[way], closure).double(), torch.randn(4, 6).double()
    for known in (True, False):  # not known: the analysis saw the model without a checkpoint
        if not known:
            model.way = lambda function, *args: function(*args)
            analysis_of(model, Inputs(((x,), {})))
            model.way = WAYS[way]
        try:
            passes = regraft.stochastic_passes(model, 2, x, strategy=strategy)
        except ModelError as error:
            assert strategy == "shared"
            assert "gradient checkpointing" in str(error)
            continue
        model.zero_grad()
        passes["outputs"].square().sum().backward()
        found, model.last.weight.grad = model.last.weight.grad, None
        model.block(passes["dropped"].detach()).square().sum().backward()
        torch.testing.assert_close(found, model.last.weight.grad)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy):
    model = vit(drop_rate=0.3, proj_drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = regraft.stochastic_passes(model, 2, images(), strategy=strategy)
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_it_is_compiled_whole():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    step = torch.compile(lambda x: regraft.stochastic_passes(model, 2, x), backend="aot_eager")
    passes = step(torch.randn(4, 6))
    assert passes.shape == (2, 4, 3)
    assert not torch.equal(passes[0], passes[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: regraft.stochastic_passes(m, 0, x), RateError, "n=0"),
        (lambda m, x: regraft.stochastic_passes(m, True, x), RateError, "n=True"),
        (lambda m, x: regraft.stochastic_passes(m, 2, x, chunk=0), RateError, "chunk=0"),
        (
            lambda m, x: regraft.stochastic_passes(m, 2, x, strategy="share"),
            InputsError,
            "did you mean 'shared'",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.Linear(6, 3), torch.randn(4, 6))


def test_passes_of_different_lengths_are_named():
    class Speech(nn.Module):
        def forward(self, x):
            return {"waveform": x[:, : int(torch.randint(1, 99, ()))]}

    with pytest.raises(ModelError, match="the passes differ in shape") as raised:
        regraft.stochastic_passes(Speech(), 5, torch.ones(2, 100), strategy="loop")
    assert "waveform" in str(raised.value)


class _TimesItsSum(torch.autograd.Function):
    """Couples all elements of what it is given, and has no `setup_context`, which vmap asks for."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.sum() + (gradient * x).sum()


class _WithAFunction(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(p), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(_TimesItsSum.apply(self.drop(self.first(x))))


def test_an_autograd_function_that_vmap_refuses_runs_once_for_each_pass():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = _WithAFunction(0.0)
    shared = regraft.stochastic_passes(model, 3, x, strategy="shared")
    assert torch.equal(shared, model(x).expand(3, 3, 2))
    (expected,) = torch.autograd.grad(model(x).sum(), model.first.weight)
    (found,) = torch.autograd.grad(shared.mean(0).sum(), model.first.weight)
    torch.testing.assert_close(found, expected)
    noisy = regraft.stochastic_passes(_WithAFunction(0.5), 2, x, strategy="shared")
    assert not torch.equal(*noisy)


def test_autograd_functions_are_as_they_were_afterwards():
    before = torch.autograd.Function.__dict__["apply"]
    regraft.stochastic_passes(_WithAFunction(0.5), 2, torch.ones(3, 4), strategy="shared")
    assert torch.autograd.Function.__dict__["apply"] is before
    # Somebody else's vmap refuses them as ever, also while passes are made in another thread.
    with Interception(lambda *_: None).active(), ThreadPoolExecutor(1) as other:
        assert torch.autograd.Function.__dict__["apply"] is not before
        run = torch.func.vmap(_TimesItsSum.apply)
        with pytest.raises(RuntimeError, match="setup_context"):
            other.submit(run, torch.ones(2, 3)).result()
        assert other.submit(_TimesItsSum.apply, torch.ones(2)).result().tolist() == [2, 2]
    assert torch.autograd.Function.__dict__["apply"] is before


class _Jittered(nn.Module):
    """Scales its input by one number drawn for the whole batch, as the positions of DINOv3."""

    def forward(self, x):
        return x * torch.empty(1).uniform_(0.5, 2.0)


def test_a_number_drawn_for_the_whole_batch_is_drawn_for_each_pass():
    x = torch.ones(3, 4)
    for strategy in ("shared", "loop", "auto"):
        passes = regraft.stochastic_passes(_Jittered(), 4, x, strategy=strategy)
        assert len({float(one[0, 0]) for one in passes}) == 4, strategy
    with pytest.raises(ModelError, match="draws once for the whole batch"):
        regraft.stochastic_passes(_Jittered(), 4, x, strategy="batch")


class _Quantized(nn.Module):
    """Reads `.data`, and narrows from where a tensor says, behind a dropout."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        x = self.drop(x)
        return (x / x.data.abs().max()).narrow(1, torch.tensor(1), 2)


def test_what_only_reads_a_tensors_data_is_shared():
    x = torch.randn(3, 4)
    model = _Quantized()
    passes = regraft.stochastic_passes(model, 2, x, strategy="shared")
    assert torch.equal(passes, model(x).expand(2, 3, 2))
    model.drop.p = 0.5
    assert not torch.equal(*regraft.stochastic_passes(model, 2, x, strategy="shared"))


def test_a_model_with_several_main_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.main_input_name = ["x", "names"]  # as OneFormer has
            self.drop = nn.Dropout(0.5)

        def forward(self, x, names=None):
            return self.drop(x)

    for strategy in ("auto", "shared", "batch", "loop"):
        inputs = {"x": torch.rand(4, 3), "names": [1, [2], {}]}
        assert regraft.stochastic_passes(Two(), 2, strategy=strategy, **inputs).shape == (2, 4, 3)


def test_equal_passes_in_eval_are_said():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval()
    with pytest.warns(UserWarning, match="are equal, for it is in eval"):
        regraft.stochastic_passes(model, 2, torch.rand(5, 4))
    regraft.apply(model, {"Dropout": "mc"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regraft.stochastic_passes(model, 2, torch.rand(5, 4))
        regraft.stochastic_passes(model.train(), 2, torch.rand(5, 4))


def test_sparse_inputs_have_no_storage_and_are_shared():
    class Neighbours(nn.Module):
        def forward(self, x, adjacency):
            return F.dropout(torch.sparse.mm(adjacency, x), 0.5)

    inputs = torch.rand(6, 4), torch.eye(6).to_sparse()
    passes = regraft.stochastic_passes(Neighbours(), 3, *inputs, strategy="shared")
    assert not torch.equal(passes[0], passes[1])

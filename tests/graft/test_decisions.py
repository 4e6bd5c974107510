"""What a plan decides is seen in the probe, in the report, and looked at again: no name and no rank decides."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import regraft
from regraft.errors import FileError, ModelError


class Scaled(nn.Module):
    """A block whose path ends in a name; `how` it returns what it computes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.scale = how, nn.Linear(6, 6), nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.clone()) * self.scale
        if self.how == "in place":
            x += y
            return x
        if self.how == "in two steps":
            x = x + y
            return torch.add(self.body(x), x)
        return {"adds": x + y, "replaces": y, "after a function": torch.relu(x + y)}[self.how]


class Stack(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(6, 6), Scaled(how)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stem(x)))


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["adds", "in place", "in two steps"])
def test_what_a_block_adds_is_dropped_wherever_its_path_leads(how):
    torch.manual_seed(0)
    model = Stack(how)
    report = regraft.apply(model, {"after:Scaled": "droppath(p=0.5)"}, X)
    assert [(edit.path, edit.residual) for edit in report.grafted] == [("last", True)]
    seen = {}
    model.stem.register_forward_hook(lambda _, __, out: seen.update(x=out.clone()))
    model.last.register_forward_hook(lambda _, __, out: seen.update(y=out))
    model.train()(X)
    lost = (seen["y"] == 0).all(1)
    kept_input = (seen["y"] == seen["x"]).all(1)
    assert not lost.any()
    assert 16 < kept_input.sum() < 48
    model.last.body.weight.grad = None
    model(X).sum().backward()
    assert model.last.body.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["replaces", "after a function"])
def test_what_was_not_seen_to_add_is_asked_for(how):
    report = regraft.apply(Stack(how), {"after:Scaled": "droppath(p=0.5)"}, X)
    assert not report.grafted
    assert "was not seen to add to its input" in report.skipped[0].reason
    assert "adds=True" in report.skipped[0].remedy
    for adds in (True, False):
        report = regraft.apply(Stack(how), {"after:Scaled": f"droppath(p=0.5, adds={adds})"}, X)
        assert [edit.residual for edit in report.grafted] == [adds]
        assert regraft.apply(Stack(how), regraft.Plan.from_json(_plan_json(how, adds))).grafted


def _plan_json(how: str, adds: bool) -> str:
    return regraft.plan(Stack(how), {"after:Scaled": f"droppath(p=0.5, adds={adds})"}, X).to_json()


def test_a_block_that_begins_to_write_to_its_input_raises():
    model = Stack("adds").train()
    regraft.apply(model, {"after:Scaled": "droppath(p=0.5)"}, X)
    model.last.how = "in place"
    with pytest.raises(ModelError, match="writes to its input"):
        model(X)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, result = self.gate(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            result.index_add_(0, rows, expert(x[rows]))
        return x + result


def test_an_experts_result_is_dropped_and_not_what_it_adds_to_its_input():
    torch.manual_seed(1)
    model = Experts().train()
    rule = {"after:*@experts.*": regraft.variant("droppath", p=lambda site: 0.5)}
    report = regraft.apply(model, rule, X)
    assert [(edit.path, edit.residual) for edit in report.grafted] == [
        (f"experts.{i}", False) for i in range(3)
    ]
    dropped = (model(X) == X).all(1).float().mean()
    assert 0.25 < dropped < 0.75


def test_rates_of_an_encoder_and_of_a_decoder_grow_apart():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    config = T5Config(**sizes, num_layers=3, num_decoder_layers=2, decoder_start_token_id=0)
    report = regraft.plan(T5ForConditionalGeneration(config), {"after:T5Block": "droppath(p=0.4)"})
    rates = {edit.path: edit.options["p"] for edit in report.grafted}
    assert rates == {"encoder.block.1": 0.2, "encoder.block.2": 0.4, "decoder.block.1": 0.4}


class Tagger(nn.Module):
    """A recurrent network, and a dropout on what it gives."""

    def __init__(self, batch_first: bool, packed: bool = False) -> None:
        super().__init__()
        self.batch_first, self.packed = batch_first, packed
        self.rnn = nn.GRU(6, 8, 2, dropout=0.5, batch_first=batch_first)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor([7, 4, 3]), batch_first=self.batch_first)
        y, _ = self.rnn(x)
        return self.head(self.drop(y.data if self.packed else y))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("variant", ["spatial", "droppath"])
def test_the_examples_of_a_time_first_network_have_masks_of_their_own(variant, batch_first):
    model, x = Tagger(batch_first).train(), torch.ones(7, 3, 6)
    report = regraft.apply(model, {"Dropout": f"{variant}(p=0.5)"}, x.transpose(0, 1) if batch_first else x)
    assert len(report.grafted) == 2
    assert report.grafted[1].options.get("batch_axis") == (None if batch_first else 1)
    y = model.drop(torch.ones(3, 7, 64) if batch_first else torch.ones(7, 3, 64))
    y = y if batch_first else y.transpose(0, 1)
    assert torch.equal(y, y[:, :1].expand_as(y))  # one mask for all steps
    draws = [model.drop(torch.ones(7, 3, 64).transpose(0, int(batch_first))) for _ in range(8)]
    assert any(
        not torch.equal(z.select(int(not batch_first), 0), z.select(int(not batch_first), 1)) for z in draws
    )


@pytest.mark.parametrize("layout", ["batch first", "time first", "packed"])
def test_between_the_layers_each_example_has_one_mask(layout):
    torch.manual_seed(0)
    from regraft.graft.recurrent import Recurrence, by_example

    x = torch.ones(3, 7, 32)
    sizes = ()
    if layout == "time first":
        x = x.transpose(0, 1)
    if layout == "packed":
        packed = pack_padded_sequence(x, torch.tensor([7, 4, 3]), batch_first=True)
        x, sizes = packed.data, (packed.batch_sizes,)
    call = Recurrence(torch.gru, x, sizes, (), [], True, 2, 0.5, True, (False, layout == "batch first"))
    y = by_example(call, x, lambda one: regraft.variants.spatial.spatial_dropout(one, 0.5))
    assert y.shape == x.shape
    if layout == "packed":
        first = y[[0, 3, 6, 9, 11, 12, 13]]  # the rows of the longest example
        assert torch.equal(first, first[:1].expand_as(first))
    else:
        y = y if layout == "batch first" else y.transpose(0, 1)
        assert torch.equal(y, y[:, :1].expand_as(y))
        assert not torch.equal(y[0], y[1])


def test_a_packed_sequence_has_no_axis_of_examples():
    x = torch.randn(3, 7, 6)
    report = regraft.apply(Tagger(True, packed=True), {"Dropout@drop": "spatial"}, x)
    assert "packed sequence" in report.skipped[0].reason


def test_channels_are_those_that_the_convolution_made():
    net = nn.Sequential(nn.Conv1d(3, 16, 3), nn.GELU(), nn.Dropout(0.5)).train()
    report = regraft.apply(net, {"Dropout": "token"}, torch.randn(2, 3, 12))
    assert report.grafted[0].after == "TokenDropout(p=0.5, channel_axis=1)"
    y = net[2](torch.ones(4, 16, 50))
    assert torch.equal(y, y[:, :1].expand_as(y))


class Shuffled(nn.Module):
    """Of its axes none is known to hold channels."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.sort(x.flatten(1).cumsum(1)).values.unflatten(1, (4, 5)))


def test_an_axis_that_was_not_seen_is_asked_for():
    x = torch.randn(2, 4, 5)
    report = regraft.apply(Shuffled(), {"Dropout": "spatial"}, x)
    assert report.skipped[0].reason == "which axis holds the channels was not seen"
    assert len(regraft.apply(Shuffled(), {"Dropout": "spatial(channel_axis=1)"}, x).grafted) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["token", "droppath"])
def test_attention_weights_are_no_activations(variant, attention):
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=30, dim=16, hidden_dim=32, n_heads=2, n_layers=1, attn_implementation=attention
    )
    report = regraft.plan(DistilBertModel(config), {"Dropout": variant})
    assert [skip.path for skip in report.skipped] == ["transformer.layer.0.attention"]
    assert "attention weights" in report.skipped[0].reason
    assert len(report.grafted) == 2


@pytest.mark.parametrize(("planned", "run"), [("sdpa", "eager"), ("eager", "sdpa")])
def test_attention_stays_grafted_in_another_implementation(planned, run):
    def model(attention):
        return tiny.llama(0.5).train(), attention

    first, _ = model(planned)
    first.set_attn_implementation(planned)
    plan = regraft.plan(first, {"Dropout": "off"})
    for other in (first, tiny.llama(0.5).train()):
        other.set_attn_implementation(planned if other is first else run)
        assert len(regraft.apply(other, plan).grafted) == 2
        other.set_attn_implementation(run)
        assert torch.equal(other(**tiny.tokens()).logits, other(**tiny.tokens()).logits)
    first.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="draws its own"):
        first(**tiny.tokens())


def test_noise_is_added_to_the_tokens_alone():
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2Model(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).train()
    report = regraft.apply(model, {"Embedding": "neftune(alpha=5.0)"})
    assert [edit.path for edit in report.grafted] == ["wte"]
    assert "positions" in report.skipped[0].reason
    ids = torch.zeros(2, 8, dtype=torch.long)
    sums = [model(ids, output_hidden_states=True).hidden_states[0] for _ in range(400)]
    expected = 5.0**2 / (8 * 16) / 3
    assert torch.stack(sums).var(0).mean().item() == pytest.approx(expected, rel=0.1)
    assert [edit.path for edit in regraft.apply(model, {"Embedding@wpe": "neftune"}).grafted] == ["wpe"]


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        return self.head(state[-1])


def test_an_insertion_that_nothing_reads_is_said():
    report = regraft.apply(LastState(), {"after:GRU": "dropout(p=0.5)"}, torch.randn(2, 5, 6))
    assert not report.grafted
    assert "nothing reads that value" in report.skipped[0].reason
    assert report.skipped[0].remedy == "name the part that is read: 'after:GRU#1'"
    model = LastState().train()
    assert len(regraft.apply(model, {"after:GRU#1": "dropout(p=0.5)"}, torch.randn(2, 5, 6)).grafted) == 1
    assert not torch.equal(model(torch.ones(2, 5, 6)), model(torch.ones(2, 5, 6)))


def test_none_leaves_all_parts_of_a_place_alone():
    rules = {"after:GRU#1": "dropout", "after:GRU": None}
    assert not regraft.plan(LastState(), rules, torch.randn(2, 5, 6)).grafted
    rules = {"after:GRU": None, "after:GRU#1": "dropout"}
    assert len(regraft.plan(LastState(), rules, torch.randn(2, 5, 6)).grafted) == 1


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, *args, **kwargs):
        return kwargs["hidden"], kwargs.get("mask"), args


def test_before_drops_the_first_real_tensor_among_keyword_arguments():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Wrapped()

        def forward(self, x):
            mask = torch.ones(x.shape[0], dtype=torch.long)
            return self.inside(3, mask=mask, hidden=x)

    model = Net().train()
    regraft.apply(model, {"before:Wrapped": "dropout(p=0.5)"}, X)
    hidden, mask, args = model(torch.ones(64, 6))
    assert (hidden == 0).any()
    assert mask.all()
    assert args == (3,)


STATEFUL = [{"Linear": "mixout(p=0.3)"}, {"Dropout": "concrete"}, {"Linear": "standout(gate='learned')"}]


@pytest.mark.parametrize("rules", STATEFUL, ids=str)
def test_a_saved_model_brings_the_state_of_its_grafts(tmp_path, rules):
    model = tiny.bert(attention="eager")
    regraft.apply(model, rules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    regraft.save_plan(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    report = regraft.load_plan(again, tmp_path)
    expected = model.state_dict()
    assert report.state_keys
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    again.train()(**tiny.tokens())


def test_state_that_no_checkpoint_has_brought_raises(tmp_path):
    model, again = tiny.mlp(), tiny.mlp()
    regraft.apply(model, {"Linear": "mixout(p=0.3)"})
    regraft.load_plan(again, regraft.save_plan(model, tmp_path))
    again.train()
    with pytest.raises(ModelError, match="mixout_weight"):
        again(torch.randn(2, 6))
    again.load_state_dict(model.state_dict())
    again(torch.randn(2, 6))
    regraft.save_plan(model, tmp_path)
    torch.save({"0.mixout_weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    fresh = tiny.mlp()
    with pytest.raises(ValueError, match="of shape"):
        regraft.load_plan(fresh, tmp_path)
    assert type(fresh[0]) is nn.Linear


def test_a_graft_is_an_instance_of_the_variant_that_it_shows():
    net = tiny.mlp()
    regraft.apply(net, {"Dropout": "gaussian", "Linear@0": "dropconnect", "after:ReLU": "dropout(p=0.3)"})
    assert isinstance(net[2], regraft.nn.GaussianDropout)
    assert isinstance(net[0], regraft.nn.DropConnectLinear)
    assert not isinstance(net[2], regraft.nn.MCDropout)
    assert "ReLU(after=Dropout(p=0.3))" in str(net)
    regraft.revert(net)
    assert not isinstance(net[2], regraft.nn.GaussianDropout)


def test_the_same_rules_again_draw_no_second_seed():
    net = tiny.mlp()
    for _ in range(2):
        regraft.apply(net, {"Dropout": "consistent"})
        seed, state = net[2].consistent_seed.clone(), torch.get_rng_state()
    regraft.apply(net, {"Dropout": "consistent"})
    assert torch.equal(net[2].consistent_seed, seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plan_without_a_file_says_so(tmp_path):
    with pytest.raises(FileError):
        regraft.load_plan(tiny.mlp(), tmp_path)

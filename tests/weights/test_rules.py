"""`"Linear"` means every matrix that multiplies, in real models: reached, or left with a true reason."""

from __future__ import annotations

import copy

import pytest
import torch
from lending import weights
from readers import Attends, Convolves, Experts, ParentReads, Recurs, TiedAutoencoder
from snapshots import assert_same, same_in_eval, snapshot
from torch import nn

import regraft
from regraft.errors import ModelError, WrongKindError

X = torch.randn(2, 5, 6)
RULE = {"Linear": "dropconnect(p=0.3)"}


def tiny(name: str, head: str = "Model", **extra):
    import transformers

    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    config = getattr(transformers, f"{name}Config")(**{**(extra if name == "XLNet" else sizes), **extra})
    return getattr(transformers, f"{name}{head}")(config)


IDS = {"input_ids": torch.randint(3, 60, (2, 8))}


def gpt2():
    return tiny("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2)


def xlnet():
    return tiny("XLNet", vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32)


def mixtral():
    return tiny("Mixtral", num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)


def mamba():
    return tiny("Mamba", state_size=4)


def falcon():
    return tiny("Falcon")


def beit():
    import timm

    return timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)


def swin():
    import timm

    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
    return timm.create_model("swinv2_tiny_window8_256", **sizes)


LEFT = {
    "it is a router: its result chooses what runs, and noise would change the choice": "router",
    "nothing used it in the probe": "idle",
}
MODELS = {
    # Builder, inputs, how many matrices multiply in each form; routers are left.
    "GPT-2": (gpt2, IDS, {"Conv1D": 8, "Linear": 1}),
    "XLNet": (xlnet, IDS, {"Linear": 14, "idle": 4}),  # those of segments, which are not given
    "Mixtral": (mixtral, IDS, {"Linear": 8, "experts": 4, "router": 2}),
    "Mamba": (mamba, IDS, {"Linear": 8}),
    "Falcon": (falcon, IDS, {"Linear": 8}),
    "BEiT": (beit, (torch.randn(1, 3, 32, 32),), {"Linear": 9}),
    "SwinV2": (swin, (torch.randn(1, 3, 64, 64),), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_model_is_reached_or_left_with_its_reason(name):
    build, inputs, wanted = MODELS[name]
    model = build()
    before, keys = snapshot(model), list(model.state_dict())
    twin = copy.deepcopy(model)
    call = (lambda one: one(**inputs)) if isinstance(inputs, dict) else (lambda one: one(*inputs))
    report = regraft.apply(model, RULE)
    counts: dict[str, int] = {}
    for line in [*report.grafted, *report.skipped]:
        kind = LEFT[line.reason] if line in report.skipped else line.op
        counts[kind] = counts.get(kind, 0) + 1
    if wanted is not None:
        assert counts == wanted
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    assert same_in_eval(model, twin, *args, **kwargs)
    assert list(model.state_dict()) == keys
    model.train()
    out = call(model)
    loss = out if isinstance(out, torch.Tensor) else out[0]
    loss.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    regraft.revert(model)
    if name not in ("BEiT",):  # it keeps what it has computed of its positions
        assert_same(before, model)


def test_a_tied_model_stays_tied_and_trains():
    model = gpt2()
    regraft.apply(model, RULE)
    assert model.lm_head.weight is model.transformer.wte.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model.lm_head.weight.detach().clone()
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, first)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_what_no_rule_selects_is_in_a_row_of_its_own():
    report = regraft.apply(nn.Sequential(Attends(), Experts()), {"in_proj": "dropconnect(p=0.3)"}, X)
    rows = [(row["name"], row["count"], row["paths"]) for row in report.to_dict()["left"]]
    assert rows == [
        ("out_proj", 1, ["0.attention.out_proj.weight"]),
        ("experts", 2, ["1.down", "1.up"]),
        ("router", 1, ["1.gate.weight"]),
    ]
    assert "a rule for 'experts'" in str(report)


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        ("Conv1d", ["down"]),
        ("ConvTranspose1d@up", ["up"]),
        (nn.Conv2d, ["image"]),
        ("Linear", ["head"]),
        ("*", ["down", "up", "image", "head"]),
    ],
    ids=str,
)
def test_convolutions_are_kinds_of_their_own(selector, paths):
    model = Convolves()
    plain = model.eval()(X)
    model.train()
    report = regraft.apply(model, {selector: "dropconnect(p=0.3)"}, X)
    assert [edit.path for edit in report.grafted] == paths
    assert not torch.equal(model(X), model(X))
    assert torch.equal(model.eval()(X), plain)


def test_the_balance_counts_what_multiplies():
    report = regraft.apply(Experts(), RULE, X)
    assert report.balance["matrices"] == {"multiply": 3, "reached": 2, "left": {"router": 1}}
    assert "3 matrices that multiply: 2 reached; left: 1 router" in str(report)


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        ("router", ["experts.gate"]),
        ("experts", ["experts.down", "experts.up"]),
        ("in_proj", ["attention.attention.in_proj_weight"]),
        ("out_proj", ["attention.attention.out_proj"]),
        ("recurrent@rnn.rnn.weight_hh_*", ["rnn.rnn.weight_hh_l0"]),
        (nn.Linear, ["attention.attention.out_proj", "read.qkv", "read.step"]),
        ("Linear@read.*", ["read.qkv", "read.step"]),
    ],
    ids=str,
)
def test_a_selector_takes_its_form(selector, paths):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.experts, self.read = Attends(), Experts(), ParentReads()
            self.rnn = Recurs(nn.LSTM)

        def forward(self, x):
            x = self.experts(self.attention(x))
            return self.read(x).sum() + self.rnn(x).sum()

    report = regraft.apply(Model(), {selector: "dropconnect(p=0.3)"}, X)
    assert [edit.path for edit in report.grafted] == paths


def test_a_plan_on_disk_lends_the_same_weights_to_another_model():
    model = nn.Sequential(Attends(), Recurs(nn.GRU))
    plan = regraft.plan(model, RULE, X)
    text = plan.to_json()
    other = nn.Sequential(Attends(), Recurs(nn.GRU))
    report = regraft.apply(other, regraft.Plan.from_json(text))
    assert [edit.path for edit in report.grafted] == [edit.path for edit in plan.grafted]
    assert not torch.equal(other(X), other(X))
    regraft.revert(other)
    assert torch.equal(other(X), other(X))


def test_a_plan_for_other_weights_is_refused():
    plan = regraft.plan(Attends(), RULE, X)
    wider = nn.Module()
    wider.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(regraft.errors.MisfitError, match="in_proj_weight"):
        regraft.apply(wider, plan)


def test_part_of_it_reverts():
    model = Attends()
    regraft.apply(model, RULE, X)
    regraft.revert(model, "out_proj")
    model.attention.in_proj_weight.requires_grad_()
    report = regraft.apply(model, {"in_proj": None, "out_proj": "dropconnect(p=0.9)"}, X)
    assert [edit.path for edit in report.grafted] == ["attention.out_proj"]
    regraft.revert(model)
    assert torch.equal(model(X), model(X))


def test_the_later_graft_takes_the_earlier_ones_place_and_twice_is_once():
    model = Attends()
    regraft.apply(model, {"in_proj": "dropconnect(p=0.9)"}, X)
    regraft.apply(model, {"in_proj": "dropconnect(p=0.1)"}, X)
    seen = regraft.inspect(model, X).sites
    assert ["dropconnect(p=0.1" in (site.variant or "") for site in seen if site.op == "in_proj"] == [True]
    with regraft.grafted(model, {"in_proj": "dropconnect(p=0.5)"}, X):
        pass
    seen = regraft.inspect(model, X).sites
    assert ["dropconnect(p=0.1" in (site.variant or "") for site in seen if site.op == "in_proj"] == [True]


def test_a_variant_that_cannot_act_on_a_form_is_skipped_and_an_error_where_it_fits_none():
    model = nn.Sequential(Attends(), nn.Linear(6, 6))
    report = regraft.apply(model, {"Linear": "standout"}, X)
    assert [edit.path for edit in report.grafted] == ["1"]
    assert all("acts in a linear layer's own forward" in skip.reason for skip in report.skipped)
    with pytest.raises(WrongKindError):
        regraft.apply(Attends(), {"Linear": "standout"}, X)
    report = regraft.apply(Attends(), {"Linear": "dropconnect(mask='example')"}, X)
    assert "a mask for each example" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.GRU, {"num_layers": 3}),
        (nn.RNN, {"bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ],
    ids=["lstm", "gru of 3 layers", "bidirectional rnn", "projected"],
)
def test_weightdrop_drops_hidden_to_hidden_weights_once_a_sequence(kind, options):
    torch.manual_seed(0)
    seen = {}

    class Looks(kind):
        def forward(self, *args):
            seen.update((name, getattr(self, name)) for name in self._flat_weights_names)
            return super().forward(*args)

    model, plain = Recurs(Looks, **options), Recurs(kind, **options)
    report = regraft.apply(model, {"Linear": "weightdrop(p=0.5)"}, X)
    hidden = [name for name, _ in model.rnn.named_parameters() if name.startswith("weight_hh")]
    assert [edit.path for edit in report.grafted] == [f"rnn.{name}" for name in hidden]
    assert {skip.reason for skip in report.skipped} == {"it is no hidden-to-hidden matrix"}
    model(X).square().sum().backward()
    for name, parameter in model.rnn.named_parameters():
        kept = (seen[name] / parameter).detach()
        assert set(kept.unique().tolist()) == ({0.0, 2.0} if name in hidden else {1.0})
        dropped = parameter.grad[kept == 0]
        assert dropped.numel() == 0 or (dropped == 0).all()  # one mask for all steps
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(X), plain.eval()(X))
    other = Recurs(kind, **options)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), other.eval()(X))


def test_dropconnect_samples_in_eval_where_it_is_asked_to():
    model = nn.Sequential(Attends(), nn.Linear(6, 3)).eval()
    regraft.apply(model, {"Linear": "dropconnect(p=0.3, eval='sample')"}, X)
    assert not torch.equal(model(X), model(X))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1).eval()
    regraft.apply(encoder, {"in_proj": "dropconnect(p=0.3, eval='sample')"}, X)
    with torch.no_grad():
        assert not torch.equal(encoder(X), encoder(X))


def test_gaussian_noise_on_weights_has_the_variance_of_the_rate():
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, bias=False).double()
    regraft.apply(layer, {"Linear": "dropconnect(p=0.2, noise='gaussian')"}, torch.ones(1, 1).double())
    runs = torch.cat([layer(torch.ones(1, 1).double()) for _ in range(20_000)]) / layer.weight.detach()
    assert abs(runs.mean() - 1) < 5 * 0.5 / 20_000**0.5
    assert abs(runs.var() - 0.25) < 5 * 0.25 * (2 / 20_000) ** 0.5


def test_mixout_lends_a_mixture_and_keeps_what_it_began_with():
    model = ParentReads()
    report = regraft.apply(model, {"Linear": "mixout(p=0.5)"}, X)
    assert torch.equal(model(X), model.eval()(X))  # nothing has moved yet
    assert len(report.state_keys) == 2
    assert set(report.state_keys) <= set(model.state_dict())
    model.train()
    with torch.no_grad():
        model.qkv.weight.add_(1.0)
    assert not torch.equal(model(X), model(X))
    regraft.revert(model)
    assert list(model.state_dict()) == list(ParentReads().state_dict())


def test_a_schedule_moves_the_rate_of_lent_weights():
    model = Attends()
    regraft.apply(model, RULE, X)
    plain = copy.deepcopy(model)
    regraft.revert(plain)
    schedule = regraft.schedule(model, p={"start": 0.0, "end": 0.5, "steps": 2}, inputs=X)
    assert torch.equal(model(X), plain(X))
    schedule.step(), schedule.step()
    assert not torch.equal(model(X), plain(X))


def test_peft_base_and_adapters_are_selected_apart():
    peft = pytest.importorskip("peft")
    base = tiny("Llama", "ForCausalLM", num_key_value_heads=1)
    config = peft.LoraConfig(
        target_modules=["q_proj"], use_dora=True, r=2, lora_dropout=0.1, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    wanted = model.eval()(**IDS).logits
    model.train()
    report = regraft.apply(model, {"Linear@**.base_layer": "dropconnect(p=0.3)"})
    assert len(report.grafted) == 2
    assert {edit.kind for edit in report.grafted} == {"weight"}  # called and read: one draw for both
    report = regraft.apply(model, {"Linear@**.lora_A.**": "dropconnect(p=0.3)"})
    assert len(report.grafted) == 2
    assert torch.equal(model.eval()(**IDS).logits, wanted)
    regraft.revert(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_one_draw_serves_a_weight_that_is_called_and_read():
    model = TiedAutoencoder()
    report = regraft.apply(model, RULE, X)
    assert [(edit.path, edit.kind) for edit in report.grafted] == [("encode", "weight")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_layer_is_skipped_by_name():
    ao = torch.ao.quantization
    packed = ao.quantize_dynamic(nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 4)), {nn.Linear, nn.LSTM})
    fake = nn.Sequential(nn.Linear(4, 4))
    fake.qconfig = ao.get_default_qat_qconfig("fbgemm")
    ao.prepare_qat(fake, inplace=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.fake, self.plain = packed, fake, nn.Linear(4, 2)

        def forward(self, x):
            return self.plain(self.fake(self.packed(x)[0]))

    report = regraft.apply(Model(), RULE, X)
    assert [edit.path for edit in report.grafted] == ["plain"]
    assert [(skip.path, skip.op) for skip in report.skipped] == [
        ("packed.0", "Linear"),
        ("packed.1", "Linear"),
        ("fake.0", "Linear"),
    ]
    assert all("is quantized" in skip.reason for skip in report.skipped)


class Packed(torch.Tensor):
    """A weight that knows a product and nothing else, as quantized tensors do."""

    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.weight = weight.detach().half()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].weight.float(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].weight)
        raise NotImplementedError(func)


class Doubles(nn.Linear):
    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("build", [nn.Linear, Doubles], ids=["module", "lent"])
def test_quantized_after_a_graft_it_evaluates_and_says_what_to_do_in_training(build):
    model = nn.Sequential(build(6, 4))
    regraft.apply(model, RULE, X)
    model[0].weight = nn.Parameter(Packed(model[0].weight), requires_grad=False)
    model.eval()(X)
    with pytest.raises(ModelError, match="type Packed(.|\n)*revert before quantizing"):
        model.train()(X)
    regraft.revert(model)
    model.train()(X)


def test_a_traced_model_and_its_eager_twin_have_the_same_balance():
    eager = nn.Sequential(ParentReads(), nn.Linear(4, 6), TiedAutoencoder())
    traced = torch.fx.symbolic_trace(eager)
    balances = [regraft.apply(one, RULE, X).balance["matrices"] for one in (eager, traced)]
    assert balances == [{"multiply": 4, "reached": 4, "left": {}}] * 2
    assert len(weights(regraft.revert(traced), X)) == len(weights(regraft.revert(eager), X))


def test_without_a_probe_the_report_says_that_weights_may_be_unseen():
    report = regraft.apply(nn.Sequential(Attends(), nn.Linear(6, 6)), RULE)
    assert "only by the probe, which did not run" in report.notes[-1]

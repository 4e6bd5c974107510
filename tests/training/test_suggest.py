"""Advice: for which model what is suggested, and that it can be done."""

import pytest
import tiny
import torch
from torch import nn

import regraft
from regraft.errors import OptionError


def timm_model(name, **options):
    import timm

    return timm.create_model(name, **options)


def sequence():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(50, 8), nn.LSTM(8, 8, 2), nn.Linear(8, 50)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0])

    return Net()


def network():
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))


CASES = {
    "bert": (
        lambda: tiny.bert(p=0.0), 100, "text encoder",
        {"Dropout": "dropout(p=0.1)"}, ["rdrop(model, alpha=1)"],
    ),
    "bert with rates": (tiny.bert, 1001, "text encoder", {}, ["rdrop(model, alpha=1)"]),
    "bert with rates, few labels": (
        tiny.bert, 100, "text encoder", {"Dropout": "dropout(p=0.3)"}, ["rdrop(model, alpha=2)"],
    ),
    "bart": (tiny.bart, 100, "sequence-to-sequence model", {}, ["rdrop(model, alpha=5)"]),
    "llama": (
        lambda: tiny.llama(0.0), 100, "causal language model",
        {"Embedding@model.embed_tokens": "neftune(alpha=5.0)"}, ["rdrop(model, alpha=1)"],
    ),
    "vit": (
        lambda: timm_model("vit_small_patch16_224"), 50_000, "vision transformer",
        {"after:Identity@**.drop_path*": "droppath(p=0.05)"}, ["rdrop(model, alpha=0.6)"],
    ),
    "vit with drop-paths": (
        lambda: timm_model("vit_small_patch16_224", drop_path_rate=0.1), 50_000, "vision transformer",
        {}, ["rdrop(model, alpha=0.6)"],
    ),
    "convnext": (
        lambda: timm_model("convnext_tiny", drop_path_rate=0.0), 10_000, "convolutional network",
        {"after:Identity@**.drop_path*": "droppath(p=0.1)", "before:Linear@head.fc": "dropout(p=0.2)"}, [],
    ),
    "resnet": (
        lambda: timm_model("resnet10t"), 1000, "convolutional network",
        {"before:Linear@fc": "dropout(p=0.2)", "after:re:layer[34]": "dropblock(p=0.1, block_size=7)"}, [],
    ),
    "recurrent": (
        sequence, 10, "recurrent network",
        {"after:LSTM@rnn": "spatial(p=0.4)", "LSTM": "dropout(p=0.3)", "after:Embedding": "spatial(p=0.4)"}, [],
    ),
    "feed-forward": (
        network, 20, "feed-forward network",
        {"after:ReLU": "dropout(p=0.5)", "before:Sequential": "dropout(p=0.2)"}, ["max_norm(model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "examples", "kind", "rules", "code"), CASES.values(), ids=CASES)
def test_what_is_suggested_can_be_done(build, examples, kind, rules, code):
    torch.manual_seed(0)
    model = build()
    before = repr(model)
    advice = regraft.suggest(model, examples)
    assert repr(model) == before, "advice is never applied"
    assert (advice.kind, advice.rules) == (kind, rules)
    lines = [one.code for one in advice.advice if one.code]
    assert len(lines) == len(code)
    assert all(wanted in line for wanted, line in zip(code, lines, strict=True))
    assert all(one.source[-4:].strip() and one.reason for one in advice.advice)
    rdrop = next((at for at, one in enumerate(advice.advice) if "rdrop" in (one.code or "")), 99)
    rate = next((at for at, one in enumerate(advice.advice) if one.rule and "drop" in one.rule[1]), -1)
    assert rate < rdrop, "a rate first, then R-Drop"
    if rules:
        report = regraft.apply(model, advice)
        assert {edit.rule for edit in report.grafted} == set(range(len(rules)))


FIRST = {
    "bert": (tiny.bert, "regraft.rdrop(model, alpha=1)"),
    "bert at rate 0": (lambda: tiny.bert(p=0.0), 'regraft.apply(model, {"Dropout": "dropout(p=0.1)"})'),
    "llama at rate 0": (
        lambda: tiny.llama(0.0),
        'regraft.apply(model, {"Embedding@model.embed_tokens": "neftune(alpha=5.0)"})',
    ),
    "vit": (tiny.vit, 'regraft.apply(model, {"after:Identity@**.drop_path*": "droppath(p=0.05)"})'),
    "mlp at rate 0": (lambda: tiny.mlp(0.0), 'regraft.apply(model, {"Dropout": "dropout(p=0.5)"})'),
    "mlp": (tiny.mlp, ""),
    "frozen": (lambda: network().requires_grad_(False), ""),
    "network": (
        network,
        'regraft.apply(model, {"after:ReLU": "dropout(p=0.5)", "before:Sequential": "dropout(p=0.2)"})',
    ),
}


@pytest.mark.parametrize(("build", "line"), FIRST.values(), ids=FIRST)
def test_an_inspection_says_first_what_would_be_suggested_first(build, line):
    torch.manual_seed(0)
    model = build()
    summary = regraft.inspect(model).to_dict()["summary"]
    assert summary["paste"] == line
    for selector, variant in summary["rules"]:
        assert regraft.apply(model, {selector: variant}).grafted
    if summary["rules"]:
        assert regraft.inspect(model).to_dict()["summary"]["paste"] == "regraft.revert(model)"


def test_with_few_labels_the_frozen_layers_of_a_text_encoder_do_not_drop():
    model = tiny.bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    advice = regraft.suggest(model, 200)
    off = {"Dropout@bert.embeddings.**": "off", "Dropout@bert.encoder.layer.0.**": "off"}
    assert advice.rules == {"Dropout": "dropout(p=0.3)"} | off
    report = regraft.apply(model, advice)
    still = {edit.path for edit in report.grafted if edit.variant != "off"}
    assert still
    assert not any(path.startswith(("bert.embeddings", "bert.encoder.layer.0")) for path in still)


def test_a_model_that_is_small_for_its_data_is_warned_of_dropout():
    model = network()
    large, small = regraft.suggest(model, 10), regraft.suggest(model, 1000)
    assert "after:ReLU" in large.rules
    assert small.rules == {}
    assert "small for its data" in small.notes[0]
    assert "Liu et al. 2023" in small.notes[0]
    assert [one.code for one in small.advice] == [
        'regraft.schedule(model, p={"start": 0.1, "end": 0.0, "steps": total // 6})'
    ]
    assert not any("small for its data" in note for note in large.notes)


def test_only_what_trains_is_counted():
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    assert regraft.suggest(model, 10).parameters == 64 * 4 + 4


def test_rates_out_of_the_range_and_rates_of_0_are_said():
    assert "0.6 is above the range of 0.2 to 0.5" in regraft.suggest(tiny.mlp(0.6), 1).notes[0]
    assert "every rate is 0" in regraft.suggest(tiny.bert(p=0.0), 1).notes[0]


def test_mixout_is_for_large_models_with_few_examples(monkeypatch):
    from regraft.find import advice as texts

    monkeypatch.setattr(texts, "_LARGE_MODEL", 1000)
    advice = regraft.suggest(tiny.bert(), 1_001)
    assert advice.rules == {"Linear": "mixout(p=0.9)"}
    assert regraft.suggest(tiny.bert(), 20_000).rules == {}


def test_dropkey_is_for_lora():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny.llama(0.0), config)
    advice = regraft.suggest(model, 100)
    assert advice["scaled_dot_product_attention"] == "dropkey(p=0.1)"
    report = regraft.apply(model, advice)
    assert {edit.variant for edit in report.grafted} == {"dropkey", "neftune"}


def test_all_views_say_the_same():
    advice = regraft.suggest(tiny.llama(0.0), 500)
    facts = advice.to_dict()
    assert (facts["schema"], facts["view"], facts["examples"]) == (1, "advice", 500)
    assert facts["advice"][0].keys() == {"rule", "code", "reason", "source"}
    for text in (str(advice), advice.to_markdown(), advice.to_html(), advice.to_json()):
        assert "neftune" in text
        assert "Jain et al. 2024" in text
        assert "500" in text
    assert "Nothing that has been published" in str(regraft.suggest(tiny.mlp(0.3), 1))


@pytest.mark.parametrize("examples", [0, -1, 2.5, True, "many"])
def test_a_number_of_examples_is_asked_for(examples):
    with pytest.raises(OptionError, match="no number of examples"):
        regraft.suggest(network(), examples)

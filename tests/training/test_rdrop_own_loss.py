"""What a model's own loss is, is shown and not guessed: cases in which a first batch would mislead."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import LossError
from regraft.training.rdrop.state import state_of
from tests.training.models import bert, tokens
from tests.training.test_rdrop import gpt2, small


class Language(nn.Module):
    """A causal or a copying language model with dropout, and a loss of choice."""

    def __init__(self, loss, *, zero_head=False, p=0.2):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(11, 16), nn.Dropout(p), nn.Linear(16, 11)
        self.loss = loss
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.drop(self.embedding(input_ids)))
        loss = None if labels is None else self.loss(self, logits, labels)
        return {"loss": loss, "logits": logits}


def shifted(_, logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].flatten())


def aligned(_, logits, labels):
    return F.cross_entropy(logits.reshape(-1, 11), labels.flatten())


def weighted(_, logits, labels):
    weight = torch.ones(11)
    weight[3] = 0.1
    return F.cross_entropy(logits.reshape(-1, 11), labels.flatten(), weight=weight)


def smoothed(_, logits, labels):
    return F.cross_entropy(logits.reshape(-1, 11), labels.flatten(), label_smoothing=0.1)


def weighted_and_shifted(_, logits, labels):
    weight = torch.linspace(0.1, 3.0, 11)
    return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].flatten(), weight=weight)


def summed(_, logits, labels):
    return F.cross_entropy(logits.reshape(-1, 11), labels.flatten(), reduction="sum") / 7


def with_penalty(model, logits, labels):
    return aligned(model, logits, labels) + 1e-3 * model.head.weight.square().sum()


IDS = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(0))
LOSSES = {
    "shifted": (shifted, True, True),
    "aligned": (aligned, True, False),
    "weighted": (weighted, False, False),
    "smoothed": (smoothed, False, False),
    "weighted and shifted": (weighted_and_shifted, False, True),
    "summed": (summed, False, False),
    "with a penalty": (with_penalty, False, False),
}


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("constant", [False, True], ids=["labels", "labels all alike"])
@pytest.mark.parametrize("name", LOSSES)
def test_plain_and_shift_are_shown(name, constant, zero_head):
    loss, plain, shift = LOSSES[name]
    model = Language(loss, zero_head=zero_head).train()
    if name == "with a penalty" and zero_head:
        nn.init.ones_(model.head.bias)
        model.loss = lambda m, logits, labels: aligned(m, logits, labels) + 1e-3 * m.head.bias.sum()
    # Labels of one class: whatever a weight is, it is the same for all; labels as they are and shifted agree.
    labels = torch.full_like(IDS, 5) if constant else IDS
    regraft.rdrop(model, alpha=0.5, strategy="loop", inputs={"input_ids": IDS})
    torch.manual_seed(1)
    outputs = model(IDS, labels=labels)
    state = state_of(model)
    assert (state.own.plain, state.own.shift) == (plain, shift), state.own.why
    torch.manual_seed(1)
    drop, head = model.drop, model.head
    logits = [head(drop(model.embedding(IDS))) for _ in range(2)]
    task = sum(model.loss(model, each, labels) for each in logits) / 2
    kept = [each[:, :-1] if shift else each for each in logits]
    log_p, log_q = (each.log_softmax(-1) for each in kept)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2
    torch.testing.assert_close(outputs["loss"], task + 0.5 * kl)
    outputs["loss"].backward()


def test_it_changes_nothing_to_look():
    model = Language(weighted).train()
    regraft.rdrop(model, inputs={"input_ids": IDS})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    first = model(IDS, labels=IDS)["loss"]
    torch.manual_seed(1)
    second = model(IDS, labels=IDS)["loss"]  # without a look
    assert first.item() == second.item()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_changes_later_is_noticed():
    model = Language(lambda m, logits, labels: aligned(m, logits, labels) + m.penalty).train()
    model.penalty = 0.0
    regraft.rdrop(model, inputs={"input_ids": IDS})
    model(IDS, labels=IDS)
    assert state_of(model).own.plain
    model.penalty = 4.0
    with pytest.raises(LossError, match="no longer the plain loss of its logits"):
        for _ in range(100):
            model(IDS, labels=IDS)
    regraft.rdrop(model, loss="loss", inputs={"input_ids": IDS})
    assert model(IDS, labels=IDS)["loss"] > 4


def test_labels_that_show_nothing_wait_for_others():
    model = Language(shifted).train()
    regraft.rdrop(model, inputs={"input_ids": IDS})
    assert model(IDS, labels=torch.full_like(IDS, -100))["loss"].isnan()  # as the model's own is
    assert state_of(model).own is None
    model(IDS, labels=IDS)
    assert state_of(model).own.plain


def test_a_loss_without_logits_asks_for_the_shift():
    class Fused(Language):
        def forward(self, input_ids, labels=None):
            hidden = self.drop(self.embedding(input_ids))
            loss = None if labels is None else shifted(self, self.head(hidden), labels)
            return {"loss": loss, "logits": self.head(hidden)}

    model = Fused(None).train()
    regraft.rdrop(model, inputs={"input_ids": IDS})
    with pytest.raises(LossError, match="say shift=True"):
        model(IDS, labels=IDS)
    regraft.rdrop(model, shift=True, inputs={"input_ids": IDS})
    assert model(IDS, labels=IDS)["loss"].isfinite()
    assert state_of(model).own.shift


@pytest.mark.parametrize("loss", [weighted, with_penalty, smoothed])
def test_smoothing_of_another_loss_is_refused(loss):
    model = Language(loss).train()
    regraft.rdrop(model, label_smoothing=0.1, inputs={"input_ids": IDS})
    with pytest.raises(LossError, match="label_smoothing is of the plain cross-entropy"):
        model(IDS, labels=IDS)


def test_names_decide_nothing():
    """A head that shifts and is named as one that does not, and the other way round."""

    class TinyForCausalLM(Language):
        pass

    class TinyForTokenClassification(Language):
        pass

    for cls, loss, shift in ((TinyForCausalLM, weighted, False), (TinyForTokenClassification, shifted, True)):
        model = regraft.rdrop(cls(loss).train(), inputs={"input_ids": IDS})
        model(IDS, labels=IDS)
        assert state_of(model).own.shift == shift


@pytest.mark.parametrize("loss", [weighted, with_penalty, shifted, summed])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("passes", [2, 3])
def test_the_models_cross_entropy_of_large_logits_is_taken_in_chunks(monkeypatch, loss, dtype, passes):
    """The same loss and the same gradients; what it saves is measured by `benchmarks/passes.py`."""
    results = []
    for size in (2**22, 30):
        monkeypatch.setattr("regraft.training.rdrop.rdrop_loss.CHUNK_ELEMENTS", size)
        torch.manual_seed(0)
        model = Language(lambda m, logits, labels: loss(m, logits.float(), labels)).to(dtype).train()
        options = {"alpha": 0.7, "loss": "loss", "strategy": "loop", "shift": loss is shifted}
        regraft.rdrop(model, passes=passes, inputs={"input_ids": IDS}, **options)
        labels = IDS.masked_fill(IDS % 3 == 0, -100)
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(1)
            outputs = model(IDS, labels=labels)
            outputs["loss"].backward()
        results.append([outputs["loss"].detach(), *(p.grad for p in model.parameters())])
        logits, outputs = weakref.ref(outputs["logits"]), None
        assert logits() is None, "no cycle holds a step's logits"
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    assert results[0][1].abs().sum() > 0


def compiled_twice(model, **batch):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(**batch).loss.backward()
    return compiled


@pytest.mark.slow
def test_compiled_it_learns_before_the_first_trace():
    model = gpt2().train()
    regraft.rdrop(model)
    compiled = compiled_twice(model, input_ids=tokens(), labels=tokens())
    assert state_of(model).own.shift
    explanation = torch._dynamo.explain(compiled._orig_mod)(input_ids=tokens(), labels=tokens())
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()
    model = bert().train()
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1, 0, 1])}
    regraft.rdrop(model, inputs=batch)
    assert state_of(model).own.plain
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole(**batch).loss.backward()
    assert state_of(model).terms.kl > 0
    torch._dynamo.reset()


def test_compiled_whole_without_knowing_is_refused():
    model = bert().train()
    regraft.rdrop(model)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="_learn_outside|own loss"):
        whole(input_ids=tokens(), labels=torch.tensor([0, 1, 0, 1]))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_sequence_to_sequence(name):
    sizes = {
        "T5ForConditionalGeneration": {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "BartForConditionalGeneration": {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    }[name]
    model = small(name, **sizes).train()
    labels = tokens(4, 6).masked_fill(tokens(4, 6) % 5 == 0, -100)
    plain = model.eval()(input_ids=tokens(), labels=labels).loss
    regraft.rdrop(model.train(), alpha=5.0, label_smoothing=0.1)
    outputs = model(input_ids=tokens(), labels=labels)
    assert state_of(model).own.plain, state_of(model).own.why
    assert not state_of(model).own.shift
    assert state_of(model).terms.kl > 0
    outputs.loss.backward()
    assert torch.equal(model.eval()(input_ids=tokens(), labels=labels).loss, plain)

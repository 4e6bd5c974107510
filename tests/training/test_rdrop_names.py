"""Outputs and labels by other names, and the errors that say what to write."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import LossError, ModelError
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.state import state_of
from tests.training.models import bert, images, tokens, vit
from tests.training.test_rdrop import gpt2, small

Y = torch.tensor([0, 1, 0, 1])


class NanoGPT(nn.Module):
    """As in nanoGPT: a tuple of logits and loss, labels called targets and already shifted, -1 ignored, and
    without targets the logits of the last position alone."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(11, 16), nn.Dropout(0.2), nn.Linear(16, 11)

    def forward(self, idx, targets=None):
        x = self.drop(self.embedding(idx))
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, 11), targets.view(-1), ignore_index=-1)


@pytest.mark.parametrize("by", ["position", "name"])
def test_nanogpt(by):
    torch.manual_seed(0)
    model, x = NanoGPT().train(), torch.randint(0, 11, (4, 9))
    idx, targets = x[:, :-1], x[:, 1:].clone()
    targets[:, 5:] = -1
    regraft.rdrop(
        model,
        alpha=0.5,
        logits=0,
        loss=1,
        labels=1 if by == "position" else "targets",
        ignore_index=-1,
        strategy="loop",
        inputs=(idx,),
    )
    torch.manual_seed(1)
    logits, loss = model(idx, targets)  # nanoGPT's own loop
    regraft.revert(model)
    torch.manual_seed(1)
    (first, one), (second, two) = model(idx, targets), model(idx, targets)
    p, q = (each[:, :5].log_softmax(-1) for each in (first, second))
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    torch.testing.assert_close(loss, (one + two) / 2 + 0.5 * kl)
    assert torch.equal(logits, first)


def test_without_naming_the_loss_it_is_not_computed_twice():
    model, x = NanoGPT().train(), torch.randint(0, 11, (4, 9))
    regraft.rdrop(model, logits=0, loss=1, labels="targets", inputs=(x,))
    model(x, x)
    assert not state_of(model).own.plain


@pytest.mark.parametrize("cut_off", [False, True])
def test_question_answering(cut_off):
    model = small("BertForQuestionAnswering").train()
    names = ("start_positions", "end_positions")
    start, end = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 3, 4, 20 if cut_off else 5])
    batch = {"input_ids": tokens(), "start_positions": start, "end_positions": end}
    regraft.rdrop(model, alpha=0.5, logits=("start_logits", "end_logits"), labels=names, strategy="loop")
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    regraft.revert(model)
    torch.manual_seed(1)
    first, second = model(**batch), model(**batch)

    def kl(name, rows):
        p, q = (each[name][:rows].log_softmax(-1) for each in (first, second))
        return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2

    apart = (kl("start_logits", 4) + kl("end_logits", 3 if cut_off else 4)) / 2
    torch.testing.assert_close(loss, (first.loss + second.loss) / 2 + 0.5 * apart)


def test_labels_by_position():
    model = regraft.rdrop(NanoGPT(), labels="targets", logits=0, loss=1, inputs=(tokens() % 11,)).train()
    for call in (lambda x: model(x, x), lambda x: model(x, targets=x), lambda x: model(idx=x, targets=x)):
        call(tokens() % 11)[1].backward()
        assert state_of(model).terms.kl > 0


def test_errors_say_what_to_write():
    model = regraft.rdrop(vit(drop_rate=0.3), criterion=F.cross_entropy).train()
    with pytest.raises(LossError, match=r"loss, logits = model\(x, labels=y\)"):
        model(images(), Y)
    with pytest.raises(LossError, match=r"model\(x, labels=y\)"):
        model(images())
    with pytest.raises(ModelError, match=r"criterion = regraft.rdrop_criterion\(model, criterion\)"):
        regraft.rdrop(vit(drop_rate=0.3))
    with pytest.raises(ModelError, match=r"labels=\('start_positions', 'end_positions'\)"):
        regraft.rdrop(small("BertForQuestionAnswering"))
    first, second = torch.randn(2, 4, 3)
    with pytest.raises(LossError, match=r"rdrop_loss\(torch.stack\(\[first, second\]\), labels\)"):
        regraft.rdrop_loss(first, second, Y)


def test_a_forward_like_trls_raises_at_the_call():
    """TRL binds a forward on the instance that takes labels for itself and does not call the model's."""
    model = gpt2()

    def patch(model):
        original = model.forward

        @functools.wraps(type(model).forward)
        def fused(self, *args, fused_lm_head=False, labels=None, **kwargs):
            if not fused_lm_head:
                return original(*args, labels=labels, **kwargs)
            hidden = self.transformer(*args, **kwargs).last_hidden_state
            return self.lm_head(hidden).mean()

        model.forward = types.MethodType(fused, model)

    regraft.rdrop(model)
    patch(model)
    model.train()
    with pytest.raises(ModelError, match=r"did not reach it[\s\S]*compute_loss_func=regraft.rdrop_criterion"):
        model(input_ids=tokens(), labels=tokens(), fused_lm_head=True)
    assert model(input_ids=tokens(), labels=tokens()).loss.isfinite()  # that way it does
    with torch.no_grad():
        model(input_ids=tokens(), labels=tokens(), fused_lm_head=True)
    regraft.revert(model)
    assert model(input_ids=tokens(), labels=tokens(), fused_lm_head=True).isfinite()


def test_under_peft():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query"], lora_dropout=0.1, task_type="SEQ_CLS")
    model = regraft.rdrop(get_peft_model(bert(), config)).train()
    loss = model(input_ids=tokens(), labels=Y).loss
    loss.backward()
    assert state_of(model).terms.kl > 0
    inner = get_peft_model(regraft.rdrop(bert()), config).train()
    inner(input_ids=tokens(), labels=Y).loss.backward()
    assert state_of(inner.get_base_model()).terms.kl > 0


def test_semi_supervised_in_trainer(tmp_path):
    from tests.training.test_rdrop import trainer_of

    model = regraft.rdrop(small("BertForTokenClassification", num_labels=3), consistency="all")
    trainer = trainer_of(model, tmp_path)
    trainer.train_dataset = [
        {"input_ids": row, "labels": row % 3 if i % 2 else torch.full_like(row, -100)}
        for i, row in enumerate(tokens(8))
    ]
    trainer.train()
    assert state_of(model).terms.kl > 0
    batch = {"input_ids": tokens(4), "labels": torch.full((4, 8), -100)}
    batch["labels"][0] = 1
    regraft.rdrop(model.train(), consistency="all", alpha=0.5, strategy="loop")
    state_of(model).own = None
    model(**batch)
    torch.manual_seed(1)
    loss = model(**batch).loss
    regraft.revert(model)
    torch.manual_seed(1)
    first, second = model(**batch), model(**batch)
    p, q = (each.logits.log_softmax(-1) for each in (first, second))
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    torch.testing.assert_close(loss, (first.loss + second.loss) / 2 + 0.5 * kl)


def test_options_go_to_json_and_back():
    import json

    options = RDropOptions(alpha=0.5, logits=("a", 1), labels=("b", "c"), ce="sum", shift=True, chunk=1)
    values = json.loads(json.dumps(options.to_dict()))
    assert RDropOptions.from_dict(values) == options
    assert RDropOptions().to_dict() == {}
    with_criterion = RDropOptions(criterion=F.cross_entropy)
    assert json.loads(json.dumps(with_criterion.to_dict())) == {"criterion": "cross_entropy"}
    with pytest.raises(LossError, match="which a file cannot hold"):
        RDropOptions.from_dict(with_criterion.to_dict())
    assert RDropOptions.from_dict(with_criterion.to_dict(), F.cross_entropy) == with_criterion
    with pytest.raises(LossError, match="did you mean 'alpha'"):
        RDropOptions.from_dict({"alhpa": 1.0})


def test_passes_that_part_late():
    model = bert().train()
    with pytest.raises(LookupError, match="names no module"):
        regraft.rdrop(model, fork="bert.encoder.layer.9")
    assert "_regraft" not in vars(model)
    kls = []
    for fork in (None, "bert.encoder.layer.1"):
        regraft.rdrop(model, fork=fork)
        torch.manual_seed(0)
        loss = model(input_ids=tokens(), labels=Y).loss
        loss.backward()
        kls.append(state_of(model).terms.kl.item())
    assert kls[0] > kls[1] > 0
    regraft.rdrop(model, fork="classifier")
    with pytest.raises(ModelError, match="no draw behind it"):
        model(input_ids=tokens(), labels=Y)
    regraft.revert(model)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)
    ).train()
    criterion = regraft.rdrop_criterion(net, F.cross_entropy, fork="2", inputs=torch.randn(4, 4))
    criterion(net(torch.randn(4, 4)), Y).backward()
    assert criterion.terms.kl > 0
    late = regraft.mc_predict(model, 200, input_ids=tokens(), fork="bert.encoder.layer.1").variance.mean()
    assert 0 < late < regraft.mc_predict(model, 200, input_ids=tokens()).variance.mean()

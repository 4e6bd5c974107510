"""`regraft.mc_predict` and `regraft.multisample_loss`."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import LossError
from tests.training.models import bert, headed_bert, images, tokens, vit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_the_definition():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 6)
    found = regraft.mc_predict(model, 40, x, strategy="loop", chunk=7)
    torch.manual_seed(0)
    x2 = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3), torch.randn(4, 6)  # the same draws again
    assert torch.equal(x2[2], x)
    hidden = F.relu(model[0](x))
    p = torch.stack([model[3](F.dropout(hidden, 0.5)).softmax(-1) for _ in range(40)])
    torch.testing.assert_close(found.mean, p.mean(0))
    torch.testing.assert_close(found.variance, p.var(0, unbiased=False))
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.mutual_information, entropy + (p * p.log()).sum(-1).mean(0))
    assert found.n == 40


def test_multi_label_and_regression():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 6)
    labels = regraft.mc_predict(model, 10, x, task="multilabel")
    assert labels.entropy.shape == labels.mutual_information.shape == (4, 3)
    assert labels.entropy.max() <= math.log(2)
    assert (labels.mutual_information > 0).any()
    values = regraft.mc_predict(model, 2000, x, task="regression")
    assert values.entropy is None
    assert values.mutual_information is None
    # By hand: dropout at 1/2 leaves the mean and gives each product the variance of itself squared.
    torch.testing.assert_close(values.mean, model(x), rtol=0, atol=0.2)
    torch.testing.assert_close(values.variance, x.square() @ model[1].weight.square().T, rtol=0.15, atol=0.01)


@pytest.mark.parametrize("model", [bert(), headed_bert(), vit(attn_drop_rate=0.3, drop_rate=0.1)])
def test_the_model_is_as_before(model):
    inputs = {"x": images()} if hasattr(model, "patch_embed") else {"input_ids": tokens(), "labels": None}
    model.train()
    part = next(iter(model.children()))
    part.eval()
    flags = [one.training for one in model.modules()]
    classes = [type(one) for one in model.modules()]
    found = regraft.mc_predict(model, 5, **inputs)
    assert found.variance.max() > 0
    assert found.mutual_information.min() >= 0
    assert [one.training for one in model.modules()] == flags
    assert [type(one) for one in model.modules()] == classes

    def fail(*_):
        raise IndexError

    part.register_forward_pre_hook(fail)
    with pytest.raises(IndexError):
        regraft.mc_predict(model, 5, **inputs)
    assert [type(one) for one in model.modules()] == classes
    assert [one.training for one in model.modules()] == flags


def test_batch_norm_is_in_eval():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    regraft.mc_predict(model, 4, torch.randn(8, 6))
    assert model[1].num_batches_tracked == 0


def test_the_prefix_runs_once_and_chunks_bound_the_rest():
    model, rows = headed_bert().eval(), []
    model.bert.embeddings.word_embeddings.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    regraft.mc_predict(model, 32, input_ids=tokens())
    rows.clear()
    regraft.mc_predict(model, 32, input_ids=tokens())
    assert rows == [4]
    rows.clear()
    regraft.mc_predict(model, 32, input_ids=tokens(), chunk=10, strategy="batch")
    assert rows[-4:] == [40, 40, 40, 8]


def test_passes_of_a_small_model_go_together_and_of_a_large_one_by_themselves():
    model, rows = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 512), nn.Dropout(0.5)), []
    small, large = torch.randn(4, 512), torch.randn(4, 512).expand(8192, 4, 512)
    regraft.mc_predict(model, 2, small)  # what is looked at once, at the first call
    model[1].register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // 512))
    regraft.mc_predict(model, 20, small)
    assert rows == [80]
    rows.clear()
    regraft.mc_predict(model, 2, large.flatten(0, 1))  # 17 Gflop, known from the small one
    assert rows == [32768, 32768]


def test_one_pass_is_one_forward_of_the_model():
    model = headed_bert().train()
    torch.manual_seed(3)
    expected = model(**(batch := {"input_ids": tokens()})).logits
    torch.manual_seed(3)
    assert torch.equal(regraft.stochastic_passes(model, 1, **batch).logits, expected[None])
    with torch.no_grad():
        torch.manual_seed(3)
        one, two = model(**batch).logits, model(**batch).logits
        torch.manual_seed(3)
        chunked = regraft.stochastic_passes(model, 2, **batch, chunk=1).logits
    assert torch.equal(chunked, torch.stack((one, two)))


def test_no_noise_is_said_and_a_grafted_model_is_taken_as_it_is():
    dry = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.warns(UserWarning, match="so all passes are equal"):
        assert regraft.mc_predict(dry, 3, input_ids=tokens()).variance.max() == 0
    assert regraft.mc_predict(dry, 3, rules={"Dropout": "mc(p=0.3)"}, input_ids=tokens()).variance.max() > 0
    regraft.apply(dry, {"Dropout": "mc(p=0.3)"})
    assert regraft.mc_predict(dry, 3, rules={}, input_ids=tokens()).variance.max() > 0
    with pytest.raises(LossError, match="did you mean 'regression'"):
        regraft.mc_predict(dry, 3, task="regresion", input_ids=tokens())


def test_a_bar_is_shown_when_asked_for(capsys):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    regraft.mc_predict(model, 4, torch.randn(2, 6), chunk=1, progress=True)
    regraft.mc_predict(model, 4, torch.randn(2, 6), chunk=1)
    shown = capsys.readouterr()
    assert shown.out == ""


def test_multi_sample_loss_is_the_mean_of_the_samples_losses():
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    loss = regraft.multisample_loss(model, lambda logits: F.cross_entropy(logits, y), 5, x, strategy="loop")
    torch.manual_seed(1)
    each = [F.cross_entropy(model(x), y) for _ in range(5)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()
    assert model[0].weight.grad is not None
    with pytest.raises(LossError, match="no single number"):
        regraft.multisample_loss(model, lambda logits: logits, 2, x)


@pytest.mark.parametrize("dropout", [False, True], ids=["alone", "beside a dropout"])
def test_what_is_inserted_drops_in_the_call_and_not_afterwards(dropout):
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5) if dropout else nn.ReLU(), nn.Linear(64, 3)).eval()
    x = torch.randn(2, 4)
    plain = net(x)
    regraft.apply(net, {"before:Linear@0": "gaussian(p=0.3)"})
    without = {"Dropout": "mc"} if dropout else {}
    alone = regraft.mc_predict(net, 400, x, rules=without, task="regression").variance
    both = regraft.mc_predict(net, 400, x, task="regression")
    assert (both.variance > alone + 1e-4).all()
    assert (both.mean - plain).abs().max() < 6 * both.variance.max().sqrt() / 20
    assert torch.equal(net(x), plain)


def test_an_insertion_in_a_graph_drops_in_the_call():
    graph = regraft.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval())
    x = torch.randn(2, 4)
    plain = graph(x)
    regraft.apply(graph, {"after:ReLU": "dropout(p=0.5)"}, inputs=x)
    assert (regraft.mc_predict(graph, 50, x).variance > 1e-5).all()
    assert torch.equal(graph(x), plain)

"""`regraft.mc_predict` and `regraft.multisample_loss`."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import LossError, RateError
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
    torch.testing.assert_close(found.variance, p.var(0))
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
    with pytest.warns(UserWarning, match="all passes of BertForSequenceClassification are equal"):
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
    alone = regraft.mc_predict(net, 400, x, task="regression").variance if dropout else torch.zeros(2, 3)
    regraft.apply(net, {"before:Linear@0": "gaussian(p=0.3)"})
    both = regraft.mc_predict(net, 400, x, task="regression")
    assert (both.variance > alone + 1e-4).all()
    assert (both.mean - plain).abs().max() < 6 * both.variance.max().sqrt() / 20
    assert torch.equal(net(x), plain)


class Calls(nn.Module):
    """Functional dropouts of every kind."""

    def __init__(self, function, p):
        super().__init__()
        self.function, self.p, self.head = function, p, nn.Conv1d(4, 3, 1)

    def forward(self, x):
        return self.head(self.function(x, self.p, self.training)).mean(-1)


KINDS = {
    "Dropout": nn.Dropout(0.4),
    "Dropout1d": nn.Dropout1d(0.4),
    "AlphaDropout": nn.AlphaDropout(0.4),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.4),
    "dropout": F.dropout,
    "dropout1d": F.dropout1d,
    "alpha_dropout": F.alpha_dropout,
    "feature_alpha_dropout": F.feature_alpha_dropout,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_dropout_has_its_own_law(name):
    drop = KINDS[name]
    if isinstance(drop, nn.Module):
        model = nn.Sequential(drop, nn.Conv1d(4, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    else:
        model = Calls(drop, 0.4).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    found = regraft.mc_predict(model.eval(), 4000, x, task="regression").variance
    model.train()
    by_hand = torch.stack([model(x) for _ in range(4000)]).var(0)
    assert (found / by_hand - 1).abs().max() < 0.15
    assert not any(regraft.mc_predict(model.eval(), 2, x).variance.isnan().flatten())


def test_channels_and_weights_that_regraft_grafted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Dropout(0.3), nn.Linear(64, 3)).double().eval()
    x, plain = torch.randn(2, 6, dtype=torch.float64), None
    plain = model(x)
    for rules in ({"Dropout": "gaussian"}, {"Linear@3": "dropconnect(p=0.5)", "Dropout": "off"}):
        for temporary in (False, True):
            if not temporary:
                regraft.apply(model, rules)
            options = {"rules": rules} if temporary else {}
            found = regraft.mc_predict(model, 4000, x, task="regression", **options).variance
            if temporary:
                regraft.apply(model, rules)
            model.train()
            by_hand = torch.stack([model(x) for _ in range(4000)]).var(0)
            regraft.revert(model.eval())
            assert (found / by_hand - 1).abs().max() < 0.15
            assert torch.equal(model(x), plain)


def test_attention_recurrence_and_the_fast_path():
    x = torch.randn(2, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    models = [
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.LSTM(8, 4, num_layers=2, dropout=0.5, batch_first=True),
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5),
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5, attn_implementation="eager"),
    ]
    for model in models:
        bert_like = hasattr(model, "bert")
        given = {"input_ids": tokens()} if bert_like else {}
        args = () if bert_like else (x,)
        key = 0 if isinstance(model, nn.LSTM) else None
        found = regraft.mc_predict(model.eval(), 300, *args, task="regression", output=key, **given)
        model.train()
        with torch.no_grad():
            every = [model(*args, **given) for _ in range(300)]
        every = [each.logits if bert_like else each[0] if key == 0 else each for each in every]
        by_hand = torch.stack(every).var(0)
        assert (found.variance.mean() / by_hand.mean() - 1).abs() < 0.2


def test_drop_paths_when_asked_for():
    model = vit(drop_path_rate=0.5).eval()
    with pytest.warns(UserWarning, match="droppath=True"):
        assert regraft.mc_predict(model, 4, images()).variance.max() < 1e-12
    assert regraft.mc_predict(model, 4, images(), droppath=True).variance.max() > 1e-8


def test_rates_that_change_between_calls_are_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.a, self.b = 0.1, nn.Linear(8, 3), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.0, batch_first=True)

        def forward(self, x, head="a"):
            x = self.attention(x, x, x)[0].mean(1) if head == "b" else x.mean(1)
            return (self.a(F.dropout(x, self.rate, self.training))) if head == "a" else self.b(x)

    net, x = Net().eval(), torch.randn(2, 5, 8)
    small = regraft.mc_predict(net, 500, x).variance.mean()
    net.rate = 0.6
    assert regraft.mc_predict(net, 500, x).variance.mean() > 5 * small
    with pytest.warns(UserWarning, match="are equal"):
        regraft.mc_predict(net, 5, x, head="b")
    net.attention.dropout = 0.5
    assert regraft.mc_predict(net, 5, x, head="b").variance.max() > 1e-8


def test_segmentation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout2d(0.4), nn.Conv2d(8, 5, 1)).eval()
    x = images(size=8)
    with pytest.raises(LossError, match="class_axis=1"):
        regraft.mc_predict(model, 2, x)
    found = regraft.mc_predict(model, 30, x, class_axis=1, strategy="loop", chunk=7, samples=True)
    assert found.mean.shape == (4, 5, 8, 8)
    assert found.entropy.shape == (4, 8, 8)
    assert found.samples.shape == (30, 4, 5, 8, 8)
    torch.testing.assert_close(found.mean.sum(1), torch.ones(4, 8, 8))
    torch.testing.assert_close(found.samples.var(0), found.variance)
    p = found.mean
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(1))
    apart = found.entropy + (found.samples * found.samples.log()).sum(2).mean(0)
    torch.testing.assert_close(found.mutual_information, apart.clamp(min=0), rtol=1e-3, atol=1e-6)


def test_segmentation_of_libraries_and_depth():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large as lraspp
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    config = SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=7, classifier_dropout_prob=0.3)
    model = SegformerForSemanticSegmentation(config)
    found = regraft.mc_predict(model, 3, pixel_values=images(2, 64))
    assert found.entropy.shape == (2, 16, 16)
    net = lraspp(weights=None, weights_backbone=None, num_classes=6)
    found = regraft.mc_predict(
        net, 2, images(2, 64), rules={"before:Conv2d@classifier.low_classifier": "dropout(p=0.3)"}
    )
    assert found.entropy.shape == (2, 64, 64)


def test_heads_that_are_no_classes():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1))
    x = torch.randn(4, 6)
    with pytest.raises(LossError, match='task="binary"'):
        regraft.mc_predict(model, 5, x)
    assert regraft.mc_predict(model, 5, x, task="binary").entropy.shape == (4, 1)
    flat = nn.Sequential(*model, nn.Flatten(0))
    with pytest.raises(LossError, match='task="binary"'):
        regraft.mc_predict(flat, 5, x)
    assert regraft.mc_predict(flat, 5, x, task="regression").mean.shape == (4,)

    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))

        def forward(self, x):
            return {"predicted_depth": self.net(x), "scale": x.mean(), "mask": x > 0}

    with pytest.raises(LossError, match="output='predicted_depth'"):
        regraft.mc_predict(Depth(), 5, x, task="regression")
    found = regraft.mc_predict(Depth(), 5, x, task="regression", output="predicted_depth")
    assert found.mean.shape == (4, 3)


def test_one_pass_has_no_variance():
    for n in (0, 1, 2.5, True):
        with pytest.raises(RateError, match="no variance"):
            regraft.mc_predict(bert(), n, input_ids=tokens())


def test_over_a_data_set(capsys):
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    x, y = torch.randn(10, 6), torch.zeros(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    found = regraft.mc_predict(model, 2000, batches=loader, samples=True, progress=True)
    assert found.mean.shape == (10, 3)
    assert found.entropy.shape == (10,)
    assert found.samples.shape == (2000, 10, 3)
    whole = regraft.mc_predict(model, 2000, x)
    assert (found.mean - whole.mean).abs().max() < 6 * (whole.variance.max() / 1000).sqrt()
    assert all(module.training for module in model.modules())
    assert capsys.readouterr().out == ""
    rows = [{"input_ids": tokens(2), "labels": torch.zeros(2).long()} for _ in range(3)]
    assert regraft.mc_predict(bert(), 3, batches=rows).mean.shape == (6, 2)
    with pytest.raises(LossError, match="no batches"):
        regraft.mc_predict(model, 3, batches=[])


def test_an_insertion_in_a_graph_drops_in_the_call():
    graph = regraft.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval())
    x = torch.randn(2, 4)
    plain = graph(x)
    regraft.apply(graph, {"after:ReLU": "dropout(p=0.5)"}, inputs=x)
    assert (regraft.mc_predict(graph, 50, x).variance > 1e-5).all()
    assert torch.equal(graph(x), plain)


@pytest.mark.parametrize("strategy", ["shared", "loop"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_passes_in_chunks_have_the_common_part_of_a_fork_in_common(strategy, chunk):
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.01)).eval()
    settings = {"fork": "2", "strategy": strategy, "chunk": chunk, "task": "regression", "samples": True}
    dropped = [regraft.mc_predict(model, 8, torch.ones(4, 64), **settings).samples == 0 for _ in range(2)]
    for each in dropped:
        assert 0.35 < each.all(0).float().mean() < 0.65  # of independent passes it would be 1 in 256
    assert not torch.equal(dropped[0].all(0), dropped[1].all(0))

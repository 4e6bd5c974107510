"""`regraft.rdrop_criterion`: the loop `loss = criterion(model(x), y)` stays as it is and trains with R-Drop."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import LossError, ModelError
from tests.training.models import bert, images, tokens, vit

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 1, 0])


def net(p=0.4, out=4):
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(p), nn.Linear(16, out)).train()


def by_hand(model, loss, kl, alpha=0.7, seed=3, x=X):
    torch.manual_seed(seed)
    first, second = model(x), model(x)
    return (loss(first) + loss(second)) / 2 + alpha * kl(first, second)


def categorical(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def bernoulli(p, q):
    return ((p.sigmoid() - q.sigmoid()) * (p - q)).mean() / 2


def squares(p, q):
    return F.mse_loss(p, q)


MULTI = torch.randint(0, 2, (6, 4), generator=torch.Generator().manual_seed(0)).float()
VALUES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
MIXED = VALUES.softmax(-1)
CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), Y, categorical),
    "weighted and smoothed": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 1.0]), label_smoothing=0.2),
        Y,
        categorical,
    ),
    "function": (F.cross_entropy, Y, categorical),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), Y, categorical),
    "soft targets": (nn.CrossEntropyLoss(), MIXED, categorical),
    "binary": (nn.BCEWithLogitsLoss(), MULTI, bernoulli),
    "binary function": (F.binary_cross_entropy_with_logits, MULTI, bernoulli),
    "l1": (nn.L1Loss(), VALUES, squares),
    "huber partial": (functools.partial(F.huber_loss, delta=0.5), VALUES, squares),
    "mse": (nn.MSELoss(), VALUES, squares),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_loss_by_hand(name):
    loss, labels, kl = CRITERIA[name]
    model = net()
    expected = by_hand(model, lambda logits: loss(logits, labels), kl)
    plain = model.eval()(X)
    criterion = regraft.rdrop_criterion(model.train(), loss, alpha=0.7, strategy="loop", inputs=X)
    torch.manual_seed(3)
    outputs = model(X)
    assert type(outputs) is torch.Tensor
    assert outputs.shape == (6, 4)
    found = criterion(outputs, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.eval()(X), plain)
    torch.testing.assert_close(criterion(model(X), labels), loss(plain, labels))
    assert set(criterion.state_dict()) <= {"criterion.weight"}


def test_probabilities_are_not_taken_as_logits():
    model = nn.Sequential(*net(), nn.Sigmoid()).train()

    def kl(p, q):
        total = sum((a * (a / b).log()) for a, b in ((p, q), (q, p), (1 - p, 1 - q), (1 - q, 1 - p)))
        return total.mean() / 2

    for loss in (nn.BCELoss(), F.binary_cross_entropy):
        regraft.revert(model)
        expected = by_hand(model, lambda p, loss=loss: loss(p, MULTI), kl)
        criterion = regraft.rdrop_criterion(model, loss, alpha=0.7, strategy="loop", inputs=X)
        torch.manual_seed(3)
        torch.testing.assert_close(criterion(model(X), MULTI), expected, rtol=1e-4, atol=1e-5)


def test_log_probabilities():
    model = nn.Sequential(*net(), nn.LogSoftmax(-1)).train()
    expected = by_hand(model, lambda logits: F.nll_loss(logits, Y), categorical)
    criterion = regraft.rdrop_criterion(model, nn.NLLLoss(), alpha=0.7, strategy="loop", inputs=X)
    torch.manual_seed(3)
    torch.testing.assert_close(criterion(model(X), Y), expected)


@pytest.mark.parametrize("ignored", [-100, 2])
def test_padding_and_the_class_axis_are_read(ignored):
    """(batch, classes, time) with as many classes as steps: the softmax is over axis 1."""
    model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Dropout(0.4)).train()
    x = torch.randn(3, 4, 5)
    y = torch.randint(0, 5, (3, 5))
    y[:, 3:] = ignored
    kept = y != ignored

    def kl(p, q):
        p, q = (each.movedim(1, -1)[kept] for each in (p, q))
        return categorical(p, q)

    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    expected = by_hand(model, lambda logits: loss(logits, y), kl, x=x)
    criterion = regraft.rdrop_criterion(model, loss, alpha=0.7, strategy="loop", inputs=x)
    torch.manual_seed(3)
    torch.testing.assert_close(criterion(model(x), y), expected)


def test_an_unknown_criterion_is_asked_for():
    def mine(outputs, y):
        return F.cross_entropy(outputs, y)

    class Weighted(nn.CrossEntropyLoss):
        def forward(self, outputs, y):
            return 2 * super().forward(outputs, y)

    model = net()
    for loss in (mine, Weighted()):
        with pytest.raises(LossError, match=r'say task="classification"'):
            regraft.rdrop_criterion(model, loss, inputs=X)
        assert "_regraft" not in vars(model)
        expected = by_hand(model, lambda logits, loss=loss: loss(logits, Y), categorical)
        criterion = regraft.rdrop_criterion(
            model, loss, alpha=0.7, task="classification", strategy="loop", inputs=X
        )
        torch.manual_seed(3)
        torch.testing.assert_close(criterion(model(X), Y), expected)
        regraft.revert(model)
    dense = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.4)).train()
    criterion = regraft.rdrop_criterion(dense, mine, task="classification", inputs=images())
    with pytest.raises(LossError, match="class_axis=1"):
        criterion(dense(images()), torch.zeros(4, 32, 32, dtype=torch.long))


def test_timms_criteria_with_mixup():
    from timm.data.mixup import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    model = vit(drop_rate=0.3).train()
    x, soft = Mixup(mixup_alpha=0.8, num_classes=5)(images(), torch.tensor([0, 1, 2, 3]))
    for loss, y in (
        (SoftTargetCrossEntropy(), soft),
        (LabelSmoothingCrossEntropy(), torch.tensor([0, 1, 2, 3])),
    ):
        regraft.revert(model)
        expected = by_hand(model, lambda logits, loss=loss, y=y: loss(logits, y), categorical, x=x)
        criterion = regraft.rdrop_criterion(model, loss, alpha=0.7, strategy="loop")
        torch.manual_seed(3)
        torch.testing.assert_close(criterion(model(x), y), expected)


def test_outputs_may_be_reshaped_and_cast_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.4), nn.Linear(16, 4)).train()
    x, y = torch.randn(2, 3, 8), torch.randint(0, 4, (2, 3))
    expected = by_hand(
        model, lambda logits: F.cross_entropy(logits.view(-1, 4), y.flatten()), categorical, x=x
    )
    criterion = regraft.rdrop_criterion(model, F.cross_entropy, alpha=0.7, strategy="loop", inputs=x)
    for change in (
        lambda out: out.view(-1, 4),
        lambda out: out.float().reshape(6, 4),
        lambda out: out.flatten(0, 1).double(),
        lambda out: out.unsqueeze(0).squeeze(0).view(6, 4),
    ):
        torch.manual_seed(3)
        loss = criterion(change(model(x)), y.view(-1))
        torch.testing.assert_close(loss.float(), expected)
    for change in (
        lambda out: out.log_softmax(-1).view(-1, 4),
        lambda out: 2 * out.view(-1, 4),
        lambda out: out[:, :1].reshape(-1, 4),
        lambda out: out.transpose(0, 1).reshape(-1, 4),
    ):
        with pytest.raises(LossError, match="something else than the model returned"):
            criterion(change(model(x)), y.view(-1))


def test_passes_are_fetched_once():
    model = net()
    criterion = regraft.rdrop_criterion(model, F.cross_entropy, inputs=X)
    model(X)
    with pytest.raises(LossError, match="never fetched"):
        model(X)
    outputs = model(X)
    criterion(outputs, Y).backward()
    with pytest.raises(LossError, match="no passes to fetch"):
        criterion(outputs, Y)
    with torch.no_grad():  # a forward that trains nothing, between the two
        outputs = model(X)
        torch.testing.assert_close(criterion(outputs, Y), F.cross_entropy(outputs, Y))
    outputs = model(X)
    torch.testing.assert_close(criterion(outputs.detach(), Y), F.cross_entropy(outputs, Y).detach())
    criterion(outputs, Y)
    regraft.revert(model)
    with pytest.raises(LossError, match="no longer grafted"):
        criterion(model(X), Y)
    torch.testing.assert_close(criterion.criterion(model.eval()(X), Y), criterion(model(X), Y))


def test_a_forward_that_is_bypassed_raises():
    model = net()
    criterion = regraft.rdrop_criterion(model, F.cross_entropy, inputs=X)
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with pytest.raises(ModelError, match="did not reach it"):
        criterion(model(X), Y)
    with torch.no_grad():
        model(X)
    model.eval()(X)


def test_copies_and_pickles_while_passes_are_kept():
    model = net()
    criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), inputs=X)
    outputs = model(X)
    for both in (copy.deepcopy((model, criterion)), pickle.loads(pickle.dumps((model, criterion)))):
        other, its = both
        loss = its(other(X), Y)
        loss.backward()
        assert its.terms.kl > 0
    criterion(outputs, Y).backward()


def test_two_moves_per_step():
    """At alpha 0 and without noise, a step is a plain step."""
    model = net(p=0.0)
    plain = F.cross_entropy(model(X), Y)
    plain.backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    criterion = regraft.rdrop_criterion(model, F.cross_entropy, alpha=0, inputs=X)
    loss = criterion(model(X), Y)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)


def test_semi_supervised():
    model = net()
    y = Y.clone()
    y[3:] = -100
    expected = by_hand(model, lambda logits: F.cross_entropy(logits[:3], y[:3]), categorical)
    criterion = regraft.rdrop_criterion(
        model, F.cross_entropy, alpha=0.7, consistency="all", strategy="loop", inputs=X
    )
    torch.manual_seed(3)
    torch.testing.assert_close(criterion(model(X), y), expected)


@pytest.mark.parametrize("unused", [False, True], ids=["", "find_unused_parameters"])
def test_under_ddp(tmp_path, unused):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = net()
        reference = copy.deepcopy(model)
        expected = by_hand(reference, lambda logits: F.cross_entropy(logits, Y), categorical)
        expected.backward()
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
        criterion = regraft.rdrop_criterion(
            wrapped, nn.CrossEntropyLoss(), alpha=0.7, strategy="loop", inputs=X
        )
        torch.manual_seed(3)
        loss = criterion(wrapped(X), Y)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_under_fsdp2(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = net()
        reference = copy.deepcopy(model)
        by_hand(reference, lambda logits: F.cross_entropy(logits, Y), categorical).backward()
        criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), alpha=0.7, inputs=X)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        torch.manual_seed(3)
        criterion(model(X), Y).backward()
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad)
    finally:
        dist.destroy_process_group()


def test_compiled():
    model = net()
    criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), alpha=0.7, inputs=X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        model.zero_grad()
        loss = criterion(compiled(X), Y)
        loss.backward()
        assert criterion.terms.kl > 0
        assert all(p.grad is not None for p in model.parameters())
    step = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager")
    step(X, Y).backward()
    torch._dynamo.reset()


def test_data_parallel_is_refused():
    with pytest.raises(ModelError, match="DistributedDataParallel"):
        regraft.rdrop_criterion(nn.DataParallel(net()), F.cross_entropy)


def test_what_no_criterion_is():
    with pytest.raises(LossError, match="not a function of outputs and labels"):
        regraft.rdrop_criterion(net(), torch.ones(()))
    criterion = regraft.rdrop_criterion(model := net(), nn.CrossEntropyLoss(reduction="none"), inputs=X)
    with pytest.raises(LossError, match="no single number"):
        criterion(model(X), Y)


def test_trainers_loss_function(tmp_path):
    from tests.training.test_rdrop import trainer_of

    def smoothed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)

    model = bert()
    criterion = regraft.rdrop_criterion(model, smoothed, task="classification")
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.compute_loss_func = criterion
    trainer.train()
    assert criterion.terms.kl > 0
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3


def test_lightning(tmp_path):
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net()
            self.criterion = regraft.rdrop_criterion(self.model, nn.CrossEntropyLoss(), inputs=X)

        def training_step(self, batch, _):
            return self.criterion(self.model(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("loss", self.criterion(self.model(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module, loader = Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 3)
    assert len(list(module.parameters())) == 4
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, loader, loader)
    assert module.criterion.terms.kl > 0


def test_accelerates_mixed_precision():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = net()
    criterion = regraft.rdrop_criterion(model, nn.CrossEntropyLoss(), inputs=X)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    for _ in range(2):
        loss = criterion(model(X), Y)
        accelerator.backward(loss)
        optimizer.step()
        assert criterion.terms.kl > 0
    AcceleratorState._reset_state()


def test_token_batches_of_a_language_model():
    """TRL's `compute_loss_func` is called so: with the model's outputs, and labels that are not shifted."""
    from tests.training.test_rdrop import gpt2

    model = gpt2().train()

    def causal(outputs, labels, num_items_in_batch=None):
        return model.loss_function(
            outputs.logits, labels, vocab_size=99, num_items_in_batch=num_items_in_batch
        )

    criterion = regraft.rdrop_criterion(model, causal, task="classification", class_axis=-1, shift=True)
    labels = tokens().masked_fill(tokens() % 3 == 0, -100)
    items = (labels[:, 1:] != -100).sum()
    criterion(model(input_ids=tokens()), labels, num_items_in_batch=items).backward()
    counted = criterion.terms
    criterion(model(input_ids=tokens()), labels, num_items_in_batch=2 * items).backward()
    assert criterion.terms.kl < 0.8 * counted.kl


class WordLanguageModel(nn.Module):
    """As in pytorch/examples: time first, log-probabilities of all positions in one row, and the hidden state."""

    def __init__(self):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(11, 16)
        self.rnn, self.decoder = nn.LSTM(16, 16, 2, dropout=0.2), nn.Linear(16, 11)

    def forward(self, x, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(x)), hidden)
        return self.decoder(self.drop(output)).view(-1, 11).log_softmax(-1), hidden


def test_the_loop_of_word_language_model():
    torch.manual_seed(0)
    model = WordLanguageModel().train()
    text = torch.randint(0, 11, (7, 4))
    data, targets = text[:-1], text[1:].reshape(-1)
    hidden = start = (torch.zeros(2, 4, 16), torch.zeros(2, 4, 16))
    criterion = regraft.rdrop_criterion(model, nn.NLLLoss(), alpha=0.7)
    for _ in range(2):  # the lines of its loop
        hidden = tuple(each.detach() for each in hidden)
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()
    assert hidden[0].shape == (2, 4, 16)
    criterion = regraft.rdrop_criterion(model, nn.NLLLoss(), alpha=0.7, strategy="loop")
    torch.manual_seed(3)
    loss = criterion(model(data, start)[0], targets)
    regraft.revert(model)
    torch.manual_seed(3)
    p, q = (model(data, start)[0] for _ in range(2))
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    task = (F.nll_loss(p, targets) + F.nll_loss(q, targets)) / 2
    torch.testing.assert_close(loss, task + 0.7 * kl)

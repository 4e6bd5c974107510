"""Trainers and averages of weights, on grafted models: each cell of docs/compatibility.md is a real run."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

import regraft

pytestmark = pytest.mark.slow
RULES = {"Dropout": "gaussian(p=0.2)", "Linear@classifier": "dropconnect(p=0.1)"}


def grafted_types(model):
    return sorted(site.variant for site in regraft.inspect(model).sites if site.variant)


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


ROWS = [{"input_ids": [3 + i, 4, 5, 6], "labels": i % 2} for i in range(8)]


def arguments(folder, **options):
    from transformers import TrainingArguments

    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    return TrainingArguments(str(folder), per_device_train_batch_size=4, **{**settings, **options})


def test_trainer_resumes_where_it_was(tmp_path):
    """The last two of four steps, run again from the checkpoint, give the same weights: the noise is the same."""
    from transformers import Trainer

    def model():
        torch.manual_seed(0)
        made = tiny.bert(layers=1)
        regraft.apply(made, RULES)
        return made

    whole, half, again = model(), model(), model()
    options = {"save_strategy": "steps", "save_steps": 2}
    Trainer(whole, arguments(tmp_path / "whole", max_steps=4), train_dataset=ROWS).train()
    trainer = Trainer(half, arguments(tmp_path / "half", max_steps=4, **options), train_dataset=ROWS)
    trainer.train()
    Trainer(again, arguments(tmp_path / "half", max_steps=4, **options), train_dataset=ROWS).train(
        resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2")
    )
    same_weights(whole, half)
    same_weights(whole, again)
    assert grafted_types(again) == grafted_types(whole)


def test_trainer_loads_the_best_model_at_the_end(tmp_path):
    from transformers import Trainer

    model = tiny.bert(layers=1)
    regraft.apply(model, RULES)
    variants = grafted_types(model)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=4, load_best_model_at_end=True, **options),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    trainer.train()
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    same_weights(best, trainer.model)
    assert grafted_types(trainer.model) == variants
    regraft.revert(model)
    same_weights(best, model)


def lightning_module():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = tiny.mlp(0.4)

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return lightning, Module()


def test_lightning_trains_saves_and_resumes(tmp_path):
    lightning, module = lightning_module()
    rules = {"Dropout": "gaussian", "Linear": "dropconnect(p=0.3)"}
    regraft.apply(module.net, rules)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 6)), 4)
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, **options)
    before = copy.deepcopy(module.net.state_dict())
    trainer.fit(module, data)
    assert any(not torch.equal(before[name], value) for name, value in module.net.state_dict().items())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, again = lightning_module()
    lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **options).fit(
        again, data, ckpt_path=tmp_path / "last.ckpt"
    )  # the checkpoint of a grafted model is a plain one's
    assert list(again.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("order", ["grafted before", "grafted after"])
def test_timms_average_of_weights(order):
    from timm.utils import ModelEmaV3

    model = tiny.vit(0.3)
    x = tiny.images(2)
    if order == "grafted before":
        regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"})
    average = ModelEmaV3(model, decay=0.5)
    if order == "grafted after":
        regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"})
    expected = copy.deepcopy(average.module.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    average.update(model)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name].lerp(model.state_dict()[name], 0.5))
    plain = regraft.revert(average.module).eval()
    assert torch.isfinite(plain(x)).all()
    assert bool(grafted_types(model))


@pytest.mark.parametrize("order", ["grafted before", "grafted after"])
def test_stochastic_weight_averaging(order):
    from torch.optim.swa_utils import AveragedModel, update_bn

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    rules = {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}
    if order == "grafted before":
        regraft.apply(model, rules)
    average = AveragedModel(model)
    if order == "grafted after":
        regraft.apply(model, rules)
    first, second = copy.deepcopy(model.state_dict()), None
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.randn(16, 6)).square().mean().backward()
    optimizer.step()
    second = model.state_dict()
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, (first["0.weight"] + second["0.weight"]) / 2)
    update_bn([torch.randn(16, 6)], average)
    regraft.revert(average.module)
    assert type(average.module[2]) is nn.Dropout
    assert average.eval()(torch.randn(2, 6)).isfinite().all()


@pytest.mark.parametrize("order", ["grafted before", "grafted after"])
def test_peft(order, tmp_path):
    """An adapter trains, is saved alone, and is merged into what a plain model gives."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["query", "value"])
    model = tiny.bert(layers=1)
    rules = {"Dropout": "gaussian(p=0.2)", "Linear@**.output.dense": "dropconnect(p=0.1)"}
    if order == "grafted before":
        regraft.apply(model, rules)
    model = peft.get_peft_model(model, config)
    if order == "grafted after":
        report = regraft.apply(model, rules)
        assert any("lora_dropout" in edit.path for edit in report.grafted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        model.train()(**tiny.tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(**tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    merged = regraft.revert(model.merge_and_unload()).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**tiny.tokens()).logits, expected, atol=1e-5, rtol=1e-4)
    assert grafted_types(merged) == []


def test_trl_prefers(tmp_path):
    """DPO on a grafted model: both models' noise is the policy's own."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    tokenizer = _tokenizer(PreTrainedTokenizerFast)
    model = tiny.llama(0.2)
    regraft.apply(model, {"Dropout": "gaussian(p=0.2)", "Linear@**.mlp.**": "dropconnect(p=0.1)"})
    variants = grafted_types(model)
    rows = {"prompt": ["a b", "c d"], "chosen": [" e f", " g"], "rejected": [" h", " a"]}
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "logging_steps": 1}
    trainer = DPOTrainer(
        model,
        ref_model=regraft.revert(copy.deepcopy(model)),
        args=DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, **settings),
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable.from_pydict(rows), fingerprint="rows"),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert grafted_types(trainer.model) == variants


def _tokenizer(cls):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_sentence_transformers_encodes_and_trains():
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules as parts

    width = 12
    model = library.SentenceTransformer(
        modules=[parts.BoW([*"abcdefgh"]), parts.Dense(8, width), parts.Dropout(0.3)], device="cpu"
    )
    texts = ["a b c", "d e f"]
    expected = model.encode(texts)
    report = regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.2)"})
    assert len(report.grafted) == 2
    assert (model.encode(texts) == expected).all()
    features = model.preprocess(texts) if hasattr(model, "preprocess") else model.tokenize(texts)
    model.train()
    first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert not torch.equal(first, second)
    first.square().mean().backward()
    assert regraft.revert(model)[1].linear.weight.grad.abs().sum() > 0

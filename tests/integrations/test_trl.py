"""TRL's `SFTTrainer` computes its loss in a head of its own or from logits: R-Drop trains by it, or says why not.

Runs where trl and datasets are installed.
"""

import pytest
import torch
from torch.nn import functional as F

import regraft
from regraft.errors import ModelError
from regraft.integrations.transformers import RDropCallback
from tests.training.test_rdrop import gpt2

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def trainer_of(model, folder, callbacks=(), **options):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(11)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
    rows = [(torch.arange(8) * step % 11).tolist() for step in range(1, 9)]
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        **options.pop("arguments", {}),
    )
    table = datasets.table.InMemoryTable.from_pydict({"input_ids": rows, "labels": rows})
    data = datasets.Dataset(table, fingerprint="rows")
    return trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks), **options
    )


def logged(trainer, *keys):
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_callback_trains_with_the_loss_of_trl(tmp_path, smoothing):
    logs = []
    options = {"arguments": {"label_smoothing_factor": smoothing}}
    for callbacks in ([], [RDropCallback(alpha=1.0)]):
        torch.manual_seed(0)
        model = gpt2()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the passes are equal, and a step is a plain one
        trainer = trainer_of(model, tmp_path, callbacks, **options)
        trainer.train()
        logs.append(logged(trainer, "loss", "grad_norm"))
    assert len(logs[0]) == 3
    assert logs[0] == [pytest.approx(entry, rel=1e-3) for entry in logs[1]]
    trainer = trainer_of(gpt2(), tmp_path, [RDropCallback(alpha=1.0)], **options)
    trainer.train()
    for loss, task, kl in logged(trainer, "loss", "task_loss", "kl"):
        assert kl > 0
        assert loss == pytest.approx(task + kl, rel=1e-2)


def test_with_lora(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.2, task_type="CAUSAL_LM")
    trainer = trainer_of(gpt2(), tmp_path, [RDropCallback()], peft_config=config)
    trainer.train()
    assert all(kl > 0 for (kl,) in logged(trainer, "kl"))


def test_a_criterion_as_its_loss(tmp_path):
    model = gpt2()

    def causal(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    criterion = regraft.rdrop_criterion(model, causal, task="classification", class_axis=-1, shift=True)
    trainer = trainer_of(model, tmp_path, compute_loss_func=criterion)
    trainer.train()
    assert criterion.terms.kl > 0


def test_a_loss_in_its_own_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"SFTTrainer takes callbacks=\[RDropCallback\(\)\]"):
        trainer_of(regraft.rdrop(gpt2()), tmp_path).train()
    trainer = trainer_of(gpt2(), tmp_path)
    with pytest.raises(ModelError, match="would never reach"):
        regraft.rdrop(trainer.model)
    trainer = trainer_of(gpt2(), tmp_path, [RDropCallback()], arguments={"loss_type": "dft"})
    with pytest.raises(ModelError, match="did not reach it"):
        trainer.train()

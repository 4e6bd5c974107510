"""R-Drop as a callback of Trainer and of Lightning."""

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import ModelError
from regraft.training.rdrop.state import state_of
from tests.training.models import bert, tokens, vit

Y = torch.tensor([0, 1, 0, 1])


def rows(count=8):
    return [{"input_ids": row, "labels": y} for row, y in zip(tokens(count), Y.repeat(2), strict=True)]


def trainer_of(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    from regraft.integrations.transformers import RDropCallback

    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[RDropCallback(alpha=0.5)])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_trainers_callback_logs_both_terms(tmp_path, options):
    torch.manual_seed(0)
    model = bert()
    trainer = trainer_of(model, tmp_path, **options)
    for _ in range(2):
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(entries) == 3
        for entry in entries:
            whole = entry["task_loss"] + 0.5 * entry["kl"]
            assert entry["kl"] > 0
            assert entry["loss"] == pytest.approx(whole, rel=2e-2 if "bf16" in options else 1e-3)
        assert state_of(model) is None
        assert type(model).forward is type(bert()).forward


def test_a_forward_on_the_instance_is_refused(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # one for the process, which an earlier Trainer may have made
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(bert())
    cls = type(model)
    with pytest.raises(ModelError, match="would never reach R-Drop"):
        regraft.rdrop(model)
    assert type(model) is cls
    grafted = Accelerator(mixed_precision="bf16", cpu=True).prepare(regraft.rdrop(bert()).train())
    grafted(input_ids=tokens(), labels=Y)
    assert state_of(grafted).terms.kl > 0
    regraft.rdrop(grafted, alpha=2.0)
    assert state_of(grafted).options.alpha == 2.0
    regraft.revert(grafted)
    assert grafted(input_ids=tokens(), labels=Y).loss < 1.0


def test_lightnings_callback(tmp_path):
    import lightning.pytorch as lightning

    from regraft.integrations.lightning import RDropCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = vit(drop_rate=0.3)

        def training_step(self, batch, _):
            return self.model(batch[0], labels=batch[1])[0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), Y.repeat(2))
    module = Module()
    callback = RDropCallback(alpha=0.5, criterion=nn.functional.cross_entropy)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert trainer.callback_metrics["kl"] > 0
    assert trainer.callback_metrics["task_loss"] > 1
    assert state_of(module.model) is None

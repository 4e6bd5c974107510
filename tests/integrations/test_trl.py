"""TRL's `SFTTrainer` computes its loss in a head of its own, or from logits: R-Drop trains by it, or says why not."""

import pytest
import torch

import regraft
from regraft.errors import ModelError
from regraft.integrations.transformers import RDropCallback
from regraft.training.rdrop.state import state_of

trl = pytest.importorskip("trl")


def trainer_of(model, folder, callbacks=(), rate=0.1, **options):
    import datasets

    from tests.training.models import tokens

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
    rows = [{"input_ids": row.tolist()} for row in tokens(8)]
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    data = datasets.Dataset.from_list(rows).add_column("labels", [row["input_ids"] for row in rows])
    return trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=Tokens(), callbacks=list(callbacks)
    )

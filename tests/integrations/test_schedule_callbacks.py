"""Schedules and max-norm as callbacks of Trainer."""

import pytest
import torch
from torch import nn

import regraft
from regraft.integrations.transformers import MaxNormCallback, ScheduleCallback
from tests.training.models import bert, tokens

Y = torch.tensor([0, 1, 0, 1])


def trainer_of(model, folder, callback, steps=4, **options):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": y} for row, y in zip(tokens(8), Y.repeat(2), strict=True)]
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=steps, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, **{"save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def logged(trainer):
    return [round(entry["rate"], 6) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_rates_follow_trainers_steps(tmp_path, options):
    model = bert()
    trainer = trainer_of(model, tmp_path, ScheduleCallback({"end": 0.4}, "Dropout"), **options)
    for _ in range(2):
        trainer.train()
        assert logged(trainer) == [0.0, 0.1, 0.2, 0.3]
        assert {one.p for one in model.modules() if isinstance(one, nn.Dropout)} == {0.1}
        assert not [site for site in regraft.inspect(model).sites if site.variant]


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    def callback():
        return ScheduleCallback({"end": 0.4, "steps": 4}, "Dropout")

    first = trainer_of(bert(), tmp_path, callback(), steps=2, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer_of(bert(), tmp_path, callback())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again) == [0.0, 0.1, 0.2, 0.3]


def test_grafts_keep_their_variant_and_get_their_rate_back(tmp_path):
    model = bert()
    regraft.apply(model, {"Dropout": "gaussian(p=0.3)"})
    trainer_of(model, tmp_path, ScheduleCallback({"start": "x1", "shape": "early", "steps": 2})).train()
    grafted = [site for site in regraft.inspect(model).sites if site.variant]
    assert len(grafted) == 8
    assert {site.variant[-6:] for site in grafted} == {"p=0.3)"}


def test_max_norm_holds_while_trainer_trains(tmp_path):
    model = bert()
    callback = MaxNormCallback({"Linear": "1.01x"})
    trainer = trainer_of(model, tmp_path, callback, learning_rate=0.1, bf16=True)
    with pytest.warns(UserWarning, match="the learning rate is high"):
        trainer.train()
    bounds = callback.held.state_dict()
    for path, norms in callback.held.norms().items():
        assert (norms <= bounds[path] * 1.0001).all(), path
    assert callback.held.first["over"] > 0
    assert not callback.held._handle.hooks_dict_ref()


def test_a_resumed_run_keeps_the_bounds_of_its_first_step(tmp_path):
    limits, saving = {nn.Linear: "1.05x"}, {"save_strategy": "steps", "save_steps": 2}
    callback = MaxNormCallback(limits)
    trainer_of(bert(), tmp_path, callback, steps=2, learning_rate=0.05, **saving).train()
    bounds = callback.held.state_dict()
    callback = MaxNormCallback(limits)
    again = trainer_of(bert(), tmp_path, callback, learning_rate=0.05)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    held = callback.held
    assert bounds
    for path, bound in held.state_dict().items():
        torch.testing.assert_close(bound, bounds[path])
        assert (held.norms()[path] <= bounds[path] * 1.0001).all(), path
    other = trainer_of(bert(), tmp_path, MaxNormCallback({"Linear": "1.2x"}))
    with pytest.warns(UserWarning, match="no bounds of max-norm"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_files_are_read_without_their_libraries():
    import subprocess
    import sys

    code = (
        "import sys, regraft.integrations.transformers, regraft.integrations.lightning\n"
        "print([m for m in ('transformers', 'lightning', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_callback_is_an_import_error():
    with pytest.raises(ImportError):
        exec("from regraft.integrations.transformers import RDrop")


def test_the_classes_can_be_pickled_and_are_trainers():
    import pickle

    from transformers import TrainerCallback

    made = pickle.loads(pickle.dumps(ScheduleCallback({"end": 0.4}, "Dropout")))
    assert isinstance(made, TrainerCallback)
    assert type(made) is ScheduleCallback
    assert "resumed from a checkpoint" in ScheduleCallback.__doc__


def test_lightnings_hooks_set_the_rates_and_leave_the_model_as_it_was(monkeypatch):
    """The hooks in the order in which Lightning calls them, without Lightning."""
    import importlib
    import sys
    import types

    package, module = (
        types.ModuleType("pytorch_lightning"),
        importlib.import_module("regraft.integrations.lightning"),
    )
    package.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", package)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    vars(module).pop("ScheduleCallback", None)  # made of the real Lightning by another test
    logs = []
    held = types.SimpleNamespace(model=bert(), log=lambda name, value: logs.append((name, round(value, 6))))
    trainer = types.SimpleNamespace(global_step=0, estimated_stepping_batches=4)
    callback = module.ScheduleCallback({"end": 0.4}, "Dropout")
    try:
        assert isinstance(callback, package.Callback)
        callback.setup(trainer, held, "fit")
        callback.on_train_start(trainer, held)
        for step in range(4):
            trainer.global_step = step
            callback.on_train_batch_start(trainer, held, None, step)
        assert logs == [("rate", 0.0), ("rate", 0.1), ("rate", 0.2), ("rate", 0.3)]
        callback.on_fit_end(trainer, held)
        assert not [site for site in regraft.inspect(held.model).sites if site.variant]
    finally:
        vars(module).pop("ScheduleCallback", None)

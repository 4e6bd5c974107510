"""Trainer's evaluate and predict by Monte Carlo dropout."""

import pytest
import torch

import regraft
from regraft.errors import LossError
from regraft.integrations.transformers import MonteCarloCallback, RDropCallback
from regraft.training.mc import mc_eval, without_mc
from tests.training.models import bert, tokens
from tests.training.test_rdrop import gpt2, trainer_of


def test_trainer_predicts_by_the_mean_of_the_passes(tmp_path):
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.3)
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=3)
    plain = trainer.predict(trainer.eval_dataset).predictions
    trainer.add_callback(MonteCarloCallback(400))
    trainer.callback_handler.on_init_end(trainer.args, trainer.state, trainer.control)
    found = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    expected = regraft.mc_predict(without_mc(model), 2000, input_ids=tokens(8))
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(8), atol=1e-5, rtol=0)  # log-probabilities
    error = (found.exp() - expected.mean).abs()
    assert (error < 6 * (expected.variance / 400).sqrt() + 1e-4).all()
    assert not torch.allclose(found.softmax(-1), torch.from_numpy(plain).softmax(-1), atol=1e-6)


def test_with_rdrop_beside_it(tmp_path):
    from transformers import Trainer

    model = bert()
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=3)
    callbacks = [RDropCallback(alpha=0.5), MonteCarloCallback(5)]
    trainer = Trainer(
        model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        callbacks=callbacks,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(entries) == 3
    assert all(entry["kl"] > 0 for entry in entries)
    first, second = (trainer.predict(trainer.eval_dataset).predictions for _ in range(2))
    assert abs(first - second).max() > 0  # stochastic
    regraft.revert(model)
    first, second = (trainer.predict(trainer.eval_dataset).predictions for _ in range(2))
    assert abs(first - second).max() == 0


def test_generation_is_refused_and_equal_passes_are_said():
    model = mc_eval(gpt2(), 3).eval()
    with pytest.raises(LossError, match="cannot generate"):
        model.generate(tokens(1), max_new_tokens=2)
    dry = mc_eval(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 3).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="are equal"):
        dry(input_ids=tokens())

"""`regraft.rdrop`: a model that trains with R-Drop, and is otherwise what it was."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import InputsError, LossError, ModelError, RateError
from regraft.training.rdrop.state import state_of
from tests.training.models import bert, headed_bert, images, tokens, vit

Y = torch.tensor([0, 1, 0, 1])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small(name, **options):
    import transformers

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
        **options,
    }
    config = getattr(transformers, name.partition("For")[0].removesuffix("LMHeadModel") + "Config")
    return getattr(transformers, name)(config(**settings))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    return small("GPT2LMHeadModel", **sizes)


def t5():
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return small("T5ForConditionalGeneration", **sizes)


def test_it_trains_with_the_loss_of_its_passes(monkeypatch):
    model, seen = regraft.rdrop(bert(), alpha=0.7, passes=3), []
    monkeypatch.setattr(
        "regraft.training.rdrop.state.rdrop_terms",
        lambda logits, *a, **k: (
            seen.append(logits.detach()) or regraft.training.rdrop.rdrop_loss.rdrop_terms(logits, *a, **k)
        ),
    )
    outputs = model.train()(input_ids=tokens(), labels=Y)
    assert type(outputs).__name__ == "SequenceClassifierOutput"
    assert list(outputs) == ["loss", "logits"]
    assert seen[0].shape == (3, 4, 2)
    assert torch.equal(outputs.logits, seen[0][0])
    torch.testing.assert_close(outputs.loss.detach(), regraft.rdrop_loss(seen[0], Y, 0.7))
    terms = state_of(model).terms
    torch.testing.assert_close(terms.task + 0.7 * terms.kl, outputs.loss.detach())
    assert terms.kl > 0
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_everything_else_stays():
    model = bert()
    signature, keys, names = (
        inspect.signature(model.forward),
        list(model.state_dict()),
        type(model).__qualname__,
    )
    eval_logits = model.eval()(input_ids=tokens()).logits
    regraft.rdrop(model)
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(type(model).forward).parameters.keys() == {"self", *signature.parameters}
    assert (type(model).__name__, type(model).__qualname__) == ("BertForSequenceClassification", names)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=tokens()).logits, eval_logits)
    with_labels = model(input_ids=tokens(), labels=Y)
    torch.testing.assert_close(with_labels.loss, F.cross_entropy(eval_logits, Y))
    assert not any(one.training for one in model.modules())


def test_a_tuple_stays_a_tuple_and_labels_may_be_positional():
    model = regraft.rdrop(bert()).train()
    outputs = model(input_ids=tokens(), labels=Y, return_dict=False)
    assert [type(outputs), *(one.shape for one in outputs)] == [tuple, (), (4, 2)]
    names = list(inspect.signature(model.forward).parameters)
    given = [tokens(), *[None] * (names.index("labels") - 1), Y]
    assert model(*given).loss.isfinite()
    assert state_of(model).terms.kl > 0


def test_it_stacks_with_grafts_and_is_undone():
    model = bert()
    plain = type(model)
    regraft.rdrop(model, alpha=2.0)
    regraft.apply(model, {"Dropout": "gaussian"})
    regraft.rdrop(model, alpha=0.5)
    assert state_of(model).options.alpha == 0.5
    assert type(model.bert.embeddings.dropout).__name__ == "GaussianDropout"
    model.train()(input_ids=tokens(), labels=Y)
    assert state_of(model).terms.kl > 0
    assert len(regraft.inspect(model).sites) == len(regraft.inspect(bert()).sites)
    regraft.revert(model)
    assert type(model) is plain
    assert state_of(model) is None
    assert "_regraft" not in vars(model)
    assert model(input_ids=tokens(), labels=Y).loss < 1.0


def test_copies_and_files(tmp_path):
    model = regraft.rdrop(bert()).train()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again(input_ids=tokens(), labels=Y)
        assert state_of(again).terms.kl > 0
        regraft.revert(again)
        assert state_of(again) is None
    assert state_of(model).terms is None
    model(input_ids=tokens(), labels=Y)
    assert state_of(model).terms.kl > 0
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); x = torch.ones(2, 8).long(); "
        "m(input_ids=x, labels=torch.tensor([0, 1])); "
        "from regraft.training.rdrop.state import state_of; print(bool(state_of(m).terms.kl > 0))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"


def test_save_pretrained_writes_the_plain_architecture(tmp_path):
    model = regraft.rdrop(bert()).train()
    model(input_ids=tokens(), labels=Y).loss.backward()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["BertForSequenceClassification"]
    again = type(bert()).from_pretrained(tmp_path)
    assert torch.equal(again.eval()(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).logits)
    regraft.rdrop(model, alpha=0.5, shift=False)
    regraft.apply(model, {"Dropout@dropout": "gaussian"})
    regraft.save_plan(model, tmp_path)
    assert len(regraft.load_plan(again, tmp_path).grafted) == 1
    assert state_of(again).options == state_of(model).options
    regraft.save_plan(regraft.revert(model), tmp_path)
    assert state_of(model) is None
    assert not regraft.load_plan(bert(), tmp_path).grafted


def test_a_criterion_is_asked_for_when_a_plan_is_loaded(tmp_path):
    model = vit(drop_rate=0.3)
    regraft.apply(model, {"Dropout@head_drop": "gaussian"})
    regraft.rdrop(model, alpha=0.5, criterion=F.cross_entropy)
    regraft.save_plan(model, tmp_path)
    again = vit(drop_rate=0.3)
    with pytest.raises(LossError, match="criterion=cross_entropy, which a file cannot hold"):
        regraft.load_plan(again, tmp_path)
    assert all("_regraft" not in vars(module) for module in again.modules())
    regraft.load_plan(again, tmp_path, criterion=F.cross_entropy)
    assert state_of(again).options == state_of(model).options


def test_the_criterion_outside_is_asked_for_too(tmp_path):
    model, again = vit(drop_rate=0.3), vit(drop_rate=0.3)
    regraft.apply(model, {"Dropout@head_drop": "gaussian"})
    regraft.rdrop_criterion(model, F.cross_entropy, alpha=0.5, fork=0.5)
    regraft.save_plan(model, tmp_path)
    for criterion in (None, F.cross_entropy, regraft.rdrop_criterion(model, F.cross_entropy)):
        with pytest.raises(LossError, match=r"rdrop_criterion with cross_entropy, which a file cannot hold"):
            regraft.load_plan(again, tmp_path, criterion=criterion)
        assert all("_regraft" not in vars(module) for module in again.modules())
    criterion = regraft.rdrop_criterion(again, F.cross_entropy)
    assert len(regraft.load_plan(again, tmp_path, criterion=criterion).grafted) == 1
    assert (state_of(again).options.alpha, state_of(again).options.fork) == (0.5, 0.5)
    criterion(again.train()(images()), Y.repeat(2)[: len(images())]).backward()
    assert criterion.terms.kl > 0


def quiet(build):
    """A model whose dropouts are all at 0: R-Drop is then its own loss, exactly."""
    model = build()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model.train()


class Weighted(nn.Module):
    """A model whose loss is not the plain one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.dropout = nn.Embedding(99, 16), nn.Linear(16, 2), nn.Dropout(0.1)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.dropout(self.embedding(input_ids).mean(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=torch.tensor([0.2, 3.0]))
        return {"loss": loss, "logits": logits}


LABELLED = {
    "bert": (bert, lambda: Y),
    "gpt2": (gpt2, lambda: tokens().masked_fill(tokens() % 3 == 0, -100)),
    "t5": (t5, lambda: tokens().masked_fill(tokens() % 3 == 0, -100)),
    "masked": (lambda: small("BertForMaskedLM"), lambda: tokens().masked_fill(tokens() % 3 == 0, -100)),
    "tokens": (lambda: small("BertForTokenClassification", num_labels=5), lambda: tokens() % 5),
    "regression": (lambda: bert(num_labels=1), lambda: torch.randn(4)),
    "several labels": (lambda: bert(num_labels=3), lambda: torch.randint(0, 2, (4, 3)).float()),
    # Rows with a single 1 can mean two things: the model says which, once it has seen labels.
    "one of several": (lambda: bert(num_labels=3), lambda: F.one_hot(torch.tensor([0, 2, 1, 1]), 3).float()),
    "choice": (lambda: small("BertForMultipleChoice"), lambda: Y[:2]),
    "weighted": (Weighted, lambda: Y),
    "experts": (
        lambda: small(
            "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=2, output_router_logits=True
        ),
        tokens,
    ),
}
OWN = {"weighted", "experts"}


@pytest.mark.filterwarnings("ignore:R-Drop on")
@pytest.mark.parametrize("name", LABELLED)
def test_without_noise_a_step_is_a_plain_step(name):
    build, make = LABELLED[name]
    model, labels = quiet(build), make()
    ids = tokens().view(2, 2, 8) if name == "choice" else tokens()
    own = model(input_ids=ids, labels=labels)["loss"]
    regraft.rdrop(model)
    outputs = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(outputs["loss"], own, rtol=1e-4, atol=1e-4)
    assert state_of(model).own.plain == (name not in OWN), state_of(model).own
    assert state_of(model).own.shift == (name in ("gpt2", "experts"))
    outputs["loss"].backward()


@pytest.mark.parametrize("name", LABELLED)
def test_a_step_with_noise(name):
    build, make = LABELLED[name]
    model = build().train()
    if name == "experts":
        model.config._attn_implementation = "eager"
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    ids = tokens().view(2, 2, 8) if name == "choice" else tokens()
    regraft.rdrop(model)
    loss = model(input_ids=ids, labels=make())["loss"]
    loss.backward()
    assert state_of(model).terms.kl > 0
    assert loss.isfinite()


@pytest.mark.filterwarnings("ignore:R-Drop on")
def test_gradient_accumulation_as_trainer_counts_it():
    model = quiet(gpt2)
    labels = tokens(6)
    labels[0] = -100
    labels[1, 3:] = -100
    regraft.rdrop(model)
    model(input_ids=tokens(6), labels=labels).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        items = (labels[:, 1:] != -100).sum()
        model(input_ids=tokens(6)[part], labels=labels[part], num_items_in_batch=items).loss.backward()
    for found, wanted in zip((p.grad for p in model.parameters()), whole, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:R-Drop on")
def test_multi_sample_dropout_in_one_line_and_smoothing():
    model = quiet(bert)
    own = model(input_ids=tokens(), labels=Y)
    regraft.rdrop(model, alpha=0, passes=8)
    torch.testing.assert_close(model(input_ids=tokens(), labels=Y).loss, own.loss)
    regraft.rdrop(model, label_smoothing=0.2)
    smoothed = F.cross_entropy(own.logits, Y, label_smoothing=0.2)
    torch.testing.assert_close(model(input_ids=tokens(), labels=Y).loss, smoothed)


def test_a_model_without_labels_takes_a_criterion():
    model = vit(drop_rate=0.3)
    plain = model.eval()(images())
    assert regraft.rdrop(model, criterion=F.cross_entropy) is model
    assert torch.equal(model(images()), plain)
    evaluated = model(images(), labels=Y)
    torch.testing.assert_close(evaluated.loss, F.cross_entropy(plain, Y))
    assert torch.equal(evaluated.logits, plain)
    loss, logits = model.train()(images(), labels=Y)
    assert logits.shape == (4, 5)
    assert abs(loss - evaluated.loss) < 0.5
    assert state_of(model).terms.kl > 0
    loss.backward()


@pytest.mark.parametrize(
    ("criterion", "labels", "task"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), Y, "classification"),
        (F.cross_entropy, torch.rand(4, 5).softmax(-1), "classification"),
        (nn.BCEWithLogitsLoss(), torch.randint(0, 2, (4, 5)).float(), "multilabel"),
        (nn.MSELoss(), torch.randn(4, 5), "regression"),
    ],
)
def test_the_kl_is_of_the_criterions_task(criterion, labels, task):
    model = vit(drop_rate=0.3)
    regraft.rdrop(model, criterion=criterion, strategy="loop")
    torch.manual_seed(1)
    model.train()(images(), labels=labels)
    regraft.revert(model)
    torch.manual_seed(1)
    passes = regraft.stochastic_passes(model, 2, images(), strategy="loop")
    target = labels if labels.dim() > 1 else F.one_hot(labels, 5).float()
    expected = regraft.rdrop_loss(passes, target, task=task) - regraft.rdrop_loss(
        passes, target, 0, task=task
    )
    regraft.rdrop(model, criterion=criterion, strategy="loop")
    torch.manual_seed(1)
    model(images(), labels=labels)
    torch.testing.assert_close(state_of(model).terms.kl, expected.detach())


def test_dense_classes_may_stand_second():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.3))
    regraft.rdrop(model, criterion=F.cross_entropy, inputs=images())
    loss, logits = model(images(), labels=torch.randint(0, 5, (4, 32, 32)))
    assert logits.shape == (4, 5, 32, 32)
    assert state_of(model).terms.kl > 0
    loss.backward()


def test_a_wrapper_is_looked_into_and_compiles():
    model = vit(drop_rate=0.3)
    regraft.rdrop(model, criterion=F.cross_entropy)
    compiled = torch.compile(model, backend="aot_eager")
    loss, logits = compiled(images(), labels=Y)
    loss.backward()
    assert logits.shape == (4, 5)
    regraft.rdrop(compiled, alpha=0.25, criterion=F.cross_entropy)
    assert state_of(model).options.alpha == 0.25


def test_passes_share_their_prefix_under_ddp(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, rows = headed_bert(), []
        model.bert.embeddings.word_embeddings.register_forward_pre_hook(
            lambda _, args: rows.append(len(args[0]))
        )
        wrapped = DistributedDataParallel(regraft.rdrop(model, strategy="shared").train())
        wrapped(input_ids=tokens(), labels=Y)
        rows.clear()
        wrapped(input_ids=tokens(), labels=Y).loss.backward()
        assert rows == [4]
        assert state_of(wrapped).terms.kl > 0
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_no_noise_is_said_and_so_are_missing_labels():
    dry = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.warns(UserWarning, match=r"the KL is 0.*dropout\(p=0\.1\)"):
        regraft.rdrop(dry)
    with pytest.warns(UserWarning, match="it has no dropout"):
        regraft.rdrop(nn.Linear(3, 3), criterion=F.cross_entropy, inputs=torch.ones(2, 3))
    model = bert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regraft.rdrop(model)
    model.train()
    with pytest.raises(LossError, match=r"given no labels[\s\S]*label_smoothing_factor"):
        model(input_ids=tokens())
    with torch.no_grad():
        assert model(input_ids=tokens()).loss is None


REFUSED = [
    (lambda: small("BertForQuestionAnswering"), {}, ModelError, "which are compared?"),
    (lambda: vit(drop_rate=0.1), {}, ModelError, "takes no labels"),
    (bert, {"alpha": -1.0}, RateError, "alpha=-1.0"),
    (bert, {"passes": 1}, RateError, "passes=1"),
    (bert, {"task": "ranking"}, LossError, "task='ranking'"),
    (lambda: vit(drop_rate=0.1), {"labels": "targets"}, InputsError, "no argument 'targets'"),
    (bert, {"reduction": "none"}, LossError, "trains on one number"),
    (bert, {"ce": "total"}, LossError, "ce='total'"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_what_is_refused_changes_nothing(build, options, error, message):
    model = build()
    cls = type(model)
    with pytest.raises(error, match=message):
        regraft.rdrop(model, **options)
    assert type(model) is cls
    assert "_regraft" not in vars(model)


def test_outputs_without_one_logits_are_refused_by_name():
    model = regraft.rdrop(small("BertForPreTraining")).train()
    with pytest.raises(LossError, match=r"'prediction_logits', 'seq_relationship_logits'"):
        model(input_ids=tokens(), labels=tokens(), next_sentence_label=Y)


def trainer_of(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens(8), Y.repeat(2), strict=True)]
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
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_trainer_trains_with_it(tmp_path):
    model = regraft.rdrop(bert(), alpha=0.5)
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert all(0.5 < loss < 1.0 for loss in losses)  # ln 2
    assert 0.5 < evaluated[0] < 0.9  # ln 2: in eval it is the model
    assert state_of(model).terms.kl > 0


@pytest.mark.filterwarnings("ignore:R-Drop on")
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_at_alpha_0_trainers_steps_are_plain_steps(tmp_path, options):
    logs = []
    for armed in (False, True):
        torch.manual_seed(0)
        model = quiet(bert)
        trainer = trainer_of(regraft.rdrop(model, alpha=0) if armed else model, tmp_path, **options)
        trainer.train()
        logs.append([[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "loss" in e])
    assert logs[0] == [pytest.approx(entry, rel=1e-4) for entry in logs[1]]


def test_trainers_label_smoothing_is_that_of_each_pass(tmp_path):
    logs = []
    for armed in (False, True):
        torch.manual_seed(0)
        model = quiet(bert)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of passes that are equal
            model = regraft.rdrop(model) if armed else model
        options = {"label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 3}
        trainer = trainer_of(model, tmp_path, **options)
        trainer.train()
        keys = ("loss", "grad_norm", "eval_loss")
        logs.append([entry[key] for entry in trainer.state.log_history for key in keys if key in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    regraft.revert(model)
    trainer.train()  # plain again

    trainer = trainer_of(regraft.rdrop(bert()), tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    assert state_of(trainer.model).terms.kl > 0


def test_a_loss_function_of_trainer_is_that_of_each_pass(tmp_path):
    def weighted(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 2.0]))

    trainer = trainer_of(regraft.rdrop(bert()), tmp_path)
    trainer.compute_loss_func = weighted
    with pytest.raises(LossError, match="say task="):
        trainer.train()
    trainer = trainer_of(regraft.rdrop(bert(), task="classification"), tmp_path)
    trainer.compute_loss_func = weighted
    trainer.train()
    assert state_of(trainer.model).terms.kl > 0
    trainer = trainer_of(regraft.rdrop(bert(), label_smoothing=0.1), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(LossError, match="no labels"):
        trainer.train()  # smoothed twice


def test_it_comes_off_again_where_the_look_at_the_loss_fails(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("regraft.training.rdrop.rdrop.learn_from", fails)
    model = bert()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with pytest.raises(MemoryError):
        regraft.rdrop(model, alpha=1.0, inputs=batch)
    assert "_regraft" not in vars(model)

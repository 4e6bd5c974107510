"""Max-norm: what is held, what is left alone, and the optimizers it has to live with."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import regraft
from regraft.errors import MisfitError, NoMatchError, OptionError, RateError, RuleSyntaxError, WrongKindError
from tests.training.models import bert, images, tokens, vit

ROOT = Path(__file__).parents[2]
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
BIG = 40.0


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def backward(model):
    model.zero_grad()
    model(X).square().sum().backward()


def trained(model, limits, steps=3, optimizer=torch.optim.AdamW, lr=0.5, **options):
    made = optimizer(model.parameters(), lr=lr, **options)
    held = regraft.max_norm(model, limits, made) if limits else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            backward(model)
            made.step()
    return made, held


def norms(weight, axis=0):
    return torch.linalg.vector_norm(weight.detach().transpose(0, axis).flatten(1), dim=1)


@pytest.mark.parametrize("limits", [{"Linear": 0.8}, {nn.Linear: 0.8}, {"Linear@0": 9.0, "*@{0..2}": 0.8}])
def test_every_row_is_scaled_back_and_keeps_its_direction(limits):
    plain, held = net(), net()
    trained(plain, None, steps=1)
    trained(held, limits, steps=1)
    clipped = 0
    for one, other in zip(plain.parameters(), held.parameters(), strict=True):
        if one.dim() == 1:
            assert torch.equal(one, other)
            continue
        over = norms(one) > 0.8
        clipped += int(over.sum())
        assert torch.equal(one[~over], other[~over])
        torch.testing.assert_close(norms(other)[over], torch.full((int(over.sum()),), 0.8))
        torch.testing.assert_close(other, one * (0.8 / norms(one)).clamp(max=1)[:, None])
    assert clipped > 2


def test_relative_bounds_are_each_rows_own():
    model = net()
    model[2].weight.data[1] = 0
    before = {name: norms(p) for name, p in model.named_parameters() if p.dim() == 2}
    _, held = trained(model, {"Linear": "1.1x"})
    for name, old in before.items():
        new = norms(model.get_parameter(name))
        assert (new[old > 0] <= old[old > 0] * 1.1001).all()
        assert (new > old * 1.0999).any()
    assert norms(model[2].weight)[1] > 0.3, "a row of zeros has no norm that a bound could be relative to"
    assert "1 rows are all zeros:" in held.notes[0]


def test_gradients_and_the_optimizers_state_are_left_alone():
    plain, held = net(), net()
    first, _ = trained(plain, None, steps=1)
    second, _ = trained(held, {"Linear": 0.3}, steps=1)
    for one, other in zip(plain.parameters(), held.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
        for name, value in first.state[one].items():
            assert torch.equal(value, second.state[other][name]), name
    assert not torch.equal(plain[0].weight, held[0].weight)


def test_frozen_and_foreign_weights_are_left_until_they_train():
    model = net()
    model[0].weight.data.mul_(BIG)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight, *model[2].parameters()], 0.1)
    held = regraft.max_norm(model, {"Linear": 0.8}, optimizer)
    assert [(one["path"], one["reason"]) for one in held.skipped] == [("0", "it is frozen")]
    before = model[0].weight.clone()
    backward(model)
    with pytest.warns(UserWarning, match="scales back 3 of 3 rows"):
        optimizer.step()
    assert torch.equal(before, model[0].weight)
    assert norms(model[2].weight).max() <= 0.8001
    model[0].weight.requires_grad_(True)
    backward(model)
    optimizer.step()
    assert norms(model[0].weight).max() <= 0.8001

    other = net()
    optimizer = torch.optim.SGD(other[2].parameters(), 0.1)
    held = regraft.max_norm(other, {"Linear": 0.1}, optimizer)
    assert held.skipped[0]["reason"] == "the optimizer does not hold it"
    before = other[0].weight.clone()
    backward(other)
    with pytest.warns(UserWarning, match="scales back 3 of 3 rows"):
        optimizer.step()
    assert torch.equal(before, other[0].weight)
    optimizer.add_param_group({"params": other[0].parameters()})
    backward(other)
    optimizer.step()
    assert norms(other[0].weight).max() <= 0.1001


def test_a_tied_weight_is_held_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    held = trained(model, {"Linear": "1.5x"}, steps=1)[1]
    assert [(one["paths"], one["rows"]) for one in held.limited] == [(["0", "1"], 6)]
    assert held.first["rows"] == 6


@pytest.mark.parametrize("how", ["plain", "fused"])
def test_a_step_that_the_scaler_skips_changes_nothing(how):
    model = net()
    model[0].weight.data.mul_(BIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=how == "fused")
    held = regraft.max_norm(model, {"Linear": 0.8}, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(loss):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = [p.clone() for p in model.parameters()]
    step(model(X).sum() * torch.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert held.first is None
    with pytest.warns(UserWarning, match="at its first step"):
        step(model(X).sum())
    assert held.first["rows"] == 8
    assert norms(model[0].weight).max() <= 0.8001


def test_accelerates_optimizer_and_its_accumulation():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.5))
    held = regraft.max_norm(model, {"Linear": 0.3}, optimizer)
    for turn in range(2):
        with accelerator.accumulate(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerator.backward(model(X).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        assert (held.first is not None) == (turn == 1)
    assert norms(model[0].weight).max() <= 0.3001
    AcceleratorState._reset_state(True)


def test_every_kind_of_layer_with_rows():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    gpt2 = GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(gpt2.parameters(), lr=1e-9)
    held = regraft.max_norm(gpt2, {"Conv1D": 0.05}, optimizer)
    gpt2(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    fc = gpt2.transformer.h[0].mlp.c_fc.weight
    assert fc.shape == (16, 64)
    torch.testing.assert_close(norms(fc, 1), torch.full((64,), 0.05))
    assert held.norms()["transformer.h.0.mlp.c_fc"].shape == (64,)

    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    regraft.max_norm(model, {"Conv2d": 0.25, "Linear@head": None}, optimizer)
    model(images()).sum().backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    torch.testing.assert_close(norms(model.patch_embed.proj.weight), torch.full((32,), 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    model = net().to(dtype)
    model[0].weight.data.mul_(BIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regraft.max_norm(model, {"Linear@0": 0.8}, optimizer)
    model(X.to(dtype)).sum().backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    found = norms(model[0].weight.double())
    assert (found - 0.8).abs().max() < tolerance
    assert model[0].weight.dtype is dtype


def test_computed_weights_are_skipped_and_why_is_said():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[1])
    prune.l1_unstructured(model[2], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = regraft.max_norm(model, {"Linear": 1.0}, optimizer)
    assert [one["path"] for one in held.limited] == ["3"]
    assert [one["reason"] for one in held.skipped] == [
        "its weight is computed, by a parametrization",
        "its weight is computed, by a parametrization",
        "its weight is computed by a hook, and no parameter",
    ]


def test_removing_it_and_reverting_the_model():
    model = net()
    optimizer, held = trained(model, {"Linear": 0.5})
    assert norms(model[0].weight).max() <= 0.5001
    regraft.apply(model, {"Linear": "dropconnect(p=0.2)"})
    regraft.revert(model)
    backward(model)
    optimizer.step()
    assert norms(model[0].weight).max() <= 0.5001, "a limit is the optimizer's, and no graft"
    held.remove()
    backward(model)
    optimizer.step()
    assert norms(model[0].weight).max() > 0.51
    held.remove()


@pytest.mark.parametrize(
    ("limits", "bound"),
    [({"*@0": 0.5, "*@1": 0.25}, 0.25), ({"*@1": 0.25, "*@0": 0.5}, 0.5), ({"*@0": 0.5, "*@1": None}, None)],
)
def test_the_later_limit_holds_a_weight_that_two_layers_share(limits, bound):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = regraft.max_norm(model, {"*@2": 9.0, **limits}, optimizer)
    assert [line["bound"] for line in held.limited if "0" in line["paths"]] == ([bound] if bound else [])
    backward(model)
    optimizer.step()
    largest = norms(model[0].weight).max()
    assert (largest <= bound * 1.0001) if bound else (largest > 0.5)


def test_units_of_transposed_convolutions_are_held_or_listed():
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2), nn.ConvTranspose1d(4, 4, 2, groups=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = regraft.max_norm(model, {"*": 0.01}, optimizer)
    assert [line["path"] for line in held.limited] == ["0"]
    assert [line["path"] for line in held.skipped] == ["1"]
    model[0](torch.randn(1, 4, 5, 5)).sum().backward()
    with pytest.warns(UserWarning, match="first step"):
        optimizer.step()
    weight = model[0].weight.detach()
    torch.testing.assert_close(torch.linalg.vector_norm(weight, dim=(0, 2, 3)), torch.full((3,), 0.01))


def test_bounds_survive_a_resumed_run():
    model = net()
    _, held = trained(model, {"Linear": "1.2x"})
    state = copy.deepcopy(held.state_dict())
    again = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.5)
    resumed = regraft.max_norm(again, {"Linear": "1.2x"}, optimizer)
    assert not torch.equal(resumed.state_dict()["0"], state["0"])
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state_dict()["0"], state["0"])
    with pytest.raises(MisfitError, match="of other weights"):
        resumed.load_state_dict({"0": state["0"]})


def test_a_bound_that_would_undo_the_model_warns_once():
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    held = regraft.max_norm(model, {"Linear": 0.01}, optimizer)
    model(input_ids=tokens(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    with pytest.warns(UserWarning, match=r"(?s)rows at its first step.*'1.1x'") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert held.first["over"] == held.first["rows"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        fresh = bert()
        gentle = torch.optim.AdamW(fresh.parameters(), lr=1e-5)
        regraft.max_norm(fresh, {"Linear": "1.1x"}, gentle)
        fresh(input_ids=tokens(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        gentle.step()


def test_what_people_and_machines_read():
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = regraft.max_norm(model, {"Linear": 3.0}, optimizer)
    facts = held.to_dict()
    assert (facts["schema"], facts["view"], facts["rules"]) == (1, "max_norm", [["Linear", 3.0]])
    assert {one["path"] for one in facts["limited"]} >= {"blocks.0.attn.qkv", "head"}
    assert facts["limited"][0].keys() == {"path", "paths", "op", "shape", "rows", "bound", "largest", "over"}
    assert "Linear: norm at most 3" in str(held)
    assert "norm at most 3" in held.to_markdown()
    assert "norm at most 3" in held.to_html()
    assert held.to_json()


BAD = [
    (3.0, RuleSyntaxError, "no set of limits"),
    ({}, RuleSyntaxError, "no set of limits"),
    ({"Linear": 0}, RateError, "no norm to hold"),
    ({"Linear": float("inf")}, RateError, "no norm to hold"),
    ({"Linear": "0.9x"}, RateError, "shrink every row"),
    ({"Linear": "tight"}, OptionError, "is no bound"),
    ({"Linear": True}, OptionError, "is no bound"),
    ({"Linear@9": 3.0}, NoMatchError, "matches nothing"),
    ({"ReLU": 3.0}, WrongKindError, "no incoming weights"),
    ({"after:Linear": 3.0}, RuleSyntaxError, "before or after"),
]


@pytest.mark.parametrize(("limits", "error", "said"), BAD, ids=[str(limits) for limits, *_ in BAD])
def test_bad_limits(limits, error, said):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(error, match=said):
        regraft.max_norm(model, limits, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_bad_optimizers():
    with pytest.raises(OptionError, match="is none that it can watch"):
        regraft.max_norm(net(), {"Linear": 3.0}, object())
    model = net()
    foreign = torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(MisfitError, match="the optimizer does not hold it"):
        regraft.max_norm(model, {"Linear": 3.0}, foreign)
    assert not foreign._optimizer_step_post_hooks


def test_rows_spread_over_two_processes(tmp_path):
    """FSDP2 and tensor parallel, rows across and along, and parts of unequal size."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests/training/sharded_rows.py"]
    store = tmp_path / "store"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), store], env=env, stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    for rank, process in enumerate(ranks):
        out, error = process.communicate(timeout=180)
        assert f"rank {rank}: as one process" in out, error[-2000:]

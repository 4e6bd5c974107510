"""`save_plan` and `load_plan` hold all that regraft does to a model: schedules and max-norm with their state, too."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import FileError, MisfitError, OptionError

CURVE = {"start": "x0", "end": "x1", "steps": 4}


def net(p=0.4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(p), nn.Linear(5, 3))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("rule", [None, "gaussian"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_schedule_goes_on_where_it_was(tmp_path, rule, copied):
    model = net()
    if rule:
        regraft.apply(model, {"Dropout": rule})
    schedule = regraft.schedule(model, CURVE)
    schedule.step(to=1)
    regraft.save_plan(copy.deepcopy(model) if copied else model, tmp_path)
    again = net(0.9 if rule is None else 0.4)
    report = regraft.load_plan(again, tmp_path)
    (restored,) = report.schedules
    assert restored.steps_done == 1
    assert again[1].p == pytest.approx(0.1)
    assert [restored.step() for _ in range(4)] == [schedule.step() for _ in range(4)]
    assert json.loads(regraft.save_plan(again, tmp_path).read_text())["schedules"][0]["steps_done"] == 5
    restored.remove()
    assert type(again[1]).__name__ == ("GaussianDropout" if rule else "Dropout")
    assert rule is None or again[1].p == 0.4
    assert "schedules" not in json.loads(regraft.save_plan(again, tmp_path).read_text())
    assert not regraft.load_plan(net(), tmp_path).schedules


def test_max_norm_keeps_its_bounds_and_asks_for_the_optimizer(tmp_path):
    model = net()
    model[2].weight.data[0] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    held = regraft.max_norm(model, {"Linear@0": "1.1x", "Linear@2": 3.0}, optimizer)
    bounds = held.state_dict()["0"]
    for _ in range(3):
        step(model, optimizer)
    regraft.apply(model, {"Dropout": "gaussian"})
    file = regraft.save_plan(model, tmp_path)
    again = net()
    again.load_state_dict(model.state_dict())
    with pytest.raises(OptionError, match=r"load_plan\(model, path, optimizer=optimizer\)"):
        regraft.load_plan(again, file)
    assert type(again[1]) is nn.Dropout
    optimizer = torch.optim.SGD(again.parameters(), 0.5)
    report = regraft.load_plan(again, file, optimizer)
    (restored,) = report.max_norms
    assert torch.equal(restored.state_dict()["0"], bounds)
    assert (len(report.grafted), restored.rules) == (1, held.rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(again, optimizer)
    assert (again[0].weight.norm(dim=1) <= bounds * 1.0001).all()
    assert again[2].weight.norm(dim=1).max() <= 3.001
    restored.remove()
    regraft.save_plan(regraft.revert(again), file)
    assert not regraft.load_plan(net(), file).max_norms


def test_what_does_not_fit_leaves_a_plain_model(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    held = regraft.max_norm(model, {nn.Linear: "1.1x"}, optimizer)
    regraft.schedule(model, CURVE)
    file = regraft.save_plan(model, tmp_path)
    other = net()
    other[0] = nn.Linear(6, 5, dtype=torch.float64)
    del other[2]
    with pytest.raises(MisfitError, match="other weights"):
        regraft.load_plan(other, file, torch.optim.SGD(other.parameters(), 0.5))
    assert all("_regraft" not in vars(module) for module in other.modules())
    file.write_text(json.dumps({**json.loads(file.read_text()), "schedules": [{"curve": 1}]}))
    with pytest.raises(FileError, match="schedules"):
        regraft.load_plan(net(), file, optimizer)
    held.remove()


def test_plans_of_before_are_read(tmp_path):
    file = regraft.save_plan(regraft.apply(model := net(), {"Dropout": "gaussian"}) and model, tmp_path)
    values = json.loads(file.read_text())
    assert values["schema"] == 1
    assert not {"schedules", "max_norm", "rdrop"} & values.keys()
    assert len(regraft.load_plan(net(), file).grafted) == 1


def test_inspect_and_load_on_the_command_line(tmp_path):
    from regraft.cli.opening import _graft_again, view_of
    from regraft.cli.output import Opening

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    held = regraft.max_norm(model, {"Linear": "1.1x"}, optimizer)
    regraft.apply(model, {"Dropout": "gaussian"})
    regraft.schedule(model, CURVE).step()
    regraft.rdrop(model, criterion=nn.functional.cross_entropy, alpha=0.5)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    plan = regraft.save_plan(model, tmp_path / "net.regraft.json")
    (note,) = [
        note for note in view_of(str(tmp_path / "net.pt"), Opening()).to_dict()["notes"] if "graft" in note
    ]
    assert note == (
        "net.regraft.json: 1 graft, R-Drop(alpha=0.5, criterion='cross_entropy'), "
        "rates on a schedule, 1 of 4 steps done, max-norm(Linear: 1.1x)"
    )
    again = net()
    _, notes = _graft_again(again, tmp_path / "net.pt")
    assert type(again[1]).__name__ == "GaussianDropout"
    assert "only the grafts were put back" in notes[0]
    plan.write_text('{"grafted": 3}')
    assert "no plan that can be read" in str(view_of(str(tmp_path / "net.pt"), Opening()))
    held.remove()

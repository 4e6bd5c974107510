"""The comparison: its statistics against definitions, its shortcut against the whole model, a tiny run."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import regraft

RECIPE = Path(__file__).parents[2] / "recipes" / "compare.py"
TINY = ("--steps", "2", "--labels", "16", "--test", "40", "--apart", "20", "--seeds", "2", "--processes", "1")


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(RECIPE.parent))  # as python itself does for a script
    spec = importlib.util.spec_from_file_location("compare", RECIPE)
    module = sys.modules["compare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(output, *options):
    command = [sys.executable, str(RECIPE), "--output", str(output), *TINY, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=output)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 2, (500, 3))


@pytest.fixture
def labels(logits):
    """Drawn from what the logits say, so that they are calibrated."""
    draws = np.random.default_rng(1).random((500, 1))
    probabilities = torch.tensor(logits).softmax(-1).numpy()
    return (draws > probabilities.cumsum(-1)).sum(-1).clip(0, 2)


def test_the_likelihood_is_that_of_torch(compare, logits, labels):
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert compare.nll(logits, labels) == pytest.approx(float(expected), abs=1e-12)


def test_the_calibration_error_is_the_definition(compare, logits, labels):
    probabilities = torch.tensor(logits).softmax(-1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert compare.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-12)


def test_confidence_1_that_is_right_is_calibrated(compare):
    assert compare.calibration_error(np.array([[100.0, 0.0]]), np.array([0])) == pytest.approx(0.0)


def test_the_temperature_undoes_a_factor(compare, logits, labels):
    plain = compare.measures(logits, labels, logits, labels)
    sharper = compare.measures(3 * logits, labels, 3 * logits, labels)
    assert sharper["temperature"] == pytest.approx(3 * plain["temperature"], rel=1e-3)
    assert sharper["nll_scaled"] == pytest.approx(plain["nll_scaled"], abs=1e-6)
    assert sharper["nll"] > sharper["nll_scaled"]
    assert sharper["accuracy"] == plain["accuracy"]


def test_the_temperature_is_not_fitted_to_the_test(compare, logits, labels):
    other = compare.measures(logits, labels, 5 * logits, labels)
    assert other["nll_scaled"] > compare.measures(logits, labels, logits, labels)["nll_scaled"]


def test_the_interval_is_that_of_a_paired_t_test(compare):
    ours, theirs = np.random.default_rng(2).normal(0.7, 0.02, (2, 8))
    made = compare.difference([{"m": v} for v in ours], [{"m": v} for v in theirs], "m")
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (made.mean - made.half, made.mean + made.half) == pytest.approx((low, high), abs=1e-12)
    assert made.wins == (ours > theirs).sum()
    assert made.separable == (low > 0 or high < 0)


def test_less_is_better_counts_the_other_way_and_ties_for_nobody(compare):
    made = compare.difference(
        [{"nll": v} for v in (1, 2, 3)], [{"nll": v} for v in (2, 2, 2)], "nll", sign=-1
    )
    assert (made.wins, made.ties, made.seeds) == (1, 1, 3)


def test_1_seed_separates_nothing(compare):
    made = compare.difference([{"m": 0.9}], [{"m": 0.1}], "m")
    assert math.isinf(made.half)
    assert not made.separable


def test_words_claim_only_what_is_separable(compare):
    def rows(shift, noise):
        noise = np.random.default_rng(3).normal(0, noise, 8)
        return [
            {"accuracy": 0.7 + shift + d, "nll": 1.0, "ece": 0.1, "seconds": 1.0, "cpu_seconds": 1.0}
            for d in noise
        ]

    runs = {"p=0.1": rows(0, 0), "p=0.3": rows(0.02, 0.001), "R-Drop, p=0.3": rows(0.021, 0.02)}
    assert "not separable), better" in compare.sentence("R-Drop, p=0.3", runs, compare.ARMS)
    assert "over p=0.3" in compare.sentence("R-Drop, p=0.3", runs, compare.ARMS)
    first = compare.sentence("p=0.3", runs, compare.ARMS).split(",")[0]
    assert "not separable" not in first.partition("better")[0]


@pytest.fixture(scope="module")
def worker(compare, tmp_path_factory):
    """With what the frozen layers make of 60 sentences."""
    folder = str(tmp_path_factory.mktemp("computed"))
    compare.sys.argv = ["compare.py", *TINY]
    options, arms, _ = compare.parse()
    data = compare.read(options)
    assert compare.compute_frozen(options, data, [*data.apart, *data.test], folder)
    return compare.Worker(options, data, arms, folder)


def test_the_frozen_layers_are_computed_once_where_they_have_no_dropout(compare, worker):
    model = worker.model(0)
    regraft.apply(model, compare.dropout(0.3) | compare.shared.without_dropout(model, 4))
    assert worker.is_computed(model)


@pytest.mark.parametrize("rules", [{"Dropout": "dropout(p=0.3)"}, {"after:BertLayer": "gaussian(p=0.1)"}])
def test_they_are_not_where_something_draws(worker, rules):
    model = worker.model(0)
    regraft.apply(model, rules)
    assert not worker.is_computed(model)


def test_behind_the_frozen_layers_gradients_are_those_of_the_whole_model(compare, worker):
    gradients = []
    for computed in (False, True):
        model = worker.model(0)
        regraft.apply(model, {"Dropout": "off"})
        if computed:
            compare.cut(model, 4)
        model.train()(**worker.inputs(worker.data.test[:8], computed)).loss.backward()
        gradients.append(model.bert.encoder.layer[4].output.dense.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_every_arm_applies(compare, worker):
    for name, arm in compare.ARMS.items():
        model = worker.model(0)
        off = {} if arm.everywhere else compare.shared.without_dropout(model, 4)
        assert regraft.apply(model, arm.rules | off).grafted, name


def test_seeds_are_paired_and_the_test_stays_apart(worker):
    data = worker.data
    assert data.drawn(3, 16) == data.drawn(3, 16) != data.drawn(4, 16)
    assert not {*data.pool} & {*data.test, *data.apart}
    assert not {*data.test} & {*data.apart}


@pytest.mark.slow
def test_a_tiny_run_and_its_resumption(tmp_path):
    done = run(tmp_path, "--arm", "own", "Dropout=gaussian(p=0.3)", "alpha=1", "--also", "own")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["p=0.1", "p=0.1, steps x2", "p=0.3", "R-Drop, p=0.3", "own"]
    assert list(results["runs"]) == names
    assert all([row["seed"] for row in rows] == [0, 1] for rows in results["runs"].values())
    assert "recipes/compare.py" in results["command"]
    assert str(tmp_path.parent) not in json.dumps(results["settings"])
    assert results["summary"][3]["accuracy_difference"]["seeds"] == 2
    assert all(
        row["sentence"] in done.stdout.replace("\n", " ").replace("  ", " ") for row in results["summary"]
    )
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 * len(names)
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(names)
    assert (tmp_path / "differences.png").stat().st_size > 5_000

    runs = (tmp_path / "runs.jsonl").read_text()
    assert len(runs.splitlines()) == 2 * len(names)
    lost = "".join(line + "\n" for line in runs.splitlines()[:-1])  # as if interrupted before the last
    (tmp_path / "runs.jsonl").write_text(lost)
    assert (
        run(
            tmp_path, "--arms", "own", "p=0.3", "--arm", "own", "Dropout=gaussian(p=0.3)", "alpha=1"
        ).returncode
        == 0
    )
    assert (tmp_path / "runs.jsonl").read_text().startswith(lost)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(runs.splitlines())

    refused = run(tmp_path, "--frozen", "3")
    assert refused.returncode == 1
    assert "other settings" in refused.stderr
    assert "another --output" in refused.stderr


def test_an_unknown_arm_names_the_way_to_the_list(tmp_path):
    refused = run(tmp_path, "--arms", "nonesuch")
    assert refused.returncode == 2
    assert "--list names them" in refused.stderr

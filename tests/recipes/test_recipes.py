"""The recipes: whole runs as a user starts them, small by default and as they stand when slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def run(name, output, *options, threads=None):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    command = [sys.executable, str(RECIPES / f"{name}.py"), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output)
    assert done.returncode == 0, done.stderr[-3000:]
    return " ".join(done.stdout.split())


def results(output):
    return json.loads((output / "results.json").read_text())


def check_files(output, stdout, seeds):
    assert (output / "plot.png").stat().st_size > 5_000
    assert json.loads((output / "regraft.json").read_text())["grafted"]
    assert "sites grafted" in stdout
    assert "no missing and no unexpected key" in stdout
    assert "recipes/" in results(output)["command"]
    rows = {row["arm"]: row for row in results(output)["summary"]}
    assert list(rows) == ["baseline", "R-Drop", "grafted"]
    for name, row in rows.items():
        runs = results(output)["runs"][name]
        assert len(runs) == seeds
        assert row["accuracy"] == pytest.approx(sum(one["accuracy"] for one in runs) / seeds)
    for name in ("R-Drop", "grafted"):
        change = rows[name]["accuracy_difference"]
        assert change["mean"] == pytest.approx(rows[name]["accuracy"] - rows["baseline"]["accuracy"])
        claimed = f"{name}: with {seeds} seeds not separable" not in stdout
        assert claimed == (abs(change["mean"]) > change["half"])
    return rows


def test_vit_small(tmp_path):
    stdout = run("vit", tmp_path, "--steps", "2", "--seeds", "2", "--shots", "2", threads=1)
    check_files(tmp_path, stdout, 2)
    assert "GaussianDropout" in stdout


@pytest.mark.parametrize("loop", ["trainer", pytest.param("plain", marks=pytest.mark.slow)])
def test_bert_small(tmp_path, loop):
    sizes = ("--steps", "2", "--seeds", "2", "--train", "16", "--test", "24", "--batch", "8")
    stdout = run("bert", tmp_path, *sizes, "--loop", loop, threads=1)
    check_files(tmp_path, stdout, 2)
    assert "GaussianDropout" in stdout


SIZES = ("--pretrain", "2", "--steps", "2", "--test", "16")


def test_dropout_in_a_causal_model_with_lora(tmp_path):
    stdout = run("causal_lm", tmp_path, *SIZES, "--train", "16", threads=1)
    assert "load without regraft, same logits: True" in stdout
    assert "8 sites grafted" in stdout  # behind each MLP and each attention of 4 layers
    assert [row["arm"] for row in results(tmp_path)] == ["no dropout", "LoRA's own dropout", "inserted"]


@pytest.mark.slow
def test_preferences_without_dropout(tmp_path):
    run("preferences", tmp_path, *SIZES, "--pairs", "16", threads=1)
    noisy, quiet = results(tmp_path)
    assert noisy["log-ratio before training"] > 1e-3
    assert quiet["log-ratio before training"] < 1e-4  # a padded batch's rounding, and no noise


@pytest.mark.slow
def test_uncertainty(tmp_path):
    run("uncertainty", tmp_path, "--steps", "2", "--test", "60", "--passes", "3", threads=1)
    rows = {row["method"]: row for row in results(tmp_path)}
    for name in ("softmax", "3 passes"):
        plain, scaled = rows[name], rows[f"{name}, temperature"]
        assert plain["accuracy"] == scaled["accuracy"]
        assert plain["aurc"] == pytest.approx(scaled["aurc"], abs=1e-9)  # a temperature changes no order
    assert rows["softmax"]["nll"] != rows["3 passes"]["nll"]
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.slow
def test_token_classification(tmp_path):
    run("token_classification", tmp_path, "--steps", "2", "--train", "16", "--test", "16", threads=1)
    assert [row["arm"] for row in results(tmp_path)] == ["baseline", "R-Drop"]
    assert all(0 <= row["f1"] <= 1 for row in results(tmp_path))


@pytest.mark.slow
def test_sequence_to_sequence(tmp_path):
    run("seq2seq", tmp_path, "--steps", "3", "--train", "64", "--test", "16", threads=1)
    baseline, rdrop = (row["held-out loss"] for row in results(tmp_path))
    assert baseline != rdrop
    assert max(baseline, rdrop) < 8  # of 259 bytes: log(259) is 5.6


@pytest.mark.slow
def test_vit_default(tmp_path):
    rows = check_files(tmp_path, run("vit", tmp_path), 3)
    assert min(row["accuracy"] for row in rows.values()) > 0.5  # chance is 0.25


@pytest.mark.slow
def test_vit_on_a_folder_of_idx_files(tmp_path):
    import numpy as np

    data = tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("t10k", 4)):
        labels = np.arange(count, dtype=np.uint8) % 2
        images = generator.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        (data / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + images.tobytes())
        (data / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + labels.tobytes())
    options = ("--data", str(data), "--model", "test_vit", "--scratch", "--steps", "1", "--seeds", "2")
    check_files(tmp_path, run("vit", tmp_path, *options), 2)


@pytest.mark.slow
def test_bert_default(tmp_path):
    rows = check_files(tmp_path, run("bert", tmp_path), 3)
    assert min(row["accuracy"] for row in rows.values()) >= 0.60  # chance is 0.50

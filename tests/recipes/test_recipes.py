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
    return done.stdout


def accuracies(output):
    made = json.loads((output / "results.json").read_text())
    if isinstance(made, dict):
        return {method: sum(values) / len(values) for method, values in made.items()}
    return {row["method"]: row["accuracy"] for row in made}


def check_files(output, stdout):
    assert (output / "curves.png").stat().st_size > 5_000
    assert json.loads((output / "regraft.json").read_text())["grafted"]
    assert "sites grafted" in stdout
    # A long path of the output wraps the line.
    assert "no missing and no unexpected key" in " ".join(stdout.split())
    assert set(accuracies(output)) == {"baseline", "R-Drop", "grafted"}


def test_every_recipe_is_short():
    for recipe in RECIPES.glob("*.py"):
        assert len(recipe.read_text().splitlines()) <= 200, recipe.name


def test_vit_small(tmp_path):
    stdout = run("vit", tmp_path, "--epochs", "2", "--seeds", "1", "--shots", "2", threads=1)
    check_files(tmp_path, stdout)
    assert "GaussianDropout" in stdout


@pytest.mark.slow
def test_vit_default(tmp_path):
    check_files(tmp_path, run("vit", tmp_path))
    assert min(accuracies(tmp_path).values()) > 0.5  # chance is 0.25


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
    options = ("--data", str(data), "--model", "test_vit", "--scratch", "--epochs", "1", "--seeds", "1")
    check_files(tmp_path, run("vit", tmp_path, *options))


@pytest.mark.slow
def test_bert_default(tmp_path):
    check_files(tmp_path, run("bert", tmp_path))
    assert min(accuracies(tmp_path).values()) >= 0.70  # chance is 0.50

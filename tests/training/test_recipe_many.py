"""The BERT recipe in several processes: DDP and FSDP2, on the CPU."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OPTIONS = ["--train", "64", "--test", "32", "--steps", "2", "--seeds", "1"]


LAUNCHERS = {
    "plain": [],
    "ddp": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
    "fsdp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def recipe(folder, way, processes):
    done = subprocess.run(
        [
            *(sys.executable, *LAUNCHERS[way], TESTS / "recipe_processes.py", way),
            *(*OPTIONS, "--batch", str(32 // processes), "--output", folder),
        ],
        env={**os.environ, "PYTHONPATH": str(TESTS.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:6000]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_the_recipe_in_two_processes(tmp_path):
    from transformers import AutoModelForSequenceClassification

    (alone,), _ = recipe(tmp_path / "alone", "plain", 1)
    made = {}
    for way in ("ddp", "fsdp"):
        (first, second), said = recipe(tmp_path / way, way, 2)
        made[way] = first
        for method, ours, theirs, one in zip(
            ("plain", "R-Drop", "grafted"), first, second, alone, strict=True
        ):
            assert ours["sharded"] == (way == "fsdp"), method
            assert ("Distributed" in ours["wrapped"]) == (way == "ddp"), method
            assert ours["draw"] != theirs["draw"], method  # so their masks differ
            if way == "ddp":
                assert ours["weight"] == theirs["weight"], method
            # As many sentences a step as in one process, so the losses are the same up to their masks.
            assert statistics.mean([ours["loss"], theirs["loss"]]) == pytest.approx(one["loss"], rel=0.05)
            assert 0.6 < first[1]["loss"] < 0.8  # the mean of R-Drop's cross-entropies of two classes
        # One process speaks and saves, and what it saved is the whole of the last model.
        assert said.count("plain checkpoint in") == 1
        assert said.count("32 held-out sentences, 1 seed") == 1
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / way / "model")
        assert loaded.classifier.weight.flatten()[:4].tolist() == pytest.approx(first[-1]["weight"], abs=1e-7)
    for ours, theirs in zip(made["ddp"], made["fsdp"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)

"""Passes of models that two processes train together, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def two_processes(script):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, ROOT / "tests/training" / script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_share_as_the_whole_model_does():
    assert two_processes("sharded_passes.py").count("agreed") == 2  # each line may break into the other


@pytest.mark.slow
def test_two_processes_decide_alike_whether_the_batch_is_repeated():
    assert two_processes("votes.py").strip() == "True [[6, 6], [12], [6, 6]]"

"""R-Drop beyond one process: DDP and FSDP2, two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regraft
from tests.training.models import bert, tokens

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "ddp, wrapped first", "fsdp"])
def test_two_processes(way, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, ROOT / "tests/training/two_processes.py", way, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.strip().splitlines()[-1])
    # The same weights and samples, so the masks alone tell the ranks apart.
    assert first["first"] != second["first"]
    assert first["logits"] != second["logits"]
    assert first["kl"] > 0
    # The checkpoint loads in one process, whose loss is theirs in expectation.
    alone = bert(hidden_dropout_prob=0.3)
    alone.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    regraft.rdrop(alone, alpha=0.5).train()
    y = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        losses = torch.tensor([alone(input_ids=tokens(), labels=y).loss.item() for _ in range(80)])
    tolerance = 4 * losses.std().item() * (1 / 80 + 1 / 40) ** 0.5
    assert first["mean"] == pytest.approx(losses.mean().item(), abs=tolerance)
    assert second["mean"] == pytest.approx(losses.mean().item(), abs=tolerance)

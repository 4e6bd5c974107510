"""Exports, parallel training and other libraries' models: each cell of docs/compatibility.md is a real run."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import regraft
from regraft.errors import ModelError

ROOT = Path(__file__).parents[2]
RULES = {"Dropout": "gaussian(p=0.2)", "Linear": "dropconnect(p=0.1)"}


def grafted_types(model):
    return sorted(site.variant for site in regraft.inspect(model).sites if site.variant)


@pytest.mark.parametrize("rules", [RULES, {"Dropout": "multisample"}], ids=["linear", "dropout"])
def test_a_grafted_model_is_not_scripted_and_a_reverted_one_is(rules):
    net = tiny.mlp()
    regraft.apply(net, rules)
    with pytest.raises(ModelError, match=r"regraft\.revert\(model\) first"):
        torch.jit.script(net)
    plain = torch.jit.script(regraft.revert(net)).eval()
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), net.eval()(x))


@pytest.mark.slow
def test_onnx_in_eval_is_the_originals(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 6)
    net = tiny.mlp().eval()
    expected = net(x)
    graphs = []
    for grafted in (False, True):
        if grafted:
            regraft.apply(net, RULES)
        file = str(tmp_path / f"{grafted}.onnx")
        torch.onnx.export(net, (x,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        graphs.append(output)
        torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-6, rtol=1e-5)
    assert (graphs[0] == graphs[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["grafted before", "grafted after"])
def test_dynamic_shapes_in_inductor(order):
    """One graph for all batch sizes, in training."""
    net = tiny.mlp(0.3)
    if order == "grafted before":
        regraft.apply(net, RULES)
    compiled = torch.compile(net, dynamic=True, fullgraph=True)
    if order == "grafted after":
        regraft.apply(compiled, RULES)
    for size in (3, 5, 9):
        x = torch.randn(size, 6)
        first, second = compiled(x), compiled(x)
        assert first.shape == (size, 3)
        assert not torch.equal(first, second)
        first.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), net(x))
        compiled.train()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["grafted before", "grafted after"])
def test_accelerates_offload_to_the_cpu(order):
    """Weights wait on the meta device and come for each forward."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny.bert(layers=1)
    batch = tiny.tokens()
    plain = copy.deepcopy(model).eval()
    if order == "grafted before":
        regraft.apply(model, RULES)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    if order == "grafted after":
        regraft.apply(model, RULES)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, plain(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        regraft.revert(model)
        torch.testing.assert_close(model.eval()(**batch).logits, plain(**batch).logits)


PARALLEL = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import regraft, tiny
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = tiny.llama(0.2)
batch = tiny.tokens()
with torch.no_grad():
    expected = model.eval()(**batch).logits
rules = {"Dropout": "gaussian(p=0.2)"}
if sys.argv[1] == "before":
    regraft.apply(model, rules)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
if sys.argv[1] == "after":
    report = regraft.apply(model, rules)
    assert len(report.grafted) == 2, report
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits, expected)
model.train()
torch.manual_seed(1)
model(**batch, labels=batch["input_ids"]).loss.backward()
assert all(p.grad is not None for p in model.parameters())
assert not torch.equal(model(**batch).logits, model(**batch).logits)
regraft.revert(model)
with torch.no_grad():
    torch.testing.assert_close(model.eval()(**batch).logits, expected)
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_llama_in_tensor_parallel(order, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, order], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


SPAWNED = """
import torch, torch.multiprocessing as mp, regraft
from torch import nn

def work(model, queue):
    x = torch.ones(2, 6)
    queue.put((type(model[1]).__name__, float((model(x) - model(x)).abs().sum()), type(regraft.revert(model)[1]).__name__))

if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3))
    regraft.apply(model, {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"})
    queue = mp.get_context("spawn").SimpleQueue()
    process = mp.get_context("spawn").Process(target=work, args=(model, queue))
    process.start()
    name, apart, plain = queue.get()
    process.join()
    assert (name, plain) == ("GaussianDropout", "Dropout"), (name, plain)
    assert apart > 0
    assert type(model[1]).__name__ == "GaussianDropout"
    print("equal")
"""


@pytest.mark.slow
def test_a_process_that_is_spawned_gets_the_grafts(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert "equal" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        dropout=0.2,
    )
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([1, 2])}
    with torch.no_grad():
        expected = model.eval()(**inputs).sample
    report = regraft.apply(model, RULES, inputs=inputs)
    assert {edit.op for edit in report.grafted} >= {"Dropout", "Linear"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, expected)
    model.train()
    output = model(**inputs).sample
    assert not torch.equal(output, model(**inputs).sample)
    output.square().mean().backward()
    with torch.no_grad():
        assert torch.equal(regraft.revert(model).eval()(**inputs).sample, expected)


@pytest.mark.slow
def test_torch_geometric():
    pytest.importorskip("torch_geometric")
    from torch_geometric.nn import GAT

    torch.manual_seed(0)
    model = GAT(6, 8, num_layers=2, out_channels=3, heads=2, dropout=0.4)
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    inputs = (torch.randn(4, 6), edges)
    with torch.no_grad():
        expected = model.eval()(*inputs)
    report = regraft.apply(model, {"Dropout": "gaussian"}, inputs=inputs)
    assert {edit.kind for edit in report.grafted} >= {"call"}  # of attention's weights, between the layers
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    model.train()
    output = model(*inputs)
    assert not torch.equal(output, model(*inputs))
    output.square().mean().backward()
    with torch.no_grad():
        assert torch.equal(regraft.revert(model).eval()(*inputs), expected)

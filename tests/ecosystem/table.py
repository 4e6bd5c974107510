"""Writes the runs in docs/compatibility.md, from a run of the tests that it names.

python tests/ecosystem/table.py             # runs them, ten minutes on one core
python tests/ecosystem/table.py --only peft
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
HERE = "tests/ecosystem/test_libraries.py"
TRAINING = "tests/ecosystem/test_training.py"
COMPILE, COPIES = "tests/graft/test_compile.py", "tests/graft/test_copies.py"
DISTRIBUTED, CHECKPOINT = "tests/graft/test_distributed.py", "tests/graft/test_checkpoint.py"

# What is used, the package whose version is stated, the tests that run it.
ROWS = [
    (
        "`torch.compile`, one graph in training",
        "torch",
        [f"{COMPILE}::test_one_graph_in_training_and_the_originals_eval"],
    ),
    (
        "`torch.compile`, grafted after compiling",
        "torch",
        [f"{COMPILE}::test_five_steps_are_one_graph_and_a_graft_compiles_anew"],
    ),
    ("`torch.compile` with inductor, dynamic shapes", "torch", [f"{HERE}::test_dynamic_shapes_in_inductor"]),
    ("autocast", "torch", [f"{COMPILE}::test_autocast"]),
    ("bfloat16, float16, float64", "torch", [f"{COMPILE}::test_a_model_in_another_precision"]),
    (
        "checkpointing, reentrant and not",
        "torch",
        [f"{CHECKPOINT}::test_a_checkpointed_block_recomputes_the_same_masks"],
    ),
    ("checkpointing of Hugging Face", "transformers", [f"{CHECKPOINT}::test_hugging_faces_checkpointing"]),
    ("checkpointing of timm", "timm", [f"{CHECKPOINT}::test_timms_checkpointing"]),
    ("`torch.export` in eval", "torch", [f"{COMPILE}::test_export_in_eval_gives_the_original"]),
    ("ONNX in eval", "onnxruntime", [f"{HERE}::test_onnx_in_eval_is_the_originals"]),
    (
        "`torch.jit.script`: refused until reverted",
        "torch",
        [f"{HERE}::test_a_grafted_model_is_not_scripted_and_a_reverted_one_is"],
    ),
    (
        "`torch.func`: vmap, gradients for each example",
        "torch",
        [f"{COMPILE}::test_vmap_over_passes", f"{COMPILE}::test_vmap_over_examples_and_per_sample_gradients"],
    ),
    ("DDP", "torch", [f"{DISTRIBUTED}::test_ddp_trains_and_reverts"]),
    (
        "FSDP2 (`fully_shard`)",
        "torch",
        [f"{DISTRIBUTED}::test_fsdp2_trains_and_reverts", f"{DISTRIBUTED}::test_fsdp2_calls"],
    ),
    ("FSDP1: refused after wrapping", "torch", [f"{DISTRIBUTED}::test_fsdp1_is_refused_with_the_remedy"]),
    ("tensor parallel Llama, two processes", "torch", [f"{HERE}::test_a_llama_in_tensor_parallel"]),
    (
        "accelerate: `dispatch_model`",
        "accelerate",
        ["tests/graft/test_foreign.py::test_trap_5_accelerates_hooks_and_grafts"],
    ),
    (
        "accelerate: weights offloaded to the CPU",
        "accelerate",
        [f"{HERE}::test_accelerates_offload_to_the_cpu"],
    ),
    ("PEFT: LoRA trained, saved, merged", "peft", [f"{TRAINING}::test_peft"]),
    ("`save_pretrained`", "transformers", [f"{COPIES}::test_save_pretrained_writes_a_plain_checkpoint"]),
    (
        "Trainer: resumed from a checkpoint",
        "transformers",
        [f"{TRAINING}::test_trainer_resumes_where_it_was"],
    ),
    (
        "Trainer: `load_best_model_at_end`",
        "transformers",
        [f"{TRAINING}::test_trainer_loads_the_best_model_at_the_end"],
    ),
    ("TRL: DPO", "trl", [f"{TRAINING}::test_trl_prefers"]),
    ("Lightning: fit, save, resume", "lightning", [f"{TRAINING}::test_lightning_trains_saves_and_resumes"]),
    ("timm's `ModelEmaV3`", "timm", [f"{TRAINING}::test_timms_average_of_weights"]),
    ("`torch.optim.swa_utils`", "torch", [f"{TRAINING}::test_stochastic_weight_averaging"]),
    (
        "sentence-transformers",
        "sentence-transformers",
        [f"{TRAINING}::test_sentence_transformers_encodes_and_trains"],
    ),
    ("diffusers: a U-Net", "diffusers", [f"{HERE}::test_diffusers_unet"]),
    ("PyTorch Geometric: GAT", "torch_geometric", [f"{HERE}::test_torch_geometric"]),
    ("multiprocessing, spawned", "torch", [f"{HERE}::test_a_process_that_is_spawned_gets_the_grafts"]),
    (
        "`torch.load` in a fresh interpreter",
        "torch",
        [f"{COPIES}::test_a_saved_model_loads_in_a_fresh_interpreter"],
    ),
]
HEAD = """
## Runs

By `python tests/ecosystem/table.py`, on {system}: each line is a run of the tests named in it. "Before" and
"after": the model was grafted before, or after, the other tool took hold of it; lines without the two have
one order that makes sense, or tests of both. "Not run": the package was not installed.

| what | version | result | tests |
|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="part of a line; prints the table instead of writing it")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.only.lower() in " ".join(row[:2]).lower()]
    outcomes = run([test for _, _, tests in rows for test in tests])
    text = HEAD.format(system=f"Python {platform.python_version()}, {platform.system()}, a CPU")
    for what, package, tests in rows:
        cells = [(name, outcome) for name, outcome in outcomes if any(covers(test, name) for test in tests)]
        names = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in tests)
        text += f"| {what} | {package} {version(package)} | {result(cells)} | {names} |\n"
    if options.only:
        print(text)
    else:
        written = options.output.read_text().partition(HEAD[:8])[0]
        options.output.write_text(written + text)
    sys.exit(any(outcome == "failed" for _, outcome in outcomes))


def run(tests):
    """The tests' names, without the folder, and what became of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marks = ["-m", "not gpu and not browser", "-n", "0", "-q", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *marks, f"--junitxml={report}", *dict.fromkeys(tests)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [(f"{case.get('classname')}::{case.get('name')}", outcome_of(case)) for case in cases]


def outcome_of(case):
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "not run" if "skipped" in kinds else "passed"


def covers(test, name):
    file, _, function = test.partition("::")
    return name.split("[")[0] == f"{file.removesuffix('.py').replace('/', '.')}::{function}"


def result(cells):
    """In words: one for all, or by the order of grafting."""
    by_order = {}
    for name, outcome in cells:
        order = (
            "before"
            if orders(name, "before", "graft first")
            else "after"
            if orders(name, "after", "wrap first", "shard first")
            else ""
        )
        by_order.setdefault(order, []).append(outcome)
    words = []
    for order, outcomes in by_order.items():
        failed, passed = outcomes.count("failed"), outcomes.count("passed")
        word = (
            f"**{failed} of {len(outcomes)} fail**" if failed else f"{passed} pass" if passed else "not run"
        )
        words.append(f"{order}: {word}" if order else word)
    return ", ".join(words) or "not run"


def orders(name, *words):
    return any(word in name.partition("[")[2] for word in words)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


if __name__ == "__main__":
    main()

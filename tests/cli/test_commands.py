"""The command line: exit codes, streams, and what it must not import or run."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regraft
from regraft.cli.commands import app


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def tiny_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))


FACTORY = f"{__name__}:tiny_net"


def in_new_interpreter(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "start",
    [
        "import regraft",
        "from typer.testing import CliRunner\nfrom regraft.cli.commands import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
)
def test_starts_without_torch(start):
    heavy = ("torch", "timm", "transformers", "matplotlib")
    loaded = in_new_interpreter(f"{start}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_module_is_the_command_line_too():
    done = subprocess.run([sys.executable, "-m", "regraft", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"regraft {regraft.__version__}"


def test_inspect_prints_to_stdout():
    result = invoke("inspect", FACTORY)
    assert result.exit_code == 0, result.output
    assert "Dropout" in result.stdout
    assert "\x1b[" not in result.stdout


def test_inspect_as_json():
    made = json.loads(invoke("inspect", FACTORY, "--format", "json").stdout)
    assert made["schema"] == 1
    assert [site["op"] for site in made["sites"]] == ["Linear", "Dropout", "Linear"]


@pytest.mark.parametrize("shape", ["markdown", "html"])
def test_other_formats(shape):
    result = invoke("inspect", FACTORY, "-f", shape)
    assert result.exit_code == 0
    assert "Linear" in result.stdout


def test_plan_shows_the_diff():
    result = invoke("plan", FACTORY, "--rule", "Dropout=gaussian", "--rule", "Linear@2=dropconnect(p=0.2)")
    assert result.exit_code == 0, result.output
    assert "GaussianDropout(p=0.1)" in result.stdout
    assert "DropConnectLinear(8, 2, p=0.2" in result.stdout


def test_timm_model_on_the_meta_device():
    made = json.loads(invoke("inspect", "timm:test_vit", "--format", "json").stdout)
    assert made["probe"]["ran"]
    assert {site["device"] for site in made["sites"] if site["device"]} == {"meta"}


def test_hugging_face_folder(tmp_path):
    from transformers import BertConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(**small, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    for name in (str(tmp_path), f"hf:{tmp_path}"):
        made = json.loads(invoke("inspect", name, "--format", "json").stdout)
        assert made["model"] == "BertForSequenceClassification"
        assert made["probe"]["ran"]


def test_state_dict_shows_its_layers(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": tiny_net().state_dict()}, file)
    result = invoke("inspect", str(file), "--format", "json")
    assert result.exit_code == 0
    assert [site["shape"] for site in json.loads(result.stdout)["sites"]] == [[4, 8], [8, 2]]
    assert "Dropout cannot be seen in weights" in result.stderr


def test_pickled_module_is_refused_not_run(tmp_path):
    file = tmp_path / "whole.pt"
    torch.save(tiny_net(), file)
    result = invoke("inspect", str(file))
    assert result.exit_code == 1
    assert "pickled module" in result.stderr
    assert result.stdout == ""


class Canary:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_suspicious_file_is_not_run(tmp_path, save):
    canary, file = tmp_path / "canary", tmp_path / "evil.pt"
    save(Canary(canary), file)
    result = invoke("inspect", str(file))
    assert result.exit_code == 3
    assert "suspicious content" in result.stderr
    assert "system" in result.stderr
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.pt", b"", "damaged"),
        ("noise.pt", b"\x00\x01\x02nothing", "damaged"),
        ("cut.pt", b"PK\x03\x04\x00\x00", "damaged"),
        ("notes.txt", b"hello", "no model that can be opened"),
    ],
)
def test_unreadable_file(tmp_path, name, content, told):
    file = tmp_path / name
    file.write_bytes(content)
    result = invoke("inspect", str(file))
    assert result.exit_code == 1
    assert told in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["inspect", "nowhere.pt"], 1, "no such file"),
        (["inspect", "timm:vit_tny_patch16_224"], 1, "did you mean"),
        (["plan", FACTORY, "--rule", "Dropout=gausian"], 2, "did you mean 'gaussian'?"),
        (["plan", FACTORY, "--rule", "Dropout"], 2, "is not SELECTOR=VARIANT"),
        (["plan", FACTORY, "--rule", "Dropuot=gaussian"], 1, "matches nothing"),
        (["plan", FACTORY], 2, "--rule"),
        (["variants", "gausian"], 2, "did you mean"),
        (["inspect", "no.such.module:factory"], 1, "cannot be found"),
    ],
)
def test_exit_codes(arguments, code, told):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_variants_lists_every_one_and_shows_a_card():
    from regraft.variants.registry import names

    listed = {row["name"] for row in json.loads(invoke("variants", "-f", "json").stdout)["variants"]}
    assert listed == set(names())
    card = invoke("variants", "dropconnect").stdout
    assert "Wan" in card
    assert "mask" in card


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(regraft.errors.UnknownVariantError):
        CliRunner().invoke(
            app, ["plan", FACTORY, "--rule", "Dropout=gausian", "--debug"], catch_exceptions=False
        )


def test_this_file_is_importable_as_a_factory():
    assert Path(__file__).name == f"{__name__.rpartition('.')[2]}.py"

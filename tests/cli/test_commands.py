"""The command line: exit codes, streams, and what it must not import or run."""

import errno
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regraft
from regraft.cli.architectures import build
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


def tiny_plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU())


def tiny_bert():
    import tiny

    return tiny.bert()


PASTED = [
    (
        "tiny_plain",
        "apply {} '--rule=after:ReLU=dropout(p=0.5)' '--rule=before:Sequential=dropout(p=0.2)' -o",
    ),
    ("tiny_bert", "regraft.rdrop(model, alpha=1)  # where you train it"),
]


@pytest.mark.parametrize(("factory", "line"), PASTED, ids=["command", "python"])
def test_inspect_says_how_to_go_on_in_a_command(factory, line):
    name = f"{__name__}:{factory}"
    result = invoke("inspect", name, "--format", "json")
    assert line.format(name) in json.loads(result.stdout)["summary"]["paste"]


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


def test_a_model_of_unknown_inputs_asks_for_the_option():
    text = " ".join(invoke("inspect", FACTORY).stdout.split())
    assert "does not know this model's inputs; give --shape" in text


def test_a_reader_that_has_read_enough_is_no_error(monkeypatch):
    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("regraft.cli.output.show", closed)
    result = invoke("inspect", FACTORY)
    assert (result.exit_code, result.stderr) == (1, "")


def test_a_shape_to_probe_with():
    made = json.loads(invoke("inspect", FACTORY, "--shape", "2x4", "-f", "json").stdout)
    assert made["probe"]["ran"]
    assert [site["calls"] for site in made["sites"]] == [1, 1, 1]
    assert invoke("inspect", FACTORY, "--shape", "2xfour").exit_code == 2


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "r3d_18", "raft_small", "inception_v3"])
def test_torchvision_is_probed_with_what_it_takes(name):
    made = json.loads(invoke("inspect", f"torchvision:{name}", "-f", "json").stdout)
    assert made["probe"]["ran"]


def test_a_detectors_backbone_is_not_downloaded(monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    assert not any(value.device.type != "meta" for value in build("torchvision:ssd300_vgg16").parameters())


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
    assert any("dropout cannot be seen in weights" in note for note in json.loads(result.stdout)["notes"])


def test_pickled_module_is_read_not_run(tmp_path):
    file = tmp_path / "whole.pt"
    torch.save(tiny_net(), file)
    result = invoke("inspect", str(file))
    assert result.exit_code == 0, result.output
    assert "read from the file, not run" in result.stdout
    assert "Dropout: 1 site" in result.stdout


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
        (["inspect", f"{__name__}:no_such"], 1, "cannot be found"),
        (["inspect", f"{__name__}:json.dumps"], 1, "the factory raised"),
        (["inspect", f"{__name__}:FACTORY"], 1, "no module"),
        (["inspect", "hf:/no/such/folder"], 1, "the config cannot be read"),
        (["inspect", "torchvision:resnet17"], 1, "did you mean"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", FACTORY, "--format", "pdf"], 2, "Invalid value"),
        (["apply", FACTORY, "--rule", "Dropout=gaussian"], 2, "--output"),
        (["apply", FACTORY, "--rule", "Dropout=gaussian(p=2)", "-o", "x.pt"], 2, "p=2"),
        (["nonsense"], 2, "No such command"),
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
    result = invoke("plan", FACTORY, "--rule", "Dropout=gausian", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: no variant" in result.stderr or "error: " in result.stderr.splitlines()[-2]


def test_this_file_is_importable_as_a_factory():
    assert Path(__file__).name == f"{__name__.rpartition('.')[2]}.py"


def test_it_can_complete_itself():
    shown = invoke("--show-completion", "bash") if "--show-completion" in invoke("--help").stdout else None
    assert shown is not None
    assert "--install-completion" in invoke("--help").stdout


def test_help_is_quick_and_needs_no_reader():
    loaded = in_new_interpreter(
        "import sys\n"
        "from typer.testing import CliRunner\nfrom regraft.cli.commands import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('regraft.files')])"
    )
    assert loaded.strip() == "[]"


def test_an_unexpected_error_is_one_line_without_debug(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("deep inside\nand more")

    monkeypatch.setattr("regraft.cli.opening.view_of", broken)
    result = invoke("inspect", FACTORY)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: ZeroDivisionError: deep inside",
        "  help: --debug shows where this comes from",
    ]


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_and_width_are_the_terminals(no_color, tmp_path):
    """In a pseudo terminal of 70 columns: colours, unless NO_COLOR asks for none."""
    file = tmp_path / "whole.pt"
    torch.save(tiny_net(), file)
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 70, 0, 0))
        # Not `execv`: readline sets COLUMNS where Python does not see it.
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "HOME")}
        wanted = {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
        command = [sys.executable, "-m", "regraft", "inspect", str(file)]
        os.execve(sys.executable, command, kept | wanted)
    said = b""
    try:
        while piece := os.read(terminal, 4096):
            said += piece
    except OSError:
        pass
    assert os.waitpid(pid, 0)[1] == 0
    coloured = said.decode()
    assert bool(re.search(r"\x1b\[3\dm", coloured)) is not no_color
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", coloured)
    assert "Dropout: 1 site" in text
    *lines, closing = text.splitlines()
    assert max(map(len, lines)) <= 70
    assert closing.startswith("No unknown names. Loading would import: torch. sha256 ")


@pytest.mark.parametrize(("seconds", "said"), [(1.6, True), (0.1, False)])
def test_work_of_more_than_a_second_says_so_on_stderr(seconds, said):
    pid, terminal = pty.fork()
    if pid == 0:
        code = f"import time\nfrom regraft.cli.output import working\nwith working('reading'): time.sleep({seconds})"
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "HOME")}
        os.execve(sys.executable, [sys.executable, "-c", code], kept | {"TERM": "xterm-256color"})
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:
        pass
    assert os.waitpid(pid, 0)[1] == 0
    assert (b"reading" in shown) is said

"""Nothing that a file holds commands the terminal: no control character, in any field, format or message."""

import json
import pickle
import struct
import unicodedata

import bad_files
import pytest
import torch
from hostile import Op, attribute, build, call, lit, name, new, whole
from torch import nn
from typer.testing import CliRunner

import regraft
from regraft.cli.commands import app

NASTY = "\x1b]0;x\x07\x9b31m\u202e\u2066\u200b\x85\u2028\x00\r\x08\x7f\ud800\U000e0001"
"""Escapes of C0 and C1, changes of the reading order, ends of lines, half a character, a tag."""


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def is_clean(text):
    return all(
        mark == "\n" or unicodedata.category(mark) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for mark in text
    )


def tree(text, *, home="torch.nn.modules.container", kind="Sequential"):
    """A module in which every name is this text."""
    dropout = build(
        new(name("torch.nn.modules.dropout", "Dropout")),
        {"_parameters": {}, "_modules": {}, "_buffers": {}, "p": 0, "training": True, text: text},
    )
    edit = {"kind": "call", "op": text, "before": text, "after": text, "source": text, "path": text}
    graft = build(new(name("regraft.record", "Graft")), {"edit": edit, "saved": {text: text}})
    return build(
        new(name(home, kind)),
        {"_parameters": {}, "_modules": {text: dropout}, "_buffers": {}, "_regraft": {text: graft}},
    )


def files():
    text = NASTY.encode("utf-8", "surrogatepass").decode("utf-8", "replace") + NASTY[0]
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    yield "tree.pt", whole(tree(text))
    yield "class.pt", whole(tree(text, home=text, kind=text))
    yield "own.pt", whole(tree("a", home="own." + text, kind=text))
    yield "graft.pt", bad_files.torch_zip(whole(tree(text)))
    yield "unknown.pt", whole(name("own", text))
    yield "dangerous.pt", whole(call("os:system", text))
    yield "dangerous name.pt", whole(call(name("os", text), text))
    yield "attribute.pt", whole(attribute(name("os", "path"), text))
    yield "codec.pt", whole(call("_codecs:encode", text, text))
    yield "special.pt", whole(build(new(name("torch.nn.modules.linear", "Identity")), {f"__{text}__": text}))
    yield "list.pt", whole(lit([text]))
    yield "key.pt", whole(lit({text: {"model": {text: text}}}))
    yield "member.pt", bad_files.archive({f"{text}/data.pkl": whole(call("os:system", text))})
    yield "members.pt", bad_files.archive({f"{text}/data.pkl": b"\xff", f"b/{text}.pkl": b"}."})
    yield "claims.pt", bad_files.encrypted(bad_files.archive({f"{text}/data.pkl": b"}."}))
    yield "weights.safetensors", bad_files.safetensors({f"{text}.weight": tensor, "b.weight": tensor})
    yield "shape.safetensors", bad_files.safetensors({text: {"dtype": text, "shape": [text]}})
    yield "long.safetensors", bad_files.safetensors({text * 900: tensor})
    yield "far.safetensors.index.json", json.dumps({"weight_map": {"a": f"../{text}"}}).encode()
    yield (
        "gone.safetensors.index.json",
        json.dumps({"weight_map": {"a": f"{text}.safetensors".replace("\0", "")}}).encode(),
    )
    yield (
        "wrong.safetensors.index.json",
        json.dumps({"weight_map": {"a": text.replace("\0", "").replace("/", "")}}).encode(),
    )
    yield "state dict.pt", bad_files.saved({f"{text}.weight": torch.zeros(2, 2)})
    yield "checkpoint.pt", pickle.dumps({text: {"a.weight": 1}})
    yield "extra.pt", whole(Op(call(name("os", "system"), text) + b"0")) + struct.pack("<I", 0)
    yield f"named {text}.pt".replace("\0", "").replace("/", ""), whole(call("os:system", text))


CASES = list(files())


@pytest.mark.parametrize("shape", ["table", "json", "markdown", "html"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[title for title, _ in CASES[:-1]] + ["named"])
def test_no_control_character_is_printed(shape, case, tmp_path):
    title, content = CASES[case]
    path = tmp_path / title
    path.write_bytes(content)
    for command in (
        ("inspect", path),
        ("inspect", path, "--debug"),
        ("inspect", tmp_path),
        ("plan", path, "-r", "Dropout=gaussian"),
        ("diff", path, path),
        ("verify", path),
        ("apply", path, "-r", "Dropout=gaussian", "-o", tmp_path / "out.pt"),
        ("revert", path, "-o", tmp_path / "out.pt"),
    ):
        result = invoke(*command, "-f", shape)
        assert result.exit_code in (0, 1, 3, 4), result.output
        assert is_clean(result.stdout), [mark for mark in result.stdout if not is_clean(mark)]
        assert is_clean(result.stderr), [mark for mark in result.stderr if not is_clean(mark)]
        assert "Traceback" not in result.stderr or "--debug" in command


def test_a_name_does_not_add_lines_to_a_message(tmp_path):
    (tmp_path / "file.pt").write_bytes(whole(name("own", "a\n  help: it is fine\nNo unknown names.")))
    assert len(invoke("inspect", tmp_path / "file.pt").stderr.strip().splitlines()) == 3


def test_reports_of_a_trusted_model_are_clean_too(tmp_path):
    net = nn.Sequential()
    net.add_module("a" + NASTY.replace("\ud800", ""), nn.Dropout(0.1))
    torch.save(net, tmp_path / "net.pt")
    for command in (
        ("inspect", tmp_path / "net.pt", "--trust"),
        ("plan", tmp_path / "net.pt", "--trust", "-r", "Dropout=gaussian"),
        (
            "apply",
            tmp_path / "net.pt",
            "--trust",
            "-r",
            "Dropout=gaussian",
            "-o",
            tmp_path / "out.pt",
            "--force",
        ),
    ):
        for shape in ("table", "json", "markdown", "html"):
            result = invoke(*command, "-f", shape)
            assert result.exit_code == 0, result.output
            assert is_clean(result.output)


def test_a_terminal_sees_no_escape_of_a_file(tmp_path):
    """Rich prints there what it is given."""
    from rich.console import Console

    from regraft.cli.file_view import Facts
    from regraft.cli.output import _visible_facts

    class View(regraft.report.view.View):
        def to_dict(self):
            return {
                "schema": 1,
                "view": "inspection",
                "model": NASTY,
                "notes": [NASTY],
                "sites": [],
                "findings": [],
            }

    console = Console(force_terminal=True, width=80)
    with console.capture() as shown:
        console.print(Facts(_visible_facts(View().to_dict())))
    assert "\x1b]0" not in shown.get()
    assert "\x07" not in shown.get()
    assert "\x9b" not in shown.get()

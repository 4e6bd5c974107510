"""apply, revert, diff and verify on files: what comes in goes out in the same form, grafted or plain again."""

import json
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regraft
from regraft.cli.commands import app


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))


NET = f"{__name__}:net"
RULES = ("-r", "Dropout=gaussian", "-r", "Linear@2=dropconnect(p=0.2)")


@pytest.fixture
def folders(tmp_path):
    for name in ("came", "grafted", "plain"):
        (tmp_path / name).mkdir()
    return tmp_path / "came", tmp_path / "grafted", tmp_path / "plain"


def test_a_whole_module(folders):
    came, grafted, plain = folders
    torch.save(net(), came / "net.pt")
    refused = invoke("apply", came / "net.pt", *RULES, "-o", grafted / "net.pt")
    assert refused.exit_code == 1
    assert "--trust" in refused.stderr
    assert list(grafted.iterdir()) == []
    done("apply", came / "net.pt", *RULES, "-o", grafted / "net.pt", "--trust")
    loaded = torch.load(grafted / "net.pt", weights_only=False)
    assert [type(module).__name__ for module in loaded] == ["Linear", "GaussianDropout", "DropConnectLinear"]
    assert len(json.loads((grafted / "net.regraft.json").read_text())["grafted"]) == 2
    done("revert", grafted / "net.pt", "-o", plain / "net.pt", "--trust")
    back = torch.load(plain / "net.pt", weights_only=False)
    assert [type(module) for module in back] == [nn.Linear, nn.Dropout, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), net().parameters(), strict=True))
    assert [path.name for path in plain.iterdir()] == ["net.pt"]


@pytest.mark.parametrize("inside", [False, True])
def test_weights_in_a_checkpoint(inside, folders):
    came, grafted, plain = folders
    state = net().state_dict()
    torch.save({"epoch": 3, "model": state} if inside else state, came / "net.pt")
    done("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt")
    written = torch.load(grafted / "net.pt", weights_only=True)
    assert (written["epoch"] == 3) if inside else True
    written = written["model"] if inside else written
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    fresh = net()
    assert len(regraft.load_plan(fresh, grafted / "net.regraft.json").grafted) == 2
    done("revert", grafted / "net.pt", "--arch", NET, "-o", plain / "net.pt")
    made = json.loads(done("diff", came / "net.pt", plain / "net.pt", "--arch", NET, "-f", "json").stdout)
    assert (made["changed"], made["added"], made["removed"]) == ([], [], [])
    assert made["weights"] == {"compared": "values", "same": 4, "differ": []}


def test_safetensors(folders):
    from safetensors.torch import load_file, save_file

    came, grafted, plain = folders
    save_file(net().state_dict(), came / "net.safetensors")
    done("apply", came / "net.safetensors", "--arch", NET, *RULES, "-o", grafted / "net.safetensors")
    done("revert", grafted / "net.safetensors", "--arch", NET, "-o", plain / "net.safetensors")
    before, after = load_file(came / "net.safetensors"), load_file(plain / "net.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_safe_writes_safetensors(folders):
    from safetensors.torch import load_file

    came, grafted, _ = folders
    torch.save(net().state_dict(), came / "net.pt")
    done("apply", came / "net.pt", "--arch", NET, *RULES, "--safe", "-o", grafted / "net.safetensors")
    assert load_file(grafted / "net.safetensors").keys() == net().state_dict().keys()
    wrong = invoke(
        "apply", came / "net.pt", "--arch", NET, *RULES, "--safe", "--force", "-o", grafted / "other.pt"
    )
    assert wrong.exit_code == 1
    assert ".safetensors" in wrong.stderr


def test_a_variant_with_state_takes_it_along(folders):
    came, grafted, plain = folders
    torch.save(net().state_dict(), came / "net.pt")
    rule = ("-r", "Linear@2=standout(gate='learned')")
    done("apply", came / "net.pt", "--arch", NET, *rule, "-o", grafted / "net.pt")
    written = torch.load(grafted / "net.pt", weights_only=True)
    new = set(written) - set(net().state_dict())
    assert new
    done("revert", grafted / "net.pt", "--arch", NET, "-o", plain / "net.pt")
    assert set(torch.load(plain / "net.pt", weights_only=True)) == set(net().state_dict())


def test_a_hugging_face_folder(folders):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    came, grafted, plain = folders
    model.save_pretrained(came)
    (came / "vocab.txt").write_text("words")
    grafted.rmdir()
    plain.rmdir()
    done("apply", came, "-r", "Dropout=gaussian", "-o", grafted)
    assert {path.name for path in grafted.iterdir()} == {
        "config.json",
        "model.safetensors",
        "regraft.json",
        "vocab.txt",
    }
    done("revert", grafted, "-o", plain)
    said = done("diff", came, plain).stdout
    assert "no difference" in said


def test_nothing_is_written_over(folders):
    came, grafted, _ = folders
    torch.save(net().state_dict(), came / "net.pt")
    (grafted / "net.pt").write_bytes(b"mine")
    taken = invoke("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt")
    assert taken.exit_code == 1
    assert "--force" in taken.stderr
    assert (grafted / "net.pt").read_bytes() == b"mine"
    done("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt", "--force")
    nowhere = invoke("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "no" / "net.pt")
    assert nowhere.exit_code == 1
    assert "no such folder" in nowhere.stderr


def test_weights_that_do_not_fit(folders):
    came, grafted, _ = folders
    torch.save(nn.Linear(3, 3).state_dict(), came / "net.pt")
    result = invoke("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt")
    assert result.exit_code == 1
    assert "do not fit the architecture" in result.stderr
    alone = invoke("apply", came / "net.pt", *RULES, "-o", grafted / "net.pt")
    assert "--arch" in alone.stderr


def test_the_plan_of_another_model_in_the_folder_is_left_alone_and_named(folders):
    came, grafted, _ = folders
    other = nn.Sequential(nn.Dropout(0.1))
    regraft.apply(other, {"Dropout": "gaussian"})
    regraft.save_plan(other, came)
    torch.save(net().state_dict(), came / "net.pt")
    output = done(
        "apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt", "--format", "json"
    )
    assert any("the plan of another model" in note for note in json.loads(output.stdout)["notes"])


def test_verify_passes_and_says_each_promise():
    made = json.loads(done("verify", NET, "--shape", "3x4", "-f", "json").stdout)
    assert made["passed"]
    assert [check["promise"] for check in made["checks"]][:4] == [
        "all or nothing",
        "nothing silent",
        "each graft runs",
        "same weights",
    ]
    said = done("verify", "timm:test_vit").stdout
    assert said.count("pass: ") == 8


def test_what_no_forward_has_shown_is_not_called_verified():
    result = invoke("verify", NET)
    assert result.exit_code == 1
    assert "not checked: each graft runs" in result.stdout


def test_verify_fails_with_exit_code_1(monkeypatch):
    """A model that cannot be copied keeps its word nowhere."""
    monkeypatch.setattr("regraft.graft.verify.revert", lambda model: model)
    result = invoke("verify", NET, "--shape", "3x4")
    assert result.exit_code == 1
    assert "FAIL: a way back" in result.stdout


def test_diff_of_two_architectures():
    said = done("diff", NET, "timm:test_vit").stdout
    assert "Sequential and VisionTransformer" in said


@pytest.mark.parametrize("shape", ["table", "json", "markdown", "html"])
def test_every_command_prints_every_format(shape, folders):
    came, grafted, _ = folders
    torch.save(net(), came / "net.pt")
    for command in (
        ("inspect", NET),
        ("plan", NET, *RULES),
        ("diff", NET, came / "net.pt"),
        ("verify", NET, "--shape", "3x4"),
        ("apply", came / "net.pt", *RULES, "--trust", "--force", "-o", grafted / "net.pt"),
        ("variants",),
        ("variants", "gaussian"),
    ):
        assert done(*command, "-f", shape).stdout.strip()


def test_this_module_is_where_the_factory_is():
    assert sys.modules[__name__].net is net


def test_several_files_in_a_folder_have_a_plan_each(tmp_path):
    torch.save(net().state_dict(), tmp_path / "net.pt")
    other = ("-r", "Dropout=off")
    done("apply", tmp_path / "net.pt", "--arch", NET, *RULES, "-o", tmp_path / "a.pt")
    done("apply", tmp_path / "net.pt", "--arch", NET, *other, "-o", tmp_path / "b.pt")
    a, b = net(), net()
    assert len(regraft.load_plan(a, tmp_path / "a.regraft.json").grafted) == 2
    assert len(regraft.load_plan(b, tmp_path / "b.regraft.json").grafted) == 1
    done("revert", tmp_path / "b.pt", "--arch", NET, "-o", tmp_path / "a.pt", "--force")
    assert not (tmp_path / "a.regraft.json").exists()  # that of the model which was written over


def test_a_plan_of_the_old_name_is_still_read(folders):
    came, grafted, _ = folders
    model = net()
    regraft.apply(model, {"Dropout": "gaussian"})
    torch.save(model.state_dict(), came / "net.pt")
    regraft.save_plan(model, came)
    reverted = ("revert", came / "net.pt", "--arch", NET, "-o", grafted / "net.pt", "-f", "json")
    assert len(json.loads(done(*reverted).stdout)["changed"]) == 1


def test_nothing_is_left_half_written(folders, monkeypatch):
    came, grafted, _ = folders
    torch.save(net().state_dict(), came / "net.pt")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regraft.save_plan", full, raising=False)
    result = invoke("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert list(grafted.iterdir()) == []
    (grafted / "net.pt").write_bytes(b"mine")
    result = invoke("apply", came / "net.pt", "--arch", NET, *RULES, "-o", grafted / "net.pt", "--force")
    assert result.exit_code == 1
    assert (grafted / "net.pt").read_bytes() == b"mine"
    assert [path.name for path in grafted.iterdir()] == ["net.pt"]


def small_bert(folder):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    came, out, secret = tmp_path / "came", tmp_path / "out", tmp_path / "secret"
    small_bert(came)
    secret.mkdir()
    (secret / "key").write_text("secret")
    (came / "more").mkdir()
    (came / "more" / "notes.txt").write_text("mine")
    (came / "tokenizer.json").symlink_to(came / "more" / "notes.txt")
    for place in (came / "vocab.txt", came / "more" / "vocab.txt"):
        place.symlink_to(secret / "key")
    (came / "folder").symlink_to(secret)
    (came / "more" / "folder").symlink_to(secret)
    (came / "gone").symlink_to(secret / "gone")
    said = done("apply", came, "-r", "Dropout=gaussian", "-o", out).stdout
    assert "links lead out of the folder" in said
    assert (out / "tokenizer.json").read_text() == "mine"
    assert (out / "more" / "notes.txt").read_text() == "mine"
    assert not any(
        path.is_symlink() or path.name in ("key", "vocab.txt", "folder") for path in out.rglob("*")
    )


def test_the_snapshot_of_a_cache_is_linked_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    small_bert(snapshot)
    for number, path in enumerate([*snapshot.iterdir()]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (blobs / "vocab").write_text("words")
    (snapshot / "vocab.txt").symlink_to(blobs / "vocab")
    done("apply", snapshot, "-r", "Dropout=gaussian", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"


@pytest.mark.parametrize("way", ["state dict", "revert first"])
def test_what_weights_only_loads_of_a_grafted_model(way, tmp_path):
    """A whole grafted module names regraft's own classes, which `weights_only=True` refuses."""
    model = net()
    regraft.apply(model, {"Dropout": "gaussian"})
    torch.save(model, tmp_path / "net.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        torch.load(tmp_path / "net.pt", weights_only=True)
    if way == "state dict":
        torch.save(model.state_dict(), tmp_path / "net.pt")
        assert torch.load(tmp_path / "net.pt", weights_only=True).keys() == net().state_dict().keys()
    else:
        regraft.revert(model)
        torch.save(model, tmp_path / "net.pt")
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Dropout]):
            assert isinstance(torch.load(tmp_path / "net.pt", weights_only=True), nn.Sequential)

"""What is read of a file is what is in it: held to the finders, which look at the loaded model."""

import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import regraft
from regraft.cli.commands import app
from regraft.cli.file_view import Files, sites_of
from regraft.files.skeleton import torch_modules


def model_in(path):
    """The model of a file, whatever its names."""
    return Files(path).model


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


class StochasticDepth(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        keep = 1 - self.drop_prob
        rows = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * rows / keep if self.training else x


class MyDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = 0.3

    def forward(self, x):
        return F.dropout(x, self.p, self.training)


class Zoo(nn.Module):
    """One of everything that is told apart by its class."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2)
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.4)
        self.path = StochasticDepth(0.05)
        self.mine = MyDropout()
        self.drops = nn.ModuleList([nn.Dropout(0.1), nn.Dropout2d(0.2), nn.AlphaDropout(0.3), nn.Dropout3d()])
        self.first = nn.Linear(8, 8, bias=False)
        self.again = self.first
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.head.weight = nn.Parameter(self.head.weight.detach().half())
        self.drops[1].eval()


def zoo():
    return Zoo()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def vit():
    import timm

    return timm.create_model("test_vit", drop_path_rate=0.2, drop_rate=0.1)


def write(value, path, way):
    if way == "zip":
        torch.save(value, path)
    elif way == "old":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(value, protocol=way))


KEYS = ("path", "paths", "op", "type", "p", "shape", "parameters", "training", "kind", "variant", "calls")


@pytest.mark.parametrize("make", [zoo, bert, gpt2, vit])
@pytest.mark.parametrize("way", ["zip", "old", 2, 4, 5])
def test_the_sites_are_those_of_the_loaded_model(make, way, tmp_path):
    model, path = make(), tmp_path / "model.pt"
    write(model, path, way)
    read = sites_of(model_in(path))
    from regraft.find.inspect import look

    seen = [site.to_dict() for site in look(model).sites]
    assert [{key: site[key] for key in KEYS} for site in read] == [
        {key: site[key] for key in KEYS} for site in seen
    ]
    if way in ("zip", "old"):
        assert [site["dtype"] for site in read] == [site["dtype"] for site in seen]


@pytest.mark.parametrize("make", [zoo, bert])
def test_the_skeleton_has_the_same_sites_again(make, tmp_path):
    from regraft.find.inspect import look

    torch.save(make(), tmp_path / "model.pt")
    read = model_in(tmp_path / "model.pt")
    seen = [site.to_dict() for site in look(torch_modules(read)).sites]
    names = [key for key in KEYS if key != "type"]
    assert [{key: site[key] for key in names} for site in sites_of(read)] == [
        {key: site[key] for key in names} for site in seen
    ]


def test_a_plan_for_a_file_needs_no_trust(tmp_path):
    torch.save(bert(), tmp_path / "model.pt")
    plan = json.loads(invoke("plan", tmp_path / "model.pt", "-r", "Dropout=gaussian", "-f", "json").stdout)
    assert len(plan["grafted"]) == 8
    assert any("not run" in note for note in plan["notes"])
    assert plan["probe"]["ran"] is False


def test_trust_loads_and_probes(tmp_path):
    torch.save(bert(), tmp_path / "model.pt")
    made = json.loads(invoke("inspect", tmp_path / "model.pt", "--trust", "-f", "json").stdout)
    assert made["probe"]["ran"]
    assert any(site["op"] == "scaled_dot_product_attention" for site in made["sites"])


@pytest.mark.parametrize("inside", [("model",), ("state_dict",), ("ema", "module"), ("net",)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_model_in_a_checkpoint(inside, whole, tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
    value = net if whole else net.state_dict()
    for key in reversed(inside):
        value = {"epoch": 3, key: value, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    torch.save(value, tmp_path / "checkpoint.pt")
    read = model_in(tmp_path / "checkpoint.pt")
    assert read.key == ".".join(inside)
    assert [site["op"] for site in sites_of(read)] == ["Linear", *(["Dropout"] if whole else [])]


def test_weights_say_that_they_cannot_tell(tmp_path):
    torch.save(bert().state_dict(), tmp_path / "weights.pt")
    said = invoke("inspect", tmp_path / "weights.pt").stdout
    assert "Weights alone do not tell whether this model regularizes" in said
    assert "--arch" in said


def test_weights_with_their_architecture(tmp_path):
    bert().config.save_pretrained(tmp_path)
    torch.save(bert().state_dict(), tmp_path / "weights.pt")
    name = ("--arch", tmp_path, "-f", "json")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = json.loads(invoke("inspect", tmp_path / "weights.pt", *name).stdout)
    assert made["probe"]["ran"]
    assert any("fit the architecture" in note for note in made["notes"])
    torch.save(zoo().state_dict(), tmp_path / "weights.pt")
    made = json.loads(invoke("inspect", tmp_path / "weights.pt", *name).stdout)
    assert any("do not fit the architecture" in note for note in made["notes"])


def test_safetensors_alone_in_a_folder_and_in_shards(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for folder in ("one", "many"):
        (tmp_path / folder / "config.json").unlink()
    one = {site["path"]: site["shape"] for site in sites_of(model_in(tmp_path / "one" / "model.safetensors"))}
    many = {site["path"]: site["shape"] for site in sites_of(model_in(tmp_path / "many"))}
    assert one == many
    assert one["classifier"] == [16, 2]
    assert one["bert.embeddings.word_embeddings"] == [50, 16]


def test_torchscript_and_exported_programs_are_named_with_what_to_do(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.25))
    torch.jit.script(net).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), tmp_path / "program.pt2")
    for name, what in (("script.pt", "TorchScript"), ("program.pt2", "torch.export")):
        for command in (("inspect",), ("plan", "-r", "Dropout=gaussian")):
            refused = invoke(command[0], tmp_path / name, *command[1:])
            assert refused.exit_code == 1, refused.output
            assert what in refused.stderr
            assert "help: graft the Python model, then" in refused.stderr


def test_shared_modules_keep_all_their_names(tmp_path):
    torch.save(zoo(), tmp_path / "zoo.pt")
    site = next(site for site in sites_of(model_in(tmp_path / "zoo.pt")) if site["path"] == "first")
    assert site["paths"] == ["first", "again"]


def test_grafts_are_seen(tmp_path):
    model = bert()
    regraft.apply(model, {"Dropout": "gaussian"})
    torch.save(model, tmp_path / "grafted.pt")
    made = json.loads(invoke("inspect", tmp_path / "grafted.pt", "-f", "json").stdout)
    variants = [site["variant"] for site in made["sites"] if site["variant"]]
    assert variants.count("GaussianDropout(p=0.1)") == 6
    assert variants.count("gaussian_dropout(p=0.1)") == 2
    assert "carry a regraft variant" in made["summary"]["answer"]


def test_wrappers_are_looked_into(tmp_path):
    torch.save(nn.DataParallel(nn.Sequential(nn.Dropout(0.1))), tmp_path / "wrapped.pt")
    read = model_in(tmp_path / "wrapped.pt")
    assert [site["path"] for site in sites_of(read)] == ["0"]
    assert "looked inside DataParallel" in " ".join(read.notes)


def test_the_answer_is_in_every_view(tmp_path):
    torch.save(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)), tmp_path / "zero.pt")
    for shape in ("table", "json", "markdown", "html"):
        said = invoke("inspect", tmp_path / "zero.pt", "-f", shape).stdout
        assert "This model does not regularize" in said, shape
        assert "regraft.apply(model, " not in said, "what to do is said of a model that was probed"
        assert "trust loads and probes it" in said, shape

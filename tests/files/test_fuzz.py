"""Thousands of mutated files: none crashes the reader, none hangs it, none is run."""

import os
import pickle
import random

import bad_files
import pytest
import torch
from torch import nn

from regraft.cli.file_view import Files, inspection_of
from regraft.errors import FileError

OPCODES = b"(.01e2RbcuNtl}]sa\x81\x93hqrioPQ\x82\x85\x86\x87\x8c\x94"


def originals(folder, mark):
    """Whole files of every form, some of which would leave the mark if they were run."""
    from safetensors.torch import save_file

    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)))
    torch.jit.script(net).save(folder / "script.pt")
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), folder / "program.pt2")
    save_file(net.state_dict(), folder / "weights.safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"whole": bad_files.saved(net), "weights": bad_files.saved({"model": net.state_dict()})}
    files["old"] = bad_files.saved(net, _use_new_zipfile_serialization=False)
    files |= {f"pickle_{version}": pickle.dumps(net, version) for version in (0, 2, 4, 5)}
    for name, stream in bad_files.hostile(mark).items():
        files |= {f"{name}_plain": stream, f"{name}_zip": bad_files.torch_zip(stream)}
    return files


def mutated(content, chance):
    """The file with a few of its bytes changed, moved, cut or put in."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        data = data or bytearray(b"x")
        near = chance.random() < 0.5
        at = chance.randrange(min(len(data), 2_000) if near else len(data))
        kind = chance.randrange(8)
        if kind < 3:
            data[at] = chance.randrange(256)
        elif kind == 3:
            data[at] = chance.choice(OPCODES)
        elif kind == 4:
            del data[at : at + chance.randrange(1, 40)]
        elif kind == 5:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        elif kind == 6:
            data[at : at + 4] = chance.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"])
        else:
            start = chance.randrange(len(data))
            data[at:at] = data[start : start + 64]
    return bytes(data)


@pytest.mark.parametrize(
    "count", [pytest.param(400, id="some"), pytest.param(10_000, id="ten_thousand", marks=pytest.mark.slow)]
)
def test_mutated_files(count, tmp_path, monkeypatch):
    mark = tmp_path / "canary"
    (tmp_path / "whole").mkdir()
    whole = originals(tmp_path / "whole", mark)

    def sing(*args, **kwargs):
        raise AssertionError("something was run")

    # Beside the mark: whatever is named in a file would be found and called by one of these.
    for name in ("os.system", "os.posix_spawn", "subprocess.Popen", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, sing)
    chance, path = random.Random(0), tmp_path / "mutated.pt"
    hostile = sorted(name for name in whole if name.endswith(("_plain", "_zip")))
    models = sorted(whole.keys() - set(hostile))
    seen = refused = dangerous = 0
    for _ in range(count):
        name = chance.choice(models if chance.random() < 0.7 else hostile)
        path.write_bytes(mutated(whole[name], chance))
        try:
            files = Files(path)
            dangerous += bool(files.verdicts.dangerous)
            view = inspection_of(files.model, files)
            str(view), view.to_json(), view.to_markdown(), view.to_html()
            seen += 1
        except FileError as error:
            assert str(error)
            refused += 1
    assert not mark.exists()
    assert set(os.listdir(tmp_path)) == {"mutated.pt", "whole"}
    assert seen > count // 12
    assert dangerous > count // 20
    print(f"{count} files: {seen} shown, {refused} refused, {dangerous} dangerous")

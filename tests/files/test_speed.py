"""How long a look into a large file takes, and how much memory, in an interpreter of its own."""

import subprocess
import sys
import time

import costly
import pytest
import torch
from torch import nn

MEASURED = (
    "import sys, time\n"
    "from regraft.cli.commands import app\n"
    "began = time.process_time()\n"
    "try:\n    app(['inspect', sys.argv[1], '-f', sys.argv[2]])\n"
    "except SystemExit as end:\n    assert not end.code, end.code\n"
    "spent = time.process_time() - began\n"
    # Not getrusage: that counts what the test's own process took before it became this one.
    "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
    "print(spent, int(status['VmHWM'].split()[0]) / 1024, 'torch' in sys.modules, file=sys.stderr)\n"
)


def inspected(path, shape="table"):
    """The output, and the seconds (of the processor, wall), the megabytes and whether torch was loaded."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), shape], capture_output=True, text=True, check=True
    )
    busy, megabytes, torch_loaded = done.stderr.split()
    print(f"{path.name}: {busy} s of the processor, {time.monotonic() - began:.2f} s, {megabytes} MB")
    return done.stdout, float(busy), float(megabytes), torch_loaded == "True"


def ten_gigabytes(path):
    """A checkpoint of 10 GB, as `torch.save` writes it, with holes where the numbers would be."""
    hole, rows, columns, count = path.with_suffix(".hole"), 6553, 4096, 100
    with hole.open("wb") as file:
        file.truncate(4 * rows * columns)
    state = {}
    for layer in range(count):
        storage = torch.UntypedStorage.from_file(str(hole), shared=False, nbytes=4 * rows * columns)
        weight = torch.tensor([], dtype=torch.float32).set_(storage, 0, (rows, columns))
        state[f"layers.{layer}.fc.weight"] = weight
    with torch.serialization.skip_data():
        torch.save({"model": state}, path)
    hole.unlink()


def test_a_checkpoint_of_ten_gigabytes(tmp_path):
    path = tmp_path / "large.pt"
    ten_gigabytes(path)
    assert path.stat().st_size > 10e9
    said, _, megabytes, torch_loaded = inspected(path)
    assert "Linear: 100 sites" in said
    assert "2.7B parameters" in said
    assert megabytes < 400
    assert not torch_loaded


@pytest.mark.slow
def test_a_hundred_thousand_modules(tmp_path):
    path = tmp_path / "many.pt"
    torch.save(
        nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(0.1)) for _ in range(25_000)]),
        path,
    )
    said, busy, megabytes, torch_loaded = inspected(path)
    assert "Dropout: 25,000 sites" in said
    assert busy < 20  # 5 to 7 s
    assert megabytes < 400
    assert not torch_loaded


@pytest.mark.slow
def test_modules_are_read_in_proportion_to_their_number(tmp_path):
    """Twice as many modules take no more than about twice as long: no step looks at all for each."""
    from regraft.files.detect import read

    spent = []
    for count in (1_000, 4_000):
        torch.save(nn.Sequential(*[nn.Dropout(0.1) for _ in range(count)]), tmp_path / "many.pt")
        began = time.process_time()
        read(tmp_path / "many.pt")
        spent.append(time.process_time() - began)
    assert spent[1] < 12 * spent[0]


@pytest.mark.slow
def test_every_small_file_is_answered_in_two_seconds_and_300_megabytes(tmp_path, capsys):
    """Of the processor's time, in an interpreter of its own; the ten worst are printed."""
    rows = []
    for title, content in costly.costly_files().items():
        assert len(content) <= 2**20, title
        path = tmp_path / "costly.pt"
        path.write_bytes(content)
        measured = MEASURED.replace("assert not end.code, end.code", "assert end.code in (None, 0, 1, 3, 4)")
        done = subprocess.run(
            [sys.executable, "-c", measured, str(path), "table"], capture_output=True, text=True
        )
        assert done.returncode == 0, (title, done.stderr)
        busy, megabytes, _ = done.stderr.splitlines()[-1].split()
        rows.append((float(busy), float(megabytes), title))
    with capsys.disabled():
        for busy, megabytes, title in sorted(rows, reverse=True)[:10]:
            print(f"{busy:.2f} s, {megabytes:.0f} MB: {title}")
    assert max(busy for busy, _, _ in rows) < 2
    assert max(megabytes for _, megabytes, _ in rows) < 300

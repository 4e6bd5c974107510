"""Files that are damaged, hostile or something else: one clear line, the right exit code, and nothing is run."""

import os
import socket
import sys
from pathlib import Path

import bad_files
import pytest
from typer.testing import CliRunner

from regraft.cli.commands import app

NO_MODEL = "no model in the file"


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return tmp_path_factory.mktemp("mark") / "canary"


@pytest.fixture(scope="module")
def files(mark):
    return bad_files.bad_files(mark)


@pytest.mark.parametrize("bad", sorted(bad_files.bad_files(Path("canary"))))
def test_bad_file(bad, files, mark, tmp_path):
    content, code, told = files[bad]
    path = bad_files.write(tmp_path, bad, content)
    result = invoke("inspect", path)
    if code == 1 and told == NO_MODEL:  # read to its end, and nothing in it to be afraid of
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[2].startswith("There is no model in the file")
        assert "No unknown names." in result.stdout
        result = invoke("plan", path, "-r", "Dropout=gaussian")
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3
    assert not mark.exists()


def test_a_hostile_pickle_does_leave_its_mark_if_it_is_run(tmp_path):
    """The canary sings: else all of this would show nothing."""
    import pickle

    marks = 0
    for name, stream in bad_files.hostile(tmp_path / "canary").items():
        if name in (
            "os_system",
            "eval",
            "exec",
            "inst_opcode",
            "obj_opcode",
            "python_2_builtins",
            "subprocess",
        ):
            pickle.loads(stream)
            assert (tmp_path / "canary").exists(), name
            (tmp_path / "canary").unlink()
            marks += 1
    assert marks == 7


@pytest.mark.parametrize("command", ["inspect", "plan", "apply", "revert", "diff", "verify"])
@pytest.mark.parametrize("trust", [(), ("--trust",)])
def test_no_command_runs_suspicious_content_not_even_trusted(command, trust, files, mark, tmp_path):
    path = bad_files.write(tmp_path, "model.pt", files["os_system.pt"][0])
    rules = ("--rule", "Dropout=gaussian") if command in ("plan", "apply") else ()
    out = ("-o", tmp_path / "out.pt") if command in ("apply", "revert") else ()
    second = (path,) if command == "diff" else ()
    result = invoke(command, path, *second, *rules, *out, *trust)
    assert result.exit_code == 3, result.output
    assert not mark.exists()


def test_it_says_what_and_where(files, tmp_path):
    said = invoke("inspect", bad_files.write(tmp_path, "model.pt", files["os_system.pt"][0])).stderr
    assert "system('touch " in said
    assert "(m/data.pkl, byte " in said
    assert "nothing was run" in said


def test_a_hostile_pickle_inside_the_bytes_of_a_tensor(tmp_path):
    import pickle

    mark = tmp_path / "canary"
    inner = bad_files.hostile(mark)["os_system"]
    outer = pickle.dumps(bad_files.Canary(__import__("torch").storage._load_from_bytes, inner))
    (tmp_path / "model.pt").write_bytes(outer)
    result = invoke("inspect", tmp_path / "model.pt")
    assert result.exit_code == 3
    assert not mark.exists()


def test_missing_directory_device_pipe_socket(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    bound = socket.socket(socket.AF_UNIX)
    short = os.path.relpath(tmp_path / "socket.pt")
    if len(short) < 100:
        bound.bind(short)
    for path, told in [
        (tmp_path / "missing.pt", "no such file"),
        (tmp_path / "folder", "holds no model"),
        ("/dev/zero", "no file but a device"),
        (tmp_path / "pipe.pt", "no file but a device"),
        ("x" * 5_000, "no such file"),
        ("nul\0byte.pt", "no such file"),
    ]:
        result = invoke("inspect", path)
        assert result.exit_code == 1, result.output
        assert told in result.stderr, (path, result.stderr)
    bound.close()


def test_no_permission(tmp_path, monkeypatch):
    (tmp_path / "secret.pt").write_bytes(bad_files.saved(bad_files.small()))
    (tmp_path / "secret.pt").chmod(0)
    if os.geteuid() == 0:  # root may read everything: refuse in its stead

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("pathlib.Path.open", refuse)
    result = invoke("inspect", tmp_path / "secret.pt")
    assert result.exit_code == 1
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize("shape", ["table", "json", "markdown", "html"])
def test_odd_names_are_shown_and_command_nothing(shape, tmp_path):
    for name, path in bad_files.odd_files(tmp_path).items():
        result = invoke("inspect", path, "--format", shape)
        assert result.exit_code == (0 if name.startswith(("half", "wrong")) else 4), (name, result.output)
        assert "\x1b" not in result.stdout, name
        assert "\x07" not in result.stdout, name
        if shape in ("html", "markdown"):
            assert "<script>alert" not in result.stdout, name


def test_reading_imports_nothing_that_the_file_names(tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    (tmp_path / "model.pt").write_bytes(b"ctrap\nNet\n)\x81" + bad_files.module_state([]) + b".")
    sys.path.insert(0, str(tmp_path))
    try:
        result = invoke("inspect", tmp_path / "model.pt")
    finally:
        sys.path.remove(str(tmp_path))
    assert result.exit_code == 4, result.output
    assert "trap" not in sys.modules

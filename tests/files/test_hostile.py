"""The verdicts: no file that runs something is passed, and no file that people have is refused."""

import contextlib
import io
import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import benign
import hostile
import pytest
from hostile import Op, attribute, build, call, lit, name, new, whole
from typer.testing import CliRunner

from regraft.cli.commands import app
from regraft.files.detect import read
from regraft.files.verdicts import DANGEROUS, KNOWN, UNKNOWN

HERE = Path(__file__).parent


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def verdicts_on(content, folder, allow=()):
    (folder / "file.pt").write_bytes(content)
    return read(folder / "file.pt", allow).verdicts


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live") / "beside"
    return hostile.live_files(folder, folder / "canary")


@pytest.fixture(scope="module")
def files():
    return benign.benign_files()


def test_every_file_that_runs_something_is_refused(live, tmp_path):
    assert len(live) >= 120
    passed = [
        title for title, (content, _) in live.items() if verdicts_on(content, tmp_path).verdict == KNOWN
    ]
    assert passed == []


def test_the_command_says_so_with_its_exit_code(live, tmp_path):
    for title, (content, _) in list(live.items())[::8]:
        verdict = verdicts_on(content, tmp_path).verdict
        result = invoke("inspect", tmp_path / "file.pt")
        assert result.exit_code == {DANGEROUS: 3, UNKNOWN: 4}[verdict], (title, result.output)
        assert "--trust" not in result.output, title


@pytest.mark.slow
def test_every_one_of_them_does_run_something(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "run_live.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["dead"] == []


def test_what_people_have_is_known(files, tmp_path):
    assert len(files) >= 40
    for title, content in files.items():
        verdicts = verdicts_on(content, tmp_path)
        assert verdicts.dangerous == [], title
        if not title.startswith(benign.UNKNOWN):
            assert verdicts.unknown == {}, title
            assert not read(tmp_path / "file.pt").failed, title


def test_true_unknown_names_are_listed(files, tmp_path):
    assert set(verdicts_on(files["own"], tmp_path).unknown) == {"benign.Own"}
    assert set(verdicts_on(files["sklearn"], tmp_path).unknown) == {
        "sklearn.linear_model._logistic.LogisticRegression"
    }


IDENTITY = name("torch.nn.modules.linear", "Identity")
OBJECT = new(IDENTITY)
ORDERED = call("collections:OrderedDict")
RELU = name("torch.nn.functional", "relu")


@pytest.mark.parametrize(
    ("title", "code", "verdict"),
    [
        ("an object with a state", build(OBJECT, {"training": True}), KNOWN),
        ("a class by reference", IDENTITY, KNOWN),
        ("a function by reference", RELU, KNOWN),
        ("an attribute of an Enum", attribute(name("torch.nn.attention", "SDPBackend"), "MATH"), UNKNOWN),
        ("a class that is called", call(IDENTITY), UNKNOWN),
        ("a function that is called", call(RELU, 1), UNKNOWN),
        ("what a call returns is called", call(call("functools:partial", RELU), 1), DANGEROUS),
        ("arguments that are computed", Op(name("torch", "Size") + call("builtins:tuple", []) + b"R"), DANGEROUS),
        ("a special attribute", build(OBJECT, {"__setstate__": RELU}), DANGEROUS),
        ("a key that is computed", build(OBJECT, {call("builtins:str", "a"): 1}), DANGEROUS),
        ("a second state", build(build(OBJECT, {"a": 1}), {"b": 2}), DANGEROUS),
        ("a second state of an OrderedDict", build(build(ORDERED, {"a": 1}), {"b": 2}), DANGEROUS),
        ("a special attribute of an OrderedDict", build(ORDERED, {"__setstate__": RELU}), DANGEROUS),
        ("slots", build(OBJECT, (None, {"forward": RELU})), DANGEROUS),
        ("no slots", build(OBJECT, ({"a": 1}, {})), KNOWN),
        ("the state of a class", build(IDENTITY, {"a": 1}), DANGEROUS),
        ("items of a class", Op(IDENTITY + lit("a") + lit(1) + b"s"), DANGEROUS),
        ("items of an OrderedDict after its state", Op(build(ORDERED, {"a": 1}) + lit(1) + b"a"), DANGEROUS),
        ("items after the state", Op(build(new(IDENTITY), {"append": RELU}) + lit(1) + b"a"), DANGEROUS),
        ("items of an object", Op(OBJECT + lit(1) + b"a"), UNKNOWN),
        ("a reconstructor", call("copyreg:_reconstructor", IDENTITY, name("builtins", "object"), None), KNOWN),
        ("a reconstructor of another base", call("copyreg:_reconstructor", IDENTITY, IDENTITY, None), DANGEROUS),
        ("a reconstructor of a function", call("copyreg:_reconstructor", RELU, name("builtins", "object"), None), UNKNOWN),
        ("a function in a rebuilder", call("torch._tensor:_rebuild_from_type_v2", RELU, name("torch", "Tensor"), (), {}), UNKNOWN),
        ("a class in a rebuilder", call("torch._utils:_rebuild_wrapper_subclass", IDENTITY), UNKNOWN),
        ("a class in NumPy's", call("numpy._core.multiarray:_reconstruct", IDENTITY, (0,), b"b"), UNKNOWN),
        ("a codec", call("_codecs:encode", "a", "zip"), DANGEROUS),
        ("a large number of bytes", call("builtins:bytes", 2**30), UNKNOWN),
        ("a type", call("builtins:type", "T", (), {}), UNKNOWN),
        ("items of a namespace", Op(call("types:SimpleNamespace") + lit(1) + b"a"), UNKNOWN),
        ("a method of an object", call("torch.nn.parameter:Parameter", build(OBJECT, {"detach": RELU})), UNKNOWN),
        ("keys of an object", call("collections:OrderedDict", build(OBJECT, {"keys": RELU})), UNKNOWN),
        ("no type", call("builtins:type", None), KNOWN),
        ("keywords", Op(IDENTITY + lit(()) + lit({"a": 1}) + b"\x92"), UNKNOWN),
        ("a storage that has a state", Op(lit(("storage", 1)) + b"Q" + lit({"a": 1}) + b"b"), DANGEROUS),
        ("somebody's module named like Python's", name("code.models", "Net"), UNKNOWN),
        ("Python's own", name("code", "InteractiveConsole"), DANGEROUS),
        ("a name of no module", name("not a module", "x"), UNKNOWN),
        ("a lock of a grafted module", call("regraft.graft.weights:_ForwardLock"), KNOWN),
        ("a lock that is given something", call("regraft.graft.weights:_ForwardLock", 1), UNKNOWN),
        ("a storage class", name("torch", "HalfStorage"), KNOWN),
    ],
)  # fmt: skip
def test_each_step_is_judged(title, code, verdict, tmp_path):
    verdicts = verdicts_on(whole(code), tmp_path)
    assert verdicts.verdict == verdict, (verdicts.unknown, verdicts.dangerous)


def test_names_that_are_vouched_for(tmp_path):
    (tmp_path / "own.pt").write_bytes(benign.saved(benign.Own()))
    refused = invoke("inspect", tmp_path / "own.pt")
    assert refused.exit_code == 4
    assert "loading would import and call benign.Own" in refused.stderr
    assert "--allow 'benign.*'" in refused.stderr
    trusted = invoke("inspect", tmp_path / "own.pt", "--trust")
    assert trusted.exit_code == 4
    allowed = invoke("inspect", tmp_path / "own.pt", "--trust", "--allow", "benign.*")
    assert allowed.exit_code == 0, allowed.output
    assert "probed" in allowed.stdout
    assert invoke("inspect", tmp_path / "own.pt", "--allow", "*").exit_code == 2
    assert invoke("inspect", tmp_path / "own.pt", "--allow", "own.*").exit_code == 4


def test_a_line_of_the_configuration_vouches_for_a_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "regraft").mkdir()
    (tmp_path / "regraft" / "allow").write_text("# mine\nbenign.*\n")
    (tmp_path / "own.pt").write_bytes(benign.saved(benign.Own()))
    assert invoke("inspect", tmp_path / "own.pt").exit_code == 0


def test_what_is_dangerous_cannot_be_vouched_for(tmp_path):
    (tmp_path / "evil.pt").write_bytes(whole(call("os:system", "true")))
    assert invoke("inspect", tmp_path / "evil.pt", "--allow", "os.*").exit_code == 3


def test_the_last_line_of_a_clean_file(tmp_path):
    import hashlib

    import timm

    path = tmp_path / "vit.pt"
    path.write_bytes(benign.saved(timm.create_model("test_vit")))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    said = invoke("inspect", path).stdout.splitlines()
    assert said[-1] == f"No unknown names. Loading would import: timm, torch. sha256 {digest}"
    made = json.loads(invoke("inspect", path, "-f", "json").stdout)
    assert made["verdict"]["verdict"] == "known"
    assert made["verdict"]["sha256"] == digest


@pytest.mark.parametrize("shape", ["json", "markdown", "html"])
def test_refused_files_have_a_document_too(shape, tmp_path):
    for code, content in ((3, whole(call("os:system", "true"))), (4, whole(name("coolnets.models", "Net")))):
        (tmp_path / "file.pt").write_bytes(content)
        result = invoke("inspect", tmp_path / "file.pt", "-f", shape)
        assert result.exit_code == code
        assert ("os.system" if code == 3 else "coolnets.models.Net") in result.stdout
        if shape == "json":
            verdict = json.loads(result.stdout)["verdict"]
            assert verdict["verdict"] == (DANGEROUS if code == 3 else UNKNOWN)
            assert verdict["unknown"] == ({} if code == 3 else {"coolnets.models.Net": 1})


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "model.pt").write_bytes(benign.saved(benign.net()))
    (tmp_path / "README.md").write_text("class Net:\n    pass\n")
    assert invoke("inspect", tmp_path).exit_code == 0
    (tmp_path / "cut.pt").write_bytes(benign.saved(benign.net())[:-100])
    assert invoke("inspect", tmp_path).exit_code == 1
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "own.bin").write_bytes(benign.saved(benign.Own()))
    unknown = invoke("inspect", tmp_path)
    assert unknown.exit_code == 4
    assert "model.pt: no unknown names" in unknown.stdout
    assert "more/own.bin: unknown names: benign.Own" in unknown.stdout
    (tmp_path / "optimizer.txt").write_bytes(whole(call("os:system", "true")))
    dangerous = invoke("inspect", tmp_path)
    assert dangerous.exit_code == 3
    assert "optimizer.txt: os.system('true')" in dangerous.stderr


def test_a_hugging_face_folder_is_all_of_its_files_too(tmp_path):
    benign.bert().save_pretrained(tmp_path)
    assert invoke("inspect", tmp_path).exit_code == 0
    (tmp_path / "training_args.bin").write_bytes(whole(call("os:system", "true")))
    for command in (
        ("inspect",),
        ("plan", "-r", "Dropout=off"),
        ("apply", "-r", "Dropout=off", "-o", tmp_path / "o"),
    ):
        assert invoke(command[0], tmp_path, *command[1:]).exit_code == 3, command


class Stub(type):
    """A class that allows all that a pickle does to what it names."""

    def __call__(cls, *args, **kwargs):
        return super().__call__()

    def do(cls, *args):
        pass

    __setstate__ = append = extend = add = __setitem__ = do


class Inert(metaclass=Stub):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args):
        return self

    def do(self, *args):
        pass

    __setstate__ = append = extend = add = __setitem__ = do


class Recording:
    """One of CPython's unpicklers, which writes down what it would import."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.names = []

    def find_class(self, module, name):
        if len(module) + len(name) > 1000:
            raise ModuleNotFoundError  # as it would be: no file system has such a name
        self.names.append((module, name))
        return Inert

    def persistent_load(self, pid):
        return Inert()


class InC(Recording, pickle.Unpickler):
    """Of `pickle.load` and `torch.load`."""


class InPython(Recording, pickle._Unpickler):
    """Of joblib."""


def recorded(unpickler, file):
    """The names that it imports, in order, and whether it came to the end."""
    recorder = unpickler(file)
    try:
        recorder.load()
    except Exception:
        return recorder.names, False
    return recorder.names, True


@contextlib.contextmanager
def little_memory():
    """CPython makes room for as many values as the largest index, so a mutant can ask for 64 GB."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_names(data):
    """The names that the inert one finds, and whether it came to the end; None if it refused the frames."""
    from regraft.errors import FileError
    from regraft.files.unpickler import Budget, InertUnpickler
    from regraft.files.verdicts import Verdicts

    names = []

    class Noting(InertUnpickler):
        def find_class(self, module, name):
            names.append((module, name))
            return super().find_class(module, name)

    verdicts = Verdicts()
    try:
        Noting(io.BytesIO(data), len(data), Budget(len(data)), verdicts, arrays=False).load()
    except FileError:
        return names, None if any("end of a frame" in what for what in verdicts.dangerous) else False
    return names, True


def streams(live, files):
    """The pickles in both corpora."""
    import zipfile

    for title, content in {**{key: pair[0] for key, pair in live.items()}, **files}.items():
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for member in archive.infolist():
                    if member.filename.lower().endswith(".pkl") and title != "renamed in its own header":
                        yield content if member.flag_bits & 1 else _member(archive, member)
        else:
            yield content


def _member(archive, member):
    with archive.open(member) as file:
        file._expected_crc = None
        return file.read()


@pytest.mark.parametrize(
    "mutants", [pytest.param(600, id="some"), pytest.param(10_000, id="ten_thousand", marks=pytest.mark.slow)]
)
def test_the_names_are_those_that_cpython_imports(mutants, live, files, tmp_path):
    """In the same order: all of them where CPython comes to the end, else no fewer.

    It has two unpicklers, and the one in C reads memory and files on disk differently.
    """
    import random

    from test_fuzz import mutated

    chance = random.Random(1)
    originals = [data for data in streams(live, files) if len(data) < 100_000]
    ended = refused = 0
    for data in [*originals, *(mutated(chance.choice(originals), chance) for _ in range(mutants))]:
        ours, own_end = read_names(data)
        if own_end is None:
            refused += 1
            continue
        (tmp_path / "file").write_bytes(data)
        with (tmp_path / "file").open("rb") as file, little_memory():
            theirs = [recorded(InC, io.BytesIO(data)), recorded(InC, file)]
            if len(data) < 20_000:
                theirs.append(recorded(InPython, io.BytesIO(data)))
        for names, end in theirs:
            assert ours[: len(names)] == names, data[:200]
            assert not end or (own_end and ours == names), data[:200]
        ended += theirs[0][1]
    assert ended > len(originals) // 2
    assert refused < 20 + mutants // 50


def test_the_names_are_those_that_pickletools_lists(live, files):
    import pickletools

    compared = 0
    computed = [live[title][0] for title in ("a name that is computed", "a name from a default")]
    computed.append(
        files["joblib, labels that are objects"]
    )  # in which `pickle.load` takes an object for a name
    for data in streams(live, files):
        if data in computed:
            continue
        try:
            opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
        except Exception:
            continue  # it knows no frames in frames, and no octal numbers
        names = [argument for code, argument in opcodes if code in ("GLOBAL", "INST", "STACK_GLOBAL")]
        ours, end = read_names(data)
        if end is None:
            continue
        assert len(ours) == len(names)
        for (module, attribute_), argument in zip(ours, names, strict=True):
            assert argument is None or argument == f"{module} {attribute_}"
        compared += 1
    assert compared > 150


AUDITED = """
import encodings.cp437, encodings.raw_unicode_escape, json, sys  # of zipfile and of pickle
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from regraft.cli.file_view import Files, inspection_of
from regraft.errors import FileError

def look(path):
    try:
        files = Files(path)
        view = inspection_of(files.model, files)
        return str(view), view.to_json(), view.to_markdown(), view.to_html(), files.closing()
    except FileError as error:
        return str(error)

paths = sorted(Path(sys.argv[2]).iterdir())
for path in paths[:2]:
    look(path)  # what regraft itself imports
seen = []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(sys.argv[2]) and "w" not in str(arguments[1]):
        return
    if event in ("import", "exec", "compile", "open", "ctypes.dlopen") or event.startswith(
        ("os.", "subprocess.", "socket.", "shutil.", "tempfile.", "marshal.", "pickle.", "sqlite3.", "urllib.")
    ):
        if event not in ("os.listdir", "os.scandir", "os.walk"):
            seen.append([event, repr(arguments)[:200]])
sys.addaudithook(hook)
for path in paths:
    look(path)
print(json.dumps(seen))
"""


def test_nothing_is_imported_opened_or_started_by_reading(live, files, tmp_path):
    contents = {**{key: pair[0] for key, pair in live.items()}, **files}
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "00 model.pt").write_bytes(files["module"])
    (tmp_path / "files" / "01 weights.safetensors").write_bytes(files["safetensors"])
    for number, content in enumerate(contents.values()):
        (tmp_path / "files" / f"{number:04}.pt").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(HERE), str(tmp_path / "files")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []

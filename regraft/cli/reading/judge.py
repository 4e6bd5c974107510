"""Which names have no place in a model: what runs programs, opens files or the network, or builds code."""

from __future__ import annotations

MODULES = frozenset(
    [
        "os",
        "posix",
        "nt",
        "posixpath",
        "ntpath",
        "subprocess",
        "sys",
        "shutil",
        "socket",
        "ssl",
        "runpy",
        "pty",
        "importlib",
        "ctypes",
        "_ctypes",
        "cffi",
        "webbrowser",
        "commands",
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "code",
        "codeop",
        "pdb",
        "bdb",
        "timeit",
        "cProfile",
        "profile",
        "trace",
        "doctest",
        "imp",
        "imaplib",
        "smtplib",
        "poplib",
        "nntplib",
        "ftplib",
        "telnetlib",
        "http",
        "urllib",
        "urllib2",
        "requests",
        "httpx",
        "aiohttp",
        "asyncio",
        "multiprocessing",
        "threading",
        "concurrent",
        "signal",
        "pip",
        "setuptools",
        "distutils",
        "ensurepip",
        "venv",
        "tempfile",
        "pathlib",
        "glob",
        "io",
        "_io",
        "fileinput",
        "linecache",
        "marshal",
        "zipimport",
        "pkgutil",
        "pydoc",
        "antigravity",
        "gc",
        "inspect",
        "types",
        "platform",
        "resource",
        "mmap",
        "sqlite3",
        "dbm",
        "shelve",
        "xmlrpc",
        "socketserver",
        "tkinter",
        "idlelib",
        "lib2to3",
        "test",
        "ast",
        "dis",
        "builtins",
        "__builtin__",
        "__builtins__",
        "__main__.__builtins__",
        "operator",
        "_operator",
    ]
)
"""Packages of which nothing is wanted but what is listed below."""
HARMLESS = {
    "builtins": "set frozenset list dict tuple int float complex bool str bytes bytearray object slice range "
    "type getattr print NotImplemented Ellipsis property super isinstance len sum min max abs all any zip "
    "map filter enumerate sorted reversed round callable hasattr id hash iter next repr ascii pow divmod",
    "operator": "itemgetter attrgetter add mul sub truediv floordiv getitem neg matmul eq ne lt le gt ge",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "types": "SimpleNamespace MappingProxyType MethodType NoneType",
    "threading": "Lock RLock",
    "inspect": "Signature Parameter _ParameterKind",
    "os": "PathLike",
    "io": "BytesIO StringIO",
    "signal": "Signals",
}
_HARMLESS = {module: frozenset(names.split()) for module, names in HARMLESS.items()}
_ALIASES = {"__builtin__": "builtins", "_operator": "operator", "_io": "io"}
_COMMON = frozenset(
    ["code", "commands", "test", "trace", "profile", "platform", "resource", "glob", "types", "ast", "dis"]
)
"""People call their own packages so too: `code.models.Net` is theirs, `code.InteractiveConsole` is not."""
_INSIDE = frozenset(
    [
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "builtins",
        "__builtins__",
        "__globals__",
        "__import__",
        "importlib",
        "ctypes",
        "socket",
        "shutil",
        "pty",
        "runpy",
        "__subclasses__",
        "__code__",
        "__loader__",
        "__spec__",
    ]
)
"""What another package's name must not lead to: `torch.serialization.os`."""
_RUNS = frozenset(
    {
        "torch.load",
        "torch.serialization.load",
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
        "torch.hub.download_url_to_file",
        "torch.utils.cpp_extension.load",
        "torch.utils.cpp_extension.load_inline",
        "torch.utils._config_module.ConfigModule.load_config",
        "torch.utils.collect_env.run",
        "torch.jit.load",
        "torch.ops.load_library",
        "torch.distributed.launch",
        "numpy.load",
        "numpy.testing._private.utils.runstring",
        "numpy.testing.runstring",
        "numpy.f2py.crackfortran.getlincoef",
        "numpy.f2py.crackfortran._eval_length",
        "numpy.ctypeslib.load_library",
        "transformers.dynamic_module_utils.get_class_from_dynamic_module",
        "transformers.dynamic_module_utils.get_class_in_module",
        "torch._dynamo.guards.GuardBuilder.get",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
        "torch.distributed.rpc.server_process_global_profiler.eval",
        "site.main",
        "_osx_support._read_output",
        "uuid._get_command_stdout",
        "logging.config.listen",
        "logging.config._resolve",
        "collections.namedtuple.eval",
        "functools.reduce",
        "nturl2path.url2pathname",
    }
)
"""Functions of packages that models do name, which would run what they are given."""


def suspicious(module: str, name: str) -> bool:
    """Has this name no place in a model?"""
    root, *inside = [*module.split("."), *name.split(".")]
    if f"{module}.{name}" in _RUNS:
        return True
    if _INSIDE.intersection(inside):
        return not (root in MODULES and name in _HARMLESS.get(root, ()))
    if root not in MODULES or (root in _COMMON and module != root):
        return False
    return name not in _HARMLESS.get(_ALIASES.get(module, module), ())

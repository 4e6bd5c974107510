"""Files that no one should have to open: damaged, hostile, or something else altogether."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import nn

UNKNOWN, DANGEROUS = 4, 3
CODES = {
    "unknown_object.pkl": UNKNOWN,
    "extension_code.pkl": UNKNOWN,
    "deep_modules.pt": UNKNOWN,
    "very_deep_modules.pt": UNKNOWN,
    "names_double.pt": UNKNOWN,
    "long_name.pt": UNKNOWN,
    "many_entries.pkl": UNKNOWN,
    "zip_bomb_that_lies.pt": DANGEROUS,
}
"""Exit codes of those that are worse than unreadable."""


class Canary:
    """Pickles as a call that leaves a mark."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def small():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))


def saved(value, **options):
    room = io.BytesIO()
    torch.save(value, room, **options)
    return room.getvalue()


def archive(entries, method=zipfile.ZIP_STORED):
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", method) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return room.getvalue()


def torch_zip(stream, **more):
    return archive({"m/data.pkl": stream, "m/version": b"3\n", **more})


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def module_state(modules):
    """Opcodes of a module's state, with these (name, opcodes) inside."""
    inside = b"".join(b"X" + struct.pack("<I", len(name)) + name + code for name, code in modules)
    empty = b"ccollections\nOrderedDict\n)R"
    keys = {b"_parameters": empty, b"_buffers": empty, b"_modules": empty + b"(" + inside + b"u"}
    body = b"".join(b"X" + struct.pack("<I", len(key)) + key + code for key, code in keys.items())
    return b"}(" + body + b"ub"


def module(modules=(), name=b"Net"):
    return b"c__main__\n" + name + b"\n)\x81" + module_state(modules)


def deep(levels):
    """A chain of modules, each in the other, made by opcodes: no Python could pickle it."""
    head = (
        b"c__main__\nNet\n)\x81}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_modules}(X\x01\x00\x00\x00a"
    )
    return b"\x80\x02" + head * levels + b"N" + b"uub" * levels + b"."


def doubling(levels):
    """Modules of which each holds the next one twice: 2 ** levels names."""
    code = b"\x80\x02" + module() + b"q\x00"
    for _ in range(levels):
        code += module([(b"a", b"h\x00"), (b"b", b"h\x00")]) + b"q\x00"
    return code + b"."


def thousands(levels):
    """A dictionary that holds one other a thousand times, which holds one a thousand times, ..."""
    code = b"\x80\x02}q\x00"
    keys = [b"X\x04\x00\x00\x00%04d" % number for number in range(1_000)]
    for _ in range(levels):
        code += b"}(" + b"".join(key + b"h\x00" for key in keys) + b"uq\x00"
    return code + b"."


def many_parts():
    """Names of hundreds of parts, each with another one first."""
    tensor = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return safetensors(("{" + ",".join(f'"{n}{".a" * 900}":{tensor}' for n in range(1_000)) + "}").encode())


def names_of_names():
    """A table of contents full of what looks like entries, and is none."""
    table = b"PK\1\2" + b"\0" * 42 + b"PK\1\2data.pkl" * 500_000
    return b"PK\3\4" + table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(table), 4, 0)


def overlapping():
    """An archive whose entries share one deflated block: it unpacks to far more than it holds."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packed.compress(b"\0" * 300_000_000) + packed.flush()
    name = b"m/data.pkl"
    local = (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(block), 1000, len(name), 0) + name + block
    )
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(block), 1000, len(name), 0, 0, 0, 0, 0, 0
    )
    table = entry + name
    return local + table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(table), len(local), 0)


def encrypted(content):
    """The same archive with every entry marked as encrypted."""
    data = bytearray(content)
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.find(magic)
        while place >= 0:
            data[place + at] |= 1
            place = data.find(magic, place + 1)
    return bytes(data)


def hostile(mark):
    """Pickles that would leave `mark` behind, each by another road."""
    touch = f"touch {mark}"
    write = f"open({str(mark)!r}, 'w').close()"
    getter = pickle.dumps
    return {
        "os_system": getter(Canary(os.system, touch)),
        "os_system_protocol_0": getter(Canary(os.system, touch), 0),
        "os_system_protocol_5": getter(Canary(os.system, touch), 5),
        "posix_global": b"\x80\x02cposix\nsystem\nX"
        + struct.pack("<I", len(touch))
        + touch.encode()
        + b"\x85R.",
        "eval": getter(Canary(eval, write)),
        "exec": getter(Canary(exec, write)),
        "python_2_builtins": b"c__builtin__\neval\n(V" + write.encode() + b"\ntR.",
        "subprocess": getter(Canary(__import__("subprocess").check_call, ["touch", str(mark)])),
        "in_a_list": getter([1, {"a": Canary(os.system, touch)}]),
        "inst_opcode": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj_opcode": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "then_cut": getter(Canary(os.system, touch))[:-2],
        "by_getattr": b"cbuiltins\ngetattr\n(ctorch\nserialization\nS'os'\ntR.",
        "dotted_name": b"\x80\x04\x8c\x13torch.serialization\x8c\tos.system\x93\x8c\x04true\x85R.",
        "runs_torch_load": b"ctorch\nload\n(S'x.pt'\ntR.",
        "imports": b"cimportlib\nimport_module\n(S'os'\ntR.",
        "opens_a_file": getter(Canary(open, str(mark), "w")),
        "webbrowser": b"cwebbrowser\nopen\n(S'http://localhost'\ntR.",
        "attrgetter": b"coperator\nattrgetter\n(S'os.system'\ntR.",
        "removes": b"cshutil\nrmtree\n(S'/nonexistent'\ntR.",
    }


def disguised(stream):
    """A hostile pickle in files that are something else as well."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}\n}'
    length = ord("V")
    padded = header[:-2] + b" " * (length - len(header)) + header[-2:]
    return {
        "as_a_script.pt": torch_zip(stream, **{"m/constants.pkl": b")."}),
        "as_a_program.pt2": torch_zip(stream, **{"m/models/model.json": b"{}"}),
        "as_a_second_pickle.pt": archive({"m/data.pkl": b"}.", "n/data.pkl": stream}),
        "as_constants.pt": archive({"m/data.pkl": b"}.", "m/constants.pkl": stream}),
        "as_safetensors.pt": struct.pack("<Q", length) + padded + b"00" + stream,
        "as_gguf.bin": b"GGUF\x03\0\0\0\0" + b"0" + stream,
    }


def bad_files(mark: Path):
    """`name -> (content, exit code, what is said)` of every bad file; large contents are functions."""
    whole, weights = saved(small()), saved(small().state_dict())
    plain = pickle.dumps({"a": 1})
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    nested = b"[" * 200_000
    contents = {
        "empty.pt": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "one_byte.pt": (b"\x80", "damaged"),
        "zeros.pt": (b"\0" * 4096, "damaged"),
        "noise.pt": (b"\x13\x37\xff\xfe nothing at all", "damaged"),
        "text.pt": (b"hello there, this is text", "damaged"),
        "whole_cut.pt": (whole[: len(whole) // 2], "damaged"),
        "whole_cut_late.pt": (whole[:-30], "damaged"),
        "weights_cut.pt": (weights[: len(weights) // 3], "damaged"),
        "plain_cut.pt": (pickle.dumps(small())[:200], "damaged"),
        "old_cut.pt": (saved(small(), _use_new_zipfile_serialization=False)[:300], "damaged"),
        "zip_magic_alone.pt": (b"PK\x03\x04", "damaged"),
        "zip_end_alone.pt": (b"PK\x05\x06" + b"\0" * 18, "no PyTorch model"),
        "zip_without_pickle.pt": (archive({"a.txt": b"x"}), "no PyTorch model"),
        "zip_of_nonsense.pt": (torch_zip(b"\xff\xfe\xfd"), "damaged"),
        "zip_table_far_away.pt": (
            archive({"m/data.pkl": plain})[:-6] + b"\xff\xff\xff\x7f\0\0",
            "damaged",
        ),
        "encrypted.pt": (encrypted(whole), "encrypted"),
        "zip_bomb.pt": (
            lambda: archive({"m/data.pkl": b"}" * 300_000_000}, zipfile.ZIP_DEFLATED),
            "more than",
        ),
        "zip_bomb_that_lies.pt": (lambda: overlapping(), "two readers"),
        "zip_strange_method.pt": (archive({"m/data.pkl": plain}, zipfile.ZIP_BZIP2), "method"),
        "many_pickles.pt": (archive({f"{n}/data.pkl": plain for n in range(40)}), "40 pickles"),
        "a_number.pt": (saved(3), "no model in the file"),
        "a_list.pt": (saved([1, 2]), "no model in the file"),
        "empty_state_dict.pt": (saved({}), "no model in the file"),
        "no_weights_in_it.pt": (saved({"epoch": 1, "loss": 0.5}), "no model in the file"),
        "just_a_dict.pkl": (plain, "no model in the file"),
        "unknown_object.pkl": (b"cnowhere\nThing\n)R.", "no model in the file"),
        "no_stop.pkl": (b"\x80\x02}", "damaged"),
        "stack_underflow.pkl": (b"\x80\x020000.", "damaged"),
        "mark_underflow.pkl": (b"\x80\x02ttt.", "damaged"),
        "memo_that_is_not_there.pkl": (b"\x80\x02h\x07.", "damaged"),
        "huge_memo_index.pkl": (b"\x80\x02}r\xff\xff\xff\xff.", "no model in the file"),
        "huge_text_length.pkl": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        "huge_text_length_8.pkl": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
        "huge_bytes_length.pkl": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
        "huge_number.pkl": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "damaged"),
        "long_decimal.pkl": (b"L" + b"9" * 200_000 + b"L\n.", "no model in the file"),
        "slow_to_hash.pkl": (b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.", "no model in the file"),
        "slow_to_compare.pkl": (b"\x80\x04\x8f(" + b")" + b"2\x86" * 60 + b"\x90.", "no model in the file"),
        "deep_lists.pkl": (
            lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            "no model in the file",
        ),
        "deep_tuples.pkl": (lambda: b"\x80\x02)" + b"\x85" * 500_000 + b".", "no model in the file"),
        "extension_code.pkl": (b"\x80\x02\x82\x01)R.", "no model in the file"),
        "unknown_opcode.pkl": (b"\x80\x02\xfe.", "damaged"),
        "protocol_9.pkl": (b"\x80\x09}.", "damaged"),
        "buffer_opcode.pkl": (b"\x80\x05\x97.", "no model in the file"),
        "deep_modules.pt": (lambda: torch_zip(deep(5_000)), "nested more than"),
        "very_deep_modules.pt": (lambda: torch_zip(deep(50_000)), "nested more than"),
        "names_double.pt": (lambda: torch_zip(doubling(40)), "names"),
        "long_name.pt": (
            torch_zip(b"\x80\x02" + module([(b"n" * 5_000, module())]) + b"."),
            "characters long",
        ),
        "the_same_a_thousand_times.pkl": (lambda: thousands(4), "no model in the file"),
        "many_entries.pkl": (
            lambda: b"\x80\x02cx\nThing\n)\x81" + b"NNs" * 150_000 + b".",
            "no model in the file",
        ),
        "long_text.pkl": (
            lambda: b"\x80\x02X" + struct.pack("<I", 2**22) + b"x" * 2**22 + b".",
            "no model in the file",
        ),
        "many_parts.safetensors": (lambda: many_parts(), "asks for more work"),
        "names_of_names.pt": (lambda: names_of_names(), "damaged"),
        "lfs_pointer.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        "web_page.pt": (b"<!DOCTYPE html><html></html>", "web page"),
        "gguf.bin": (b"GGUF\x03\0\0\0" + b"\0" * 64, "GGUF"),
        "keras.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "HDF5"),
        "gzip.pt": (b"\x1f\x8b\x08" + b"\0" * 64, "gzip"),
        "program.pt": (b"\x7fELF" + b"\0" * 64, "a program"),
        "script.pt": (b"#!/bin/sh\ntouch " + str(mark).encode(), "a script"),
        "tar.pt": (b"\1" * 257 + b"ustar" + b"\0" * 300, "tar"),
        "huge_header.safetensors": (safetensors({}, length=2**62), "claims"),
        "large_header.safetensors": (safetensors({}, length=10**7), "ends within its header"),
        "no_json.safetensors": (safetensors(b"{not json at all"), "no JSON"),
        "a_list.safetensors": (safetensors(b"[1, 2, 3]"), "no table"),
        "deep_json.safetensors": (safetensors(b'{"a":' + nested), "no JSON"),
        "no_shape.safetensors": (safetensors({"a.weight": {"dtype": "F32"}}), "no shape"),
        "negative_shape.safetensors": (safetensors({"a": {**tensor, "shape": [-1]}}), "no shape"),
        "text_shape.safetensors": (safetensors({"a": {**tensor, "shape": ["2"]}}), "no shape"),
        "no_tensors.safetensors": (safetensors({"__metadata__": {}}), "no weights"),
        "cut.safetensors": (safetensors({"a": tensor})[:20], "ends within its header"),
        "many_dots.safetensors": (safetensors({"a" + "." * 5_000: tensor}), "nested more than"),
        "out_of_the_folder.safetensors.index.json": (
            json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode(),
            "leads out of its folder",
        ),
        "shard_is_missing.safetensors.index.json": (
            json.dumps({"weight_map": {"a": "gone.safetensors"}}).encode(),
            "a shard is missing",
        ),
        "no_map.safetensors.index.json": (b"{}", "names no weights"),
        "program_cut.pt2": (archive({"m/models/model.json": b'{"graph_module": {}'}), "torch.export"),
        "program_odd.pt2": (archive({"m/models/model.json": b'{"graph_module": 3}'}), "torch.export"),
        "program_deep.pt2": (archive({"m/models/model.json": nested}), "torch.export"),
        "script_odd.pt": (archive({"m/data.pkl": b"N.", "m/constants.pkl": b")."}), "TorchScript"),
        "notes.txt": (b"nothing to see", "damaged"),
    }
    files = {name: (content, CODES.get(name, 1), told) for name, (content, told) in contents.items()}
    for name, stream in hostile(mark).items():
        for kind, content in (("pkl", stream), ("pt", torch_zip(stream))):
            files[f"{name}.{kind}"] = (content, DANGEROUS, "suspicious content")
    evil = hostile(mark)["os_system_protocol_0"]
    for name, content in disguised(evil).items():
        files[name] = (content, DANGEROUS, "suspicious content")
    return files


def write(folder: Path, name: str, content) -> Path:
    """Write a file of `bad_files`."""
    (folder / name).write_bytes(content() if callable(content) else content)
    return folder / name


def odd_files(folder: Path):
    """`name -> path` of files that are strange and still models: they are shown, whatever they are named."""
    loop = b"\x80\x02" + module([(b"a", b"N")]).replace(
        b"c__main__\nNet\n)\x81", b"c__main__\nNet\n)\x81q\x00"
    )
    contents = {
        "script_name.pt": torch_zip(
            b"\x80\x02" + module([(b"x", module())], b"<script>alert(1)</script>") + b"."
        ),
        "bytes_name.pt": torch_zip(b"\x80\x02" + module([(b"\xff\xfe\xc3", module())]) + b"."),
        "escape_name.pt": torch_zip(
            b"\x80\x02" + module([(b"\x1b[31mred\x07", module())], b"Net\x1b]0;x\x07") + b"."
        ),
        "inside_itself.pt": torch_zip(
            loop.replace(b"X\x01\x00\x00\x00aN", b"X\x01\x00\x00\x00ah\x00") + b"."
        ),
        "half_characters.safetensors": safetensors(
            b'{"\\ud800.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}', b"\0" * 16
        ),
        "wrong_ending.safetensors": saved(small()),
        "wrong_ending.pt": safetensors(
            {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 16
        ),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}

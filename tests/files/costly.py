"""Files of at most 1 MB that ask for as much time and memory as such files can."""

from __future__ import annotations

import io
import struct
import zipfile

import bad_files

SIZE = 1_000_000


def filled(unit, head=b"\x80\x04", tail=b"."):
    """As many of these opcodes as there is room for."""
    return head + unit * ((SIZE - len(head) - len(tail)) // len(unit)) + tail


def counted(unit, head=b"\x80\x04", tail=b"}."):
    """As many opcodes, of which no two are alike, as there is room for."""
    room, pieces, number = SIZE - len(head) - len(tail), [], 0
    while (room := room - len(piece := unit(number))) > 0:
        pieces.append(piece)
        number += 1
    return head + b"".join(pieces) + tail


def archive(entries, method=zipfile.ZIP_DEFLATED):
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", method, compresslevel=9) as file:
        for name, content in entries:
            file.writestr(name, content)
    return room.getvalue()


def text(data):
    return b"X" + struct.pack("<I", len(data)) + data


def safetensors(names, shape="[2,2]"):
    entries, room = [], SIZE - 100
    for name in names:
        entries.append(f'"{name}":{{"shape":{shape}}}')
        room -= len(entries[-1]) + 1
        if room < 0:
            return bad_files.safetensors(("{" + ",".join(entries[:-1]) + "}").encode())
    raise ValueError("too few names")


def costly_files():
    """`name -> content`."""
    state = b"}(" + text(b"_parameters") + b"}" + text(b"_modules") + b"}uq\x01"
    head = b"\x80\x02c__main__\nNet\nq\x00" + state
    dropout = b"\x80\x02ctorch.nn.modules.dropout\nDropout\nq\x00" + state
    many = b"h\x00)\x81}(" + text(b"_parameters") + b"}" + text(b"_modules") + b"}("
    load = b"\x80\x04ctorch.storage\n_load_from_bytes\n\x940"
    inside = b"\x80\x04" + b"}0" * 30_000 + b"."
    encode = b"\x80\x02c_codecs\nencode\n\x940" + text(b"y" * 900_000) + b"\x940" + text(b"latin1") + b"\x940"
    nested = b"\x80\x04}."
    for _ in range(50):
        nested = (
            load
            + b"B"
            + struct.pack("<I", len(nested))
            + nested
            + b"\x940"
            + b"h\x00h\x01\x85R0h\x00h\x01\x85R."
        )
    tensor = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00(NK\x00)NtRq\x01}("
    return {
        "dictionaries": filled(b"}"),
        "lists": filled(b"]"),
        "sets": filled(b"\x8f"),
        "marks": filled(b"("),
        "remembered": filled(b"\x8f\x94"),
        "calls": filled(b")R", b"\x80\x04ca\nb\n"),
        "calls of one name": filled(b"h\x00)R", b"\x80\x04ca\nb\n\x94"),
        "states": filled(b"}b", b"\x80\x04ca\nb\n)R"),
        "items": filled(b"NNs", b"\x80\x04ca\nb\n)\x81"),
        "names": counted(lambda n: b"ca%d\nb\n0" % n),
        "names that are kept": counted(lambda n: b"cq\n%d\n\x94" % n),
        "names that are called": counted(lambda n: b"cq\nb%d\n)R0" % n),
        "dangerous names": counted(lambda n: b"cos\nb%d\n)R0" % n),
        "long names": counted(lambda n: b"cq\n%d%s\n0" % (n, b"b" * 900)),
        "numbers that hash alike": counted(lambda n: b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N", b"\x80\x04}(", b"u."),
        "floats that hash alike": counted(lambda n: b"G" + struct.pack(">d", (2.0**61 - 1) * n) + b"N", b"\x80\x04}(", b"u."),
        "numbers alike at their end": counted(lambda n: b"\x8a\x08" + (n << 40).to_bytes(8, "little") + b"N", b"\x80\x04}(", b"u."),
        "a decimal": b"I" + b"9" * 900_000 + b"\n.",
        "decimals": filled(b"L" + b"9" * 500 + b"\n0", b""),
        "a long number": b"\x80\x04\x8b" + struct.pack("<I", 900_000) + b"\x7f" * 900_000 + b".",
        "a long line": b"c" + b"a" * 900_000,
        "an attribute of an attribute": filled(
            b"r\x01\x00\x00\x000h\x00(h\x01X\x02\x00\x00\x00bbtR", b"\x80\x04cbuiltins\ngetattr\n\x940ca\nb\n"
        ),
        "an attrgetter": b"\x80\x04coperator\nattrgetter\n(" + text(b"os." * 300_000) + b"tR.",
        "modules": counted(lambda n: text(b"%06d" % n) + b"h\x00)\x81h\x01b", head + many, b"uub."),
        "one module by many names": counted(lambda n: b"J" + struct.pack("<i", n) + b"h\x02", head + b"h\x00)\x81h\x01bq\x02" + many, b"uub."),
        "dropouts": counted(lambda n: text(b"%06d" % n) + b"h\x00)\x81h\x01b", dropout + many, b"uub."),
        "dropouts that do not fold": counted(lambda n: text(b"%010x" % (n * 2654435761 % 2**32)) + b"h\x00)\x81h\x01b", dropout + many, b"uub."),
        "names that double": bad_files.doubling(40),
        "a list in a list": b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b".",
        "dictionaries of a thousand": bad_files.thousands(20),
        "gets": filled(b"g0\n", b"}p0\n"),
        "pickles": filled(b"}.", b"\x80\x02", b""),
        "a file a thousand times": load + b"B" + struct.pack("<I", len(inside)) + inside + b"\x940" + b"h\x00h\x01\x85R0" * 100_000 + b".",
        "a large file a thousand times": load + b"B" + struct.pack("<I", 900_000) + b"}" * 900_000 + b"\x940" + b"h\x00h\x01\x85R0" * 10_000 + b".",
        "bytes a thousand times": encode + b"h\x00h\x01h\x02\x86R" * 7_000 + b".",
        "files in files": nested,
        "tensors": counted(lambda n: text(b"%06d" % n) + b"h\x01", tensor, b"u."),
        "tensors with long names": counted(lambda n: text(b"%06d%s" % (n, b".a" * 450)) + b"h\x01", tensor, b"u."),
        "weights": safetensors((str(n) for n in range(10**6)), "[]"),
        "weights, deep": safetensors(f"{n}{'.a' * 450}" for n in range(10**6)),
        "weights with braces": safetensors("{" * 900 + str(n) for n in range(10**6)),
        "weights with numbers": safetensors(f"{'1a' * 300}{n}.weight" for n in range(10**6)),
        "weights with many numbers": safetensors(".".join(str((n * 7919 + k * 104729) % 9973) for k in range(60)) for n in range(10**6)),
        "lists in JSON": bad_files.safetensors(b'{"a":' + b"[" * 900_000),
        "digits in JSON": bad_files.safetensors(b'{"a":' + b"9" * 900_000 + b"}"),
        "objects in JSON": bad_files.safetensors(b'{"a":[' + b"{}," * 300_000 + b"{}]}"),
        "members": archive([("m/data.pkl", b"}."), *((f"m/{n}", b"") for n in range(9_000))], zipfile.ZIP_STORED),
        "pickles in an archive": archive([(f"m/{n}.pkl", b"}.") for n in range(8_000)], zipfile.ZIP_STORED),
        "arrays in an archive": archive([(f"m/{n}.npy", b"") for n in range(8_000)], zipfile.ZIP_STORED),
        "a bomb": archive([("m/data.pkl", b"}" * 200_000_000)]),
        "a bomb of dictionaries": archive([("m/data.pkl", b"\x80\x04" + b"}" * 19_000_000 + b".")]),
        "a bomb of text": archive([("m/data.pkl", b"\x80\x04" + text(b"x" * 18_000_000) + b".")]),
        "many bombs": archive([(f"m/{n}/data.pkl", b"\x80\x04" + text(b"x" * 1_100_000) + b".") for n in range(16)]),
    }  # fmt: skip

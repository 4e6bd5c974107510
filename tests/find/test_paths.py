"""Path patterns as a table: what each matches, and what it must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import RuleSyntaxError
from regraft.find.selectors import compile_path

MATCHES = [
    # a plain path is anchored at both ends
    (
        "encoder.layer.1",
        ["encoder.layer.1"],
        ["encoder.layer.10", "encoder.layer.1.x", "bert.encoder.layer.1", ""],
    ),
    # "*" is one part, or a piece of one
    (
        "encoder.layer.1.*",
        ["encoder.layer.1.out"],
        ["encoder.layer.10.out", "encoder.layer.1", "encoder.layer.1.a.b"],
    ),
    ("*", ["head", "0"], ["a.b"]),
    ("layer*.drop", ["layer1.drop", "layer.drop", "layer10.drop"], ["layer1.x.drop", "xlayer1.drop"]),
    ("*_drop", ["attn_drop", "_drop"], ["attn_drop.x", "attn_dropout"]),
    ("b*.a*n", ["blocks.attn", "b.an"], ["blocks.attn.proj"]),
    # "**" is any number of parts, also none
    ("**", ["", "a", "a.b.c"], []),
    ("**.drop", ["drop", "a.drop", "a.b.drop"], ["a.dropout", "a.drop.b", "xdrop"]),
    ("encoder.**", ["encoder", "encoder.a", "encoder.a.b"], ["encoders.a", "x.encoder.a"]),
    ("a.**.z", ["a.z", "a.b.z", "a.b.c.z"], ["a.bz", "az"]),
    ("**.attention.**", ["attention", "a.attention", "attention.b", "a.attention.b.c"], ["a.attentions.b"]),
    ("**.**", ["", "a", "a.b"], []),
    ("a.**.**", ["a", "a.b", "a.b.c"], ["ab"]),
    # ranges and lists
    ("h.{0..5}", [f"h.{i}" for i in range(6)], ["h.6", "h.10", "h.05", "h."]),
    ("h.{9..11}.mlp", ["h.9.mlp", "h.10.mlp", "h.11.mlp"], ["h.1.mlp", "h.12.mlp"]),
    ("h.{0,2,7..9}", ["h.0", "h.2", "h.8"], ["h.1", "h.3", "h.10"]),
    ("h.{3..3}", ["h.3"], ["h.2", "h.33"]),
    ("{query,key}.*", ["query.w", "key.w"], ["value.w", "querykey.w"]),
    ("layer{1..2}.x", ["layer1.x", "layer2.x"], ["layer3.x", "layer12.x"]),
    # nothing else is special
    ("a.b+c", ["a.b+c"], ["a.bc", "a.bbc"]),
    ("a.b[0]", ["a.b[0]"], ["a.b0"]),
    ("a?b", ["a?b"], ["ab", "acb"]),
]


@pytest.mark.parametrize(("pattern", "yes", "no"), MATCHES, ids=[row[0] for row in MATCHES])
def test_a_pattern_matches_whole_paths(pattern, yes, no):
    compiled = compile_path(pattern)
    assert [path for path in yes if not compiled.fullmatch(path)] == []
    assert [path for path in no if compiled.fullmatch(path)] == []


def test_trap_20_a_rule_for_layer_1_does_not_match_layer_10():
    compiled = compile_path("encoder.layer.1.*")
    paths = [f"encoder.layer.{i}.output" for i in range(24)]
    assert [path for path in paths if compiled.fullmatch(path)] == ["encoder.layer.1.output"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a.{0..5", "a brace does not close"),
        ("a.0..5}", "one of its parts is empty|a brace does not close"),
        ("a..b", "one of its parts is empty"),
        (".a", "one of its parts is empty"),
        ("a.", "one of its parts is empty"),
        ("", "one of its parts is empty"),
        (
            "h.{5..0}",
            r"the range \{5..0\} in 'h.\{5..0\}' has no numbers in it\n  help: write it upwards: \{0..5\}",
        ),
        ("h.{0..999999999}", "has no numbers in it"),
    ],
)
def test_a_pattern_that_cannot_be_read_says_why(pattern, message):
    with pytest.raises(RuleSyntaxError, match=message):
        compile_path(pattern)


parts = st.lists(st.text("ab0_[$^\\", min_size=1, max_size=4), min_size=1, max_size=5)


@given(parts)
def test_every_path_matches_itself_its_stars_and_a_double_star(path):
    text = ".".join(path)
    assert compile_path(text).fullmatch(text)
    assert compile_path("**").fullmatch(text)
    assert compile_path(".".join("*" for _ in path)).fullmatch(text)
    assert not compile_path(".".join("*" for _ in [*path, "x"])).fullmatch(text)
    for cut in range(len(path) + 1):
        assert compile_path(".".join([*path[:cut], "**"])).fullmatch(text)
        assert compile_path(".".join(["**", *path[cut:]])).fullmatch(text)

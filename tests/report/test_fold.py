"""Folding is exact: what a folded path stands for is what was folded, and a selector reads it so."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.report.fold import fold, fold_rows

CASES = {
    "one": (["a.drop"], ["a.drop"]),
    "none": ([], []),
    "root": ([""], [""]),
    "a run": ([f"layer.{i}.drop" for i in range(12)], ["layer.{0..11}.drop"]),
    "two": (["layer.0.drop", "layer.1.drop"], ["layer.{0..1}.drop"]),
    "gaps": (["l.0.d", "l.2.d", "l.5.d"], ["l.{0,2,5}.d"]),
    "runs and gaps": (["l.0.d", "l.1.d", "l.2.d", "l.3.d", "l.7.d"], ["l.{0..3,7}.d"]),
    "a product": ([f"l.{i}.b.{j}.d" for i in range(4) for j in range(2)], ["l.{0..3}.b.{0..1}.d"]),
    "stages of unequal depth": (
        [f"s.{i}.b.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)],
        ["s.{0..1,3}.b.{0..1}", "s.2.b.{0..5}"],
    ),
    "pieces of parts": (["layer1.fc2", "layer2.fc2"], ["layer{1..2}.fc2"]),
    "not layer 10": (["l.1.d", "l.10.d"], ["l.{1,10}.d"]),
    "padded numbers are no range": (["l.00.d", "l.01.d", "l.02.d"], ["l.{00,01,02}.d"]),
    "padded and not": (["l.1.d", "l.01.d", "l.2.d"], ["l.{1..2,01}.d"]),
    "order of the first": (["b.0", "a", "b.1"], ["b.{0..1}", "a"]),
    "names with braces": (["a{0}.1", "a{0}.2"], ["a{0}.1", "a{0}.2"]),
    "names with stars": (["*.1", "*.2"], ["*.1", "*.2"]),
    "twice the same": (["l.0", "l.0", "l.1"], ["l.{0..1}"]),
}


def expand(pattern: str) -> list[str]:
    """The paths that a folded path stands for."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(inside: str) -> list[str]:
    numbers = []
    for piece in inside.split(","):
        first, _, last = piece.partition("..")
        numbers += map(str, range(int(first), int(last) + 1)) if last else [first]
    return numbers


@pytest.mark.parametrize(("paths", "folded"), CASES.values(), ids=CASES)
def test_fold(paths: list[str], folded: list[str]) -> None:
    assert fold(paths) == folded


numbers = st.one_of(st.integers(0, 14).map(str), st.sampled_from(["00", "01", "007", "99999999999999999999"]))
path_shapes = st.sampled_from(["l.{}.d", "l.{}.b.{}.d", "s{}.{}.{}", "{}", "{}.{}"])
paths_of_models = path_shapes.flatmap(
    lambda shape: st.lists(numbers, min_size=shape.count("{}"), max_size=shape.count("{}")).map(
        lambda values: shape.format(*values)
    )
)


@given(st.lists(paths_of_models, max_size=60))
def test_what_a_fold_stands_for_is_what_was_folded(paths: list[str]) -> None:
    expanded = [path for pattern in fold(paths) for path in expand(pattern)]
    assert len(expanded) == len(set(expanded)), "two folds stand for the same path"
    assert set(expanded) == set(paths)


@settings(max_examples=30, deadline=None)
@given(st.lists(paths_of_models, min_size=1, max_size=20), st.lists(paths_of_models, max_size=20))
def test_a_selector_reads_a_fold_as_the_paths_it_stands_for(paths: list[str], others: list[str]) -> None:
    from regraft.find.selectors import compile_path

    patterns = [compile_path(pattern) for pattern in fold(paths)]
    for path in {*paths, *others}:
        assert any(pattern.fullmatch(path) for pattern in patterns) == (path in paths), path


@given(st.lists(st.tuples(paths_of_models, st.sampled_from("ab")), max_size=40))
def test_rows_that_are_not_alike_stay_apart(rows: list[tuple[str, str]]) -> None:
    folds = fold_rows(rows, path=lambda row: row[0], alike=lambda row: row[1])
    assert sorted(row for _, members in folds for row in members) == sorted(rows)
    for pattern, members in folds:
        assert len({kind for _, kind in members}) == 1
        assert set(expand(pattern)) == {path for path, _ in members}


def test_a_long_list_is_cut_into_lines_one_can_read() -> None:
    paths = [f"expert.{i}.drop" for i in range(0, 100, 2)]
    folded = fold(paths)
    assert max(map(len, folded)) < 60
    assert [path for pattern in folded for path in expand(pattern)] == paths

"""Alike paths in one line: `encoder.layer.{0..11}.output.dropout` for twelve of them, exactly.

A folded path is a path pattern that a selector takes, so what is printed can be pasted into a rule. It
stands for the folded paths and for no other: where no single pattern does, several are given.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Point = tuple[str, ...]
"""The integers of a path."""

_INTEGER = re.compile(r"([0-9]+)")
_MOST_RUNS = 12
"""A longer list in braces is harder to read than two lines."""


def fold(paths: Iterable[str]) -> list[str]:
    """The patterns that together stand for exactly these paths.

    Example:
        >>> fold(["layer.0.drop", "layer.1.drop", "layer.2.drop", "layer.7.drop", "head"])
        ['layer.{0..2,7}.drop', 'head']
    """
    return [pattern for pattern, _ in fold_rows(list(paths), path=str, alike=lambda _: None)]


def skeleton(path: str) -> str:
    """The path without its integers: what paths that fold together have in common."""
    return _INTEGER.sub("#", path)


def fold_rows(
    rows: Sequence[Item], *, path: Callable[[Item], str], alike: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Fold the rows that are `alike` and whose paths differ in their integers alone.

    Each fold is the pattern that stands for exactly the paths of its rows, and the rows; both as they came.
    """
    groups: dict[Hashable, dict[Point, list[int]]] = {}
    for index, row in enumerate(rows):
        texts = _INTEGER.split(path(row))
        # A name with a brace or a star in it cannot be told from a pattern: it stays by itself.
        plain = not any(mark in text for text in texts[::2] for mark in "{}*")
        key = (tuple(texts[::2]) if plain else path(row), alike(row))
        groups.setdefault(key, {}).setdefault(tuple(texts[1::2]) if plain else (), []).append(index)
    folds: list[tuple[list[int], str]] = []
    for points in groups.values():
        example = path(rows[next(iter(points.values()))[0]])
        for axes in (axes for product in _products(list(points)) for axes in _readable(product)):
            members = [index for point in itertools.product(*axes) for index in points[point]]
            folds.append((sorted(members), _pattern(example, axes)))
    folds.sort(key=lambda fold: fold[0][0])
    return [(pattern, [rows[index] for index in members]) for members, pattern in folds]


def _products(points: list[Point]) -> list[list[list[str]]]:
    """Disjoint products of lists of values that together are exactly `points`; few, not the fewest."""
    axes = [sorted(set(values), key=_order) for values in zip(*points, strict=True)]
    if math.prod(map(len, axes)) == len(points):
        return [axes]
    # Cut along the axis whose values differ least in what stands beside them.
    slices = [_slices(points, axis) for axis in range(len(axes))]
    axis = min(range(len(axes)), key=lambda axis: len(slices[axis]))
    return [
        [*rest[:axis], values, *rest[axis:]]
        for others, values in slices[axis].items()
        for rest in _products(list(others))
    ]


def _slices(points: list[Point], axis: int) -> dict[frozenset[Point], list[str]]:
    """The values of an axis, those together that have the same points beside them."""
    beside: dict[str, list[Point]] = {}
    for point in points:
        beside.setdefault(point[axis], []).append(point[:axis] + point[axis + 1 :])
    slices: dict[frozenset[Point], list[str]] = {}
    for value in sorted(beside, key=_order):
        slices.setdefault(frozenset(beside[value]), []).append(value)
    return slices


def _readable(axes: list[list[str]]) -> list[list[list[str]]]:
    """The product, in parts if the braces of an axis would list too many runs."""
    parts = []
    for values in axes:
        runs = _runs(values)
        chunks = [runs[start : start + _MOST_RUNS] for start in range(0, len(runs), _MOST_RUNS)]
        parts.append([[value for run in chunk for value in run] for chunk in chunks])
    return [list(choice) for choice in itertools.product(*parts)]


def _order(value: str) -> tuple[bool, int, str]:
    # "007" is no number in a range: it is listed, after the numbers.
    return _padded(value), int(value), value


def _padded(value: str) -> bool:
    return len(value) > 1 and value.startswith("0")


def _runs(values: list[str]) -> list[list[str]]:
    """Ordered values cut where they stop counting up by one."""
    runs: list[list[str]] = []
    for value in values:
        last = runs[-1] if runs else []
        if last and not _padded(value) and not _padded(last[-1]) and int(value) == int(last[-1]) + 1:
            last.append(value)
        else:
            runs.append([value])
    return runs


def _pattern(path: str, axes: list[list[str]]) -> str:
    texts = _INTEGER.split(path)
    for position, values in enumerate(axes):
        runs = [run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in _runs(values)]
        texts[2 * position + 1] = values[0] if len(values) == 1 else "{" + ",".join(runs) + "}"
    return "".join(texts)

"""A Ctrl-C, or no memory, at any line of an operation leaves the model as it was."""

from __future__ import annotations

import pytest
from cases import MODELS, OPERATIONS, apply, case, grafted, inspect, revert
from harness import FAULTS, broken_by, lines_of

from regraft.graft import apply as graft_apply

QUICK = (apply, revert, inspect, grafted)
CASES = [(operation, name) for operation in OPERATIONS for name in MODELS]


def broken(operation, name, places, faults):
    """Of these lines, those at which a fault leaves something changed."""
    work, build = case(operation, name)
    lines = lines_of(work, build)
    assert len(lines) > 50
    results = {
        (fault, *line): broken_by(work, build, line, FAULTS[fault])
        for place, line in enumerate(lines[places])
        for fault in (faults if len(faults) == len(FAULTS) else [faults[place % len(faults)]])
    }
    return {place: what for place, what in results.items() if what}


@pytest.mark.parametrize("operation", QUICK, ids=lambda one: one.__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_a_small_model_as_it_was(operation, fault):
    assert broken(operation, "lstm", slice(30, None, 60), [fault]) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_takes_its_grafts_out_whatever_line_of_its_end_fails(fault):
    work, build = case(grafted, "lstm")
    ends = [function.__code__ for function in (graft_apply._take_out_of, graft_apply.take_out)]
    lines = {(code.co_filename, line) for code in ends for _, _, line in code.co_lines()}
    lines = sorted(lines & set(lines_of(work, build)))
    assert len(lines) > 3
    assert {line: what for line in lines if (what := broken_by(work, build, line, FAULTS[fault]))} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "name"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_fault_at_some_lines_leaves_a_model_as_it_was(operation, name):
    kinds = list(FAULTS)
    shift = CASES.index((operation, name))  # in turns: which lines, and which fault
    assert broken(operation, name, slice(shift, None, 160), [kinds[shift % 3], kinds[(shift + 1) % 3]]) == {}


@pytest.mark.weekly
@pytest.mark.parametrize(("operation", "name"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_fault_at_any_line_leaves_a_model_as_it_was(operation, name):
    assert broken(operation, name, slice(None), list(FAULTS)) == {}

"""Every dropout of real architectures is reached or reported, and the rest of the model stays as it was.

The default run takes a model of each kind; `-m slow` takes all of them.
"""

from __future__ import annotations

import functools

import pytest

from . import check
from .entries import entries, entry

CHOSEN = frozenset(
    f"{library}:{name}"
    for library, names in {
        "torch": "Transformer MultiheadAttention-weights LSTM functional aliased dead-twin private",
        "torchvision": "densenet121 maxvit vit_b_32",
        "timm": "test_vit test_convnext test_efficientnet test_byobnet",
        "peft": "lora-bert lora-llama",
        "hf": "bert bart llama gpt2 t5 deberta-v2 vit swin wav2vec2 mixtral whisper beit",
    }.items()
    for name in names.split()
)
IDS = [one.id for one in entries()]
chosen = pytest.mark.xdist_group("chosen")
MODELS = [
    pytest.param(
        name,
        id=name,
        # A row is made once in a process: all tests that share one run in the same process.
        marks=chosen if name in CHOSEN else [pytest.mark.xdist_group(name), pytest.mark.slow],
    )
    for name in sorted(IDS, key=lambda name: name not in CHOSEN)
]


@functools.cache
def _row(name: str) -> check.Row:
    check.quiet()
    return check.graft_row(entry(name))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> check.Row:
    found = _row(request.param)
    if found.error is not None and found.error.startswith("zoo: "):
        pytest.skip(f"it does not run without regraft either: {found.error}")
    assert found.error is None
    return found


every_model = pytest.mark.parametrize("row", MODELS, indirect=True)


@every_model
def test_every_call_left_is_in_the_report(row):
    assert row.silent == []


@every_model
def test_every_call_gone_has_a_variant_in_its_place(row):
    assert row.lost == 0
    assert row.reached + sum(row.skipped.values()) == row.calls


@every_model
def test_every_draw_is_accounted_for(row):
    if row.probe is None and row.balance:
        numbers = dict(row.balance)
        numbers.pop("unconfirmed")
        assert numbers.pop("draws") == sum(numbers.values())
        assert row.unseen == []
        assert row.unlisted == []


@every_model
def test_eval_is_the_same_to_the_bit(row):
    assert not row.eval_differs


@every_model
def test_revert_brings_everything_back(row):
    assert row.revert_differs == []


def test_the_chosen_models_are_in_the_zoo():
    assert set(IDS) >= CHOSEN


@pytest.mark.slow
def test_nearly_all_models_run_without_regraft():
    broken = {name: error for name in IDS if (error := _row(name).error or "").startswith("zoo: ")}
    assert len(broken) <= 5, broken


@chosen
def test_the_chosen_models_are_reached():
    rows = [_row(name) for name in CHOSEN]
    assert [row.error for row in rows if row.error] == []
    plain, calls = sum(row.plain for row in rows), sum(row.calls for row in rows)
    assert plain > 100
    assert sum(row.reached_plain for row in rows) >= 0.95 * plain
    assert sum(row.reached for row in rows) >= 0.95 * calls


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm", "peft", "hf"])
def test_a_library_is_reached(library):
    rows = [_row(name) for name in IDS if name.startswith(f"{library}:")]
    plain, calls = sum(row.plain for row in rows), sum(row.calls for row in rows)
    assert sum(row.reached_plain for row in rows) >= 0.99 * plain
    assert sum(row.reached for row in rows) >= 0.95 * calls

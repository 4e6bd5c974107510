"""What all tests share: one thread, a fixed seed, and nothing of regraft or torch left switched on."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.metadata
import signal
import sys
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell starts what is in the background without it

for profile, count in (("default", 25), ("ci", 200), ("weekly", 2_000)):
    settings.register_profile(
        profile, max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
settings.load_profile("default")


def pytest_collectstart():
    """What a file draws while it is imported is the same in every run too."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The models of transformers 4 branch on values, and their attention goes by a number, not by a dropout."""
    if int(importlib.metadata.version("transformers").split(".")[0]) < 5:
        for item in items:
            if item.get_closest_marker("transformers5"):
                item.add_marker(pytest.mark.skip(reason="of models as transformers 5 writes them"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_on():
    """A mode or a global hook that outlives its test would change what the next ones see."""
    yield
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_forward_hooks
    calls = sys.modules.get("regraft.graft.calls")
    assert calls is None or not calls._running.modes
    assert torch.overrides._get_current_function_mode() is None


@pytest.fixture
def registered():
    """Variants registered in the test are gone after it: the contract suites list the registry."""
    from regraft.variants import registry

    registry.names()
    before = dict(registry._specs)
    yield registry
    registry._specs.clear()
    registry._specs.update(before)


def pytest_terminal_summary(terminalreporter):
    """Say how many checks the contract suites made."""
    passed = [one.nodeid for one in terminalreporter.stats.get("passed", []) if one.when == "call"]
    suites = Counter(name.split("::")[0] for name in passed if "contracts/" in name)
    for suite, count in sorted(suites.items()):
        terminalreporter.write_line(f"{suite}: {count} checks passed")

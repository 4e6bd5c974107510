"""The public names: they load lazily, they exist, and the examples in their docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import regraft

FIXED = {
    "inspect", "plan", "apply", "revert", "grafted", "Plan", "variant", "register", "save_plan", "load_plan",
    "rdrop_loss", "rdrop", "rdrop_criterion", "stochastic_passes", "multisample_loss", "mc_predict", "after",
    "before", "max_norm", "schedule", "suggest", "penalty", "trace", "diff", "verify", "RegraftError",
    "errors", "nn", "integrations", "results",
}  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"
HEAVY = ("torch", "timm", "transformers", "typer", "rich", "matplotlib", "numpy", "accelerate")
MODULES = [
    info.name
    for info in pkgutil.walk_packages(regraft.__path__, "regraft.")
    if not info.name.endswith("__main__")
]


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = (
        f"import sys, regraft; regraft.__all__; dir(regraft); print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_errors_and_the_views_load_without_torch():
    code = (
        "import sys, regraft.errors, regraft.report.view; regraft.RegraftError; print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_a_plain_graft_loads_no_library_of_models():
    code = (
        "import sys, regraft\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))\n"
        "report = regraft.apply(net, {'Dropout': 'gaussian'}); regraft.revert(net)\n"
        f"print([m for m in {[m for m in HEAVY if m not in ('torch', 'numpy')]} if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_every_name_that_is_promised_is_there():
    assert set(regraft.__all__) >= FIXED
    assert regraft.__all__ == sorted(set(regraft.__all__))
    for name in regraft.__all__:
        assert getattr(regraft, name) is not None, name
    assert set(dir(regraft)) >= set(regraft.__all__)


@pytest.mark.parametrize("name", regraft.results.__all__)
def test_a_result_still_has_its_former_name(name):
    with pytest.warns(DeprecationWarning, match=rf"regraft\.results\.{name}"):
        assert getattr(regraft, name) is getattr(regraft.results, name)
    assert inspect.getdoc(getattr(regraft.results, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'regraft' has no attribute 'aply'"):
        _ = regraft.aply
    with pytest.raises(ImportError):
        exec("from regraft import aply")


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_help_lists_the_callbacks(library):
    module = getattr(regraft.integrations, library)
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    for name in module.__all__:
        assert f"class {name}(" in text


def test_the_pages_of_the_api_list_what_is_public():
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[?`regraft\.(\w+)`", index, re.MULTILINE)
    assert sorted(listed) == regraft.__all__
    documented = re.findall(r"^::: regraft\.(\w+)$", index, re.MULTILINE)
    assert set(listed) - set(documented) == {"nn", "integrations", "errors", "results", "__version__"}
    page = (DOCS / "api" / "integrations.md").read_text(encoding="utf-8")
    for library in ("transformers", "lightning"):
        section = re.findall(
            rf"^::: regraft\.integrations\.{library}\..*\n.*heading: (\w+)", page, re.MULTILINE
        )
        assert sorted(section) == getattr(regraft.integrations, library).__all__


def test_every_error_has_its_section():
    headings = re.findall(r"^## (\w+Error)$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    errors = vars(regraft.errors).values()
    classes = [value for value in errors if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(headings) == sorted(one.__name__ for one in classes if one is not regraft.RegraftError)


def test_nn_lists_a_module_for_every_variant():
    from regraft.variants.registry import names, spec

    listed = {getattr(regraft.nn, name) for name in regraft.nn.__all__}
    for name in names():
        for family in spec(name).families:
            made = spec(name).module_for(family)
            assert made in listed or made.__module__ != f"regraft.variants.{name}", name
    assert all(inspect.isclass(module) for module in listed)


def test_every_public_object_is_documented_with_an_example():
    missing = []
    for name in regraft.__all__:
        value = getattr(regraft, name)
        if inspect.ismodule(value) or isinstance(value, str):
            continue
        if not inspect.getdoc(value):
            missing.append(name)
        elif inspect.isfunction(value) and "Example:" not in value.__doc__:
            missing.append(f"{name}: no example")
    assert missing == []


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_its_docstrings_run(name, registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_examples_were_found():
    finder = doctest.DocTestFinder()
    found = sum(
        len(test.examples) > 0
        for name in MODULES
        for test in finder.find(importlib.import_module(name), name)
    )
    assert found > 50

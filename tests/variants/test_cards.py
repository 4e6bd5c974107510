"""Every variant has its card: complete, with its picture, with code that runs and figures that were measured."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

import regraft
from regraft.variants import registry
from regraft.variants.spec import DEFAULT_RATE

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "docs" / "variants"
SECTIONS = ["When", "Formula", "Use", "Cost", "Source", "How it differs"]
registry.names()
NAMES = sorted(registry._builtin)
every = pytest.mark.parametrize("name", NAMES)


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_there_is_a_card_for_each_variant_and_no_other():
    cards = {path.stem for path in CARDS.glob("*.md")} - {"README"}
    assert cards == {path.stem for path in CARDS.glob("*.png")} == set(NAMES)
    assert [row[0] for row in table()] == [f"[`{name}`]({name}.md)" for name in NAMES]


def table() -> list[list[str]]:
    lines = (CARDS / "README.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| [")]


WORDS = {"Dropout": "dropouts", "DropPath": "DropPath", "Linear": "linear layers", "Embedding": "embeddings"}


@pytest.mark.parametrize("row", table(), ids=NAMES)
def test_a_row_of_the_table_agrees_with_the_registry(row):
    link, module, options, place, source, _ = row
    spec = registry.spec(link.split("`")[1])
    assert module == f"`regraft.nn.{spec.module.__name__}`"
    defaults = {**({"p": DEFAULT_RATE} if spec.rated else {}), **spec.defaults}
    assert options.strip("`") == (", ".join(f"{key}={value!r}" for key, value in defaults.items()) or "none")
    if spec.rated:
        assert inspect.signature(spec.function).parameters["p"].default == DEFAULT_RATE
        assert inspect.signature(spec.module).parameters["p"].default in (DEFAULT_RATE, None)
    attention = ["attention"] if spec.attention else [WORDS[family] for family in spec.families]
    assert all(word in place for word in (attention if spec.name != "off" else ["any site"]))
    documented = inspect.getdoc(spec.function).split("Source:\n")[1].split("\n\n")[0]
    card = section((CARDS / f"{spec.name}.md").read_text(), "Source")
    for word in re.findall(r"[A-Z][a-z]+|\d{4}|none", source):  # authors and year
        assert word in documented
        assert word in card or word == "none"


@every
def test_a_card_is_complete(name):
    text = (CARDS / f"{name}.md").read_text()
    assert text.startswith("# ")
    assert f"`{name}`" in text.split("\n")[0]
    assert f"]({name}.png)" in text
    assert all(section(text, title).strip() for title in SECTIONS)
    picture = (CARDS / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 2_000 < len(picture) < 60_000


@every
def test_what_a_card_says_to_write_runs(name):
    use = section((CARDS / f"{name}.md").read_text(), "Use")
    (rule,) = re.findall(r"regraft\.apply\(model, \{.+?: \"(.+)\"\}\)", use)
    variant = regraft.variants.registry.parse_variant(rule)
    assert variant.name == name
    (plain,) = re.findall(r"^(regraft\.nn\..+\))", use, re.M)
    small = plain.replace("32000, 4096", "10, 4").replace("768, 768", "6, 6")
    made = eval(small, {"regraft": regraft})
    assert type(made) in {registry.spec(name).module_for(family) for family in registry.spec(name).families}


@every
def test_the_figures_of_a_card_are_those_measured(name):
    rows = [
        line
        for line in (ROOT / "benchmarks" / "RESULTS.md").read_text().splitlines()
        if line.startswith(f"| {name}")
    ]
    measured = set(re.findall(r"\d+\.\d\d", "\n".join(rows)))
    said = set(re.findall(r"\d+\.\d\d", section((CARDS / f"{name}.md").read_text(), "Cost")))
    assert said <= measured
    assert said or name == "off"


def test_every_picture_is_drawn_by_the_script():
    script = runpy.run_path(str(CARDS / "pictures.py"))
    assert sorted(script["PICTURES"]) == NAMES

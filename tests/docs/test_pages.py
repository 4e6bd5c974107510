"""Every snippet of the README and of the documentation runs, in the order of its page, and prints what is shown."""

from __future__ import annotations

import re

import pages
import pytest

PAGES = [path.relative_to(pages.ROOT).as_posix() for path in pages.all_pages()]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_snippets_of_a_page_run_in_their_order(name, registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pages.ROOT / name
    text = path.read_text(encoding="utf-8")
    for block, printed in pages.run_page(path):
        if block.shown:
            shown = text[slice(*block.shown)]
            assert pages.agree(printed, shown), f"{name}, line {block.line}, prints\n{printed}"


def test_a_page_that_shows_another_output_is_noticed():
    shown = "a\n...\nd in 0.4 s\n"
    assert pages.agree("a\nb\nc\nd in 1.2 s", shown)
    assert pages.agree("a\nd in 1.2 s", shown)
    assert not pages.agree("a\nb\nc\ne in 1.2 s", shown)
    assert not pages.agree("a\nd in 1.2 s\ne", shown)


def test_every_page_is_in_the_navigation():
    navigation = (pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.md)$", navigation, re.MULTILINE))
    docs = pages.ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    cards = {page for page in there if page.startswith("variants/") and page != "variants/README.md"}
    tables = {page for page in there if page.startswith("results/")}
    assert there - cards - tables <= listed

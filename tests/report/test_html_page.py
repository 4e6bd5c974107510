"""The HTML page, without a browser: it is whole, it needs nothing else, and no name becomes markup."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from torch import nn

import regraft
from regraft.report.html import to_fragment, to_page

NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><b>',
    "' onclick='alert(1)",
    "<!--",
    "]]>",
    "&lt;script&gt;",
    "\u2028\u2029",
    "\u202eevil",
    "\x1b[31m",
    "javascript:alert(1)",
    "{{7*7}}",
    "${alert(1)}",
]


class Tags(HTMLParser):
    """What a browser would see: tags with their attributes, and what stands in scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.styles, self._inside = [], [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles.append(data)

    def handle_endtag(self, tag):
        self._inside = None


def inspection(name="Net", path="layer"):
    site = {
        "path": path,
        "paths": [path, name],
        "kind": "module",
        "op": name,
        "type": name,
        "p": 0.1,
        "calls": 1,
        "source": name,
        "shape": None,
        "parameters": 0,
        "device": name,
        "dtype": "float32",
        "training": True,
        "variant": name,
    }
    return {
        "schema": 1,
        "view": "inspection",
        "model": name,
        "notes": [name],
        "probe": {"ran": False, "reason": name},
        "sites": [site, {**site, "path": name, "variant": None}],
        "findings": [{"path": name, "finding": name, "source": name, "remedy": name}],
    }


def views():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    plan = regraft.plan(net, {"Dropout": "gaussian", "Linear@2": "dropconnect(p=0.2)"})
    before = regraft.inspect(net)
    report = regraft.apply(net, plan)
    return [before, plan, report, regraft.diff(before, net)]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_becomes_markup(name):
    clean, nasty = Tags(to_page(inspection("Net"))), Tags(to_page(inspection(name)))
    # Braces in a path are set in <b>, by the page itself.
    shapes = [[(tag, sorted(a)) for tag, a in page.tags if (tag, a) != ("b", {})] for page in (clean, nasty)]
    assert shapes[0] == shapes[1]
    assert nasty.scripts == clean.scripts
    assert len(nasty.scripts) == 1
    fragment = Tags(to_fragment(inspection(name)))
    assert "script" not in [tag for tag, _ in fragment.tags]


def test_only_its_own_script_and_style_may_run():
    page = Tags(to_page(inspection()))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")

    def allowed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert f"style-src {allowed(page.styles[0])}" in policy
    assert f"script-src {allowed(page.scripts[0])}" in policy
    assert "unsafe" not in policy
    assert len(page.styles) == 1


@pytest.mark.parametrize("view", views(), ids=lambda view: view.to_dict()["view"])
def test_it_needs_nothing_else(view):
    page = view.to_html()
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    tags = Tags(page).tags
    assert not any(name in ("src", "href") or name.startswith("on") for _, a in tags for name in a)
    assert not any("style" in attributes for _, attributes in tags)
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<main") == page.count("</main>") == 1


@pytest.mark.parametrize("view", views(), ids=lambda view: view.to_dict()["view"])
def test_every_place_of_the_view_is_in_the_tree(view):
    facts = view.to_dict()
    places = [
        row
        for key in ("sites", "grafted", "skipped", "changed", "added", "removed")
        for row in facts.get(key, [])
    ]
    page = view.to_html()
    shown = re.findall("<dt>path</dt><dd>(.*?)</dd>", page)
    assert sorted(shown) == sorted(place["path"] or "(the model itself)" for place in places)
    assert page.count('class="site"') == len(places)
    tables = facts.get("uncompared", [])
    assert page.count("<table>") == bool(tables), "no list twice"


def test_before_and_after_stand_side_by_side():
    _, _, report, _ = views()
    assert (
        '<code>1</code><span class="sides"><del class="before">Dropout(p=0.1)</del>'
        '<ins>GaussianDropout(p=0.1)</ins></span><span class="status">grafted</span>'
    ) in report.to_html()


def test_findings_come_first_and_then_the_tree():
    page = to_page(inspection())
    assert page.index('class="finding"') < page.index('class="tree"')


def test_a_view_without_places_has_no_script():
    page = Tags(to_page({"schema": 1, "view": "plan", "model": "Net", "grafted": [], "skipped": []}))
    assert page.scripts == []


def test_what_is_left_as_it_is_has_its_places_on_the_page_too():
    left = [{"path": "rope", "what": "an unrecognized draw", "source": "a.py:3", "remedy": "name it"}]
    view = {"schema": 1, "view": "plan", "model": "Net", "grafted": [], "skipped": [], "left": left}
    site = {"path": "drop", "op": "Dropout", "reason": "its rate is 0", "remedy": "name one"}
    page = to_page({**view, "skipped": [site]})
    assert page.index("<code>rope</code>") < page.index('class="tree"')

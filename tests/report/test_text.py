"""Views as text and Markdown: what a plan, a report and an inspection show, line by line."""

from __future__ import annotations

import json

import pytest
import tiny
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.report.html import to_page as to_html
from regraft.report.markdown import to_markdown
from regraft.report.text import to_text


def edit(path, **more):
    base = {
        "path": path, "paths": [path], "kind": "module", "op": "Dropout", "type": "Dropout",
        "before": "Dropout(p=0.1)", "after": "GaussianDropout(p=0.1)", "variant": "gaussian",
        "options": {}, "rule": 0, "calls": 1, "source": "a/model.py:7", "cost": None,
    }  # fmt: skip
    return {**base, **more}


def skip(path, reason="its rate is 0", **more):
    base = {
        "path": path, "paths": [path], "kind": "module", "op": "Dropout", "type": "Dropout", "calls": 1,
        "source": "a/model.py:9", "reason": reason, "remedy": "name one", "rule": 0,
    }  # fmt: skip
    return {**base, **more}


def report(**more):
    base = {
        "schema": 1, "view": "report", "model": "Net", "rules": [["Dropout", "gaussian"]], "grafted": [],
        "skipped": [], "mended": [], "state_keys": [], "notes": [],
        "probe": {"ran": True, "how": "fake tensors", "reason": None, "seconds": 0.4},
    }  # fmt: skip
    return {**base, **more}


def test_a_diff_folds_what_is_alike():
    rows = [edit(f"layer.{i}.drop") for i in range(12)] + [edit("head", source="a/model.py:8")]
    assert to_text(report(grafted=rows)).splitlines() == [
        "Net: 13 sites grafted, 0 skipped",
        "probed on fake tensors in 0.4 s, no new state-dict keys",
        "",
        '@@ "Dropout": "gaussian" @@',
        "- Dropout(p=0.1)  x13",
        "+ GaussianDropout(p=0.1)",
        "    site                sites  source",
        "    layer.{0..11}.drop    x12  a/model.py:7",
        "    head                       a/model.py:8",
    ]


def test_rates_that_grow_with_depth_are_one_range():
    rows = [
        edit(f"b.{i}.path", p=i / 10, before=f"DropPath(p={i / 10})", after=f"Noise(p={i / 20})",
             options={"p": i / 20}, strength=f"noise {i}")
        for i in (1, 2, 3)
    ]  # fmt: skip
    text = to_text(report(grafted=rows))
    assert "  strength: noise 1 .. noise 3" in text
    assert "- DropPath(p=0.1..0.3)" in text
    assert "+ Noise(p=0.05..0.15)" in text
    assert "b.{1..3}.path     x3" in text


def test_a_saved_plan_folds_as_the_rules_did_that_made_it():
    rows = [edit(f"layer.{i}.drop", rule=i) for i in range(3)] + [
        edit("head", op="Linear", after="X", rule=3)
    ]
    rules = [[f"Dropout@layer.{i}.drop", "gaussian"] for i in range(3)] + [["Linear@head", "x"]]
    lines = to_text(report(rules=rules, grafted=rows)).splitlines()
    assert "@@ a rule for each site @@" in lines
    assert "    layer.{0..2}.drop     x3  a/model.py:7" in lines
    assert '@@ "Linear@head": "x" @@' in lines


def test_ranges_come_from_the_fields_and_not_from_the_text():
    rows = [edit(f"b.{i}.path", before=f"DropPath(p={i / 10})", after="off") for i in (1, 2, 3)]
    text = to_text(report(grafted=rows))
    assert text.count("- DropPath(p=0.") == 3


def test_a_cost_stands_below_what_has_it():
    rows = [edit("a", cost="its scores are kept"), edit("b")]
    lines = to_text(report(grafted=rows)).splitlines()
    at = lines.index("  cost: its scores are kept")
    assert lines[at + 2].split()[0] == "a"
    assert sum("cost:" in line for line in lines) == 1
    assert "*cost: its scores are kept*" in to_markdown(report(grafted=rows))


def test_the_strength_stands_below_what_has_it():
    rows = [edit("a", strength="noise 0.111 -> 0.014, 8x weaker")]
    for text in (to_text(report(grafted=rows)), to_html(report(grafted=rows))):
        assert "strength: noise 0.111 " in text


def test_the_page_ends_with_what_is_left_and_the_balance():
    left = [{"path": f"rope.{i}", "what": "an unrecognized draw", "source": "a.py:3", "remedy": "name it"}
            for i in range(3)]  # fmt: skip
    view = report(grafted=[edit("a")], left=left, balance={"draws": 7, "grafted": 6, "unconfirmed": 1})
    assert to_text(view).splitlines()[-9:] == [
        "",
        "left as it is: 3 places: an unrecognized draw",
        "  help: name it",
        "    site         sites  source",
        "    rope.{0..2}     x3  a.py:3",
        "",
        "balance",
        "  - 7 draws seen: 6 grafted",
        "  - 1 site unconfirmed: no forward has shown what runs",
    ]
    assert to_markdown(view).endswith(
        "**balance**\n\n- 7 draws seen: 6 grafted\n- 1 site unconfirmed: no forward has shown what runs\n"
    )
    page = to_html(view)
    assert page.index("an unrecognized draw") < page.index("<li>1 site unconfirmed")
    assert page.index('class="tree"') < page.index("<li>1 site unconfirmed")


def test_a_balance_in_numbers_is_a_sentence():
    left = [{"what": "draw", "name": "Noise: randn_like", "paths": ["b.0", "b.1"], "source": "a.py:3",
             "remedy": "register it", "count": 2}]  # fmt: skip
    balance = {"draws": 3, "sites": 1, "other": 0, "unrecognized": 2, "products": "4 of 4"}
    lines = to_text(report(left=left, balance=balance)).splitlines()
    assert lines[-8:] == [
        "left as it is: 2 places: Noise: randn_like",
        "  help: register it",
        "    site      sites  source",
        "    b.{0..1}     x2  a.py:3",
        "",
        "balance",
        "  - 3 draws seen: 1 at sites, 2 unrecognized",
        "  - products: 4 of 4",
    ]


def test_every_table_has_headings():
    rows = [edit("a", calls=2, kind="call"), edit("b")]
    assert to_text(report(grafted=[edit("2", source="")])).splitlines()[-2:] == ["    site", "    2"]
    for text in (to_text(report(grafted=rows)), to_markdown(report(grafted=rows))):
        assert "site kind calls source" in " ".join(text.replace("|", " ").split())


def test_numbers_are_labelled_and_plurals_are_right():
    text = str(regraft.inspect(nn.Sequential(nn.Linear(1000, 769, bias=False), nn.Dropout(0.1))))
    assert text.startswith("Sequential: 1 regularizer, 1 Linear (769.0k parameters)\n")
    assert "1 dropout site (p = 0.1); not probed." in text


def test_skips_say_why_and_what_to_do():
    text = to_text(report(skipped=[skip("a"), skip("b"), skip("c", reason="never called")]))
    assert "Net: 0 sites grafted, 3 skipped" in text
    assert "skipped 2 Dropout sites: its rate is 0" in text
    assert "skipped 1 Dropout site: never called" in text
    assert text.count("  help: name one") == 2


def test_mended_faults_and_new_keys():
    text = to_text(
        report(
            grafted=[edit("a")],
            mended=[{"path": "a", "what": "it dropped in eval too", "source": None}],
            state_keys=["a.concrete_logit"],
        )
    )
    assert "1 mended" in text
    assert "mended 1 site: it dropped in eval too" in text
    assert "1 new key in the state dict" in text
    assert "a.concrete_logit" in text
    assert "no new state-dict keys" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_line_is_wider_than_it_may_be(width):
    rows = [edit(f"encoder.stages.{i}.blocks.{j}.attention.output.drop") for i in (0, 3) for j in (1, 9)]
    text = to_text(report(grafted=rows, notes=["a long note " * 20], skipped=[skip("x", "why " * 60)]), width)
    assert max(map(len, text.splitlines())) <= width


def test_names_cannot_break_a_line_or_become_markup():
    rows = [edit("a\nb\x1b[31m"), edit("<script>|`x`")]
    view = report(model="<b>*N*", grafted=rows)
    assert "\x1b" not in to_text(view)
    assert not any(line.startswith("b") for line in to_text(view).splitlines())
    markdown = to_markdown(view)
    assert "<b>" not in markdown
    assert "\\*N\\*" in markdown


def test_each_view_of_a_real_model_has_all_forms():
    model = tiny.bert()
    inspection = regraft.inspect(model)
    plan = regraft.plan(model, {"Dropout": "gaussian"})
    done = regraft.apply(model, plan)
    for view in (inspection, plan, done):
        values = json.loads(view.to_json())
        assert values["schema"] == 1
        assert values == view.to_dict()
        assert values["model"] == "BertForSequenceClassification"
        assert str(view).startswith("BertForSequenceClassification: ")
        assert view.to_markdown().startswith("### BertForSequenceClassification: ")
        assert view._repr_html_().lstrip().startswith("<")
    keys = {"path", "paths", "kind", "op", "before", "after", "variant", "options", "rule", "calls", "source"}
    assert all(keys <= one.keys() for one in done.to_dict()["grafted"])
    keys = {"path", "paths", "kind", "op", "type", "p", "calls", "source"}
    assert all(keys <= one.keys() for one in inspection.to_dict()["sites"])
    assert {one.path for one in done.grafted} == {one["path"] for one in done.to_dict()["grafted"]}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.lost = nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(F.dropout(x, 0.3))


def test_an_inspection_shows_sites_and_faults():
    import torch

    text = str(regraft.inspect(Two(), torch.ones(2, 3)))
    assert "lost" in text
    assert "never" in text
    assert "draws in eval" in text or "in eval" in text
    assert "help: " in text


def test_rich_prints_the_same_words_in_colour():
    from rich.console import Console

    net = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0))
    done = regraft.apply(net, {"Dropout": "gaussian"})
    console = Console(width=100, force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as caught:
        console.print(done)
    coloured = caught.get()
    assert "\x1b[3" in coloured
    plain = Console(width=100, no_color=True, force_terminal=False)
    with plain.capture() as caught:
        plain.print(done)
    assert [line.rstrip() for line in caught.get().splitlines()] == str(done).splitlines()


def test_a_weight_says_which_of_its_numbers_are_the_kernel():
    import torch

    text = str(regraft.inspect(nn.Sequential(nn.Conv2d(3, 64, 7), nn.Flatten()), torch.ones(1, 3, 8, 8)))
    assert "64 x 3, kernel 7x7" in text

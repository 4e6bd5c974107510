"""Every form of a selector, as tables over the sites of real models."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import RuleSyntaxError
from regraft.find.selectors import read_selector


class Kinds(nn.Module):
    """One site of each kind: modules, calls, and what hides a dropout inside."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Dropout(0.1)
        self.one = nn.Dropout1d(0.1)
        self.two = nn.Dropout2d(0.1)
        self.three = nn.Dropout3d(0.1)
        self.alpha = nn.AlphaDropout(0.1)
        self.feature = nn.FeatureAlphaDropout(0.1)
        self.mine = MyDropout(0.1)
        self.own = OwnForward(0.1)
        self.path = DropPath(0.1)
        self.depth = StochasticDepth(0.1)
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.1)
        self.gru = nn.GRU(4, 4, 2, dropout=0.1)
        self.mha = nn.MultiheadAttention(4, 2, dropout=0.1)
        self.linear = nn.Linear(4, 4)
        self.subclass = SameLinear(4, 4)
        self.other = OtherLinear(4, 4)
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        F.dropout(x, 0.1, self.training)
        F.dropout1d(x, 0.1, self.training)
        F.dropout2d(x[None], 0.1, self.training)
        F.dropout3d(x[None, None], 0.1, self.training)
        F.alpha_dropout(x, 0.1, self.training)
        F.feature_alpha_dropout(x, 0.1, self.training)
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 * self.training)
        for module in self.children():
            if module is self.mha:
                module(x, x, x)
            elif module is self.table:
                module(torch.zeros(2, dtype=torch.long))
            elif module is not self.three and module is not self.two:
                module(x)
        self.two(x[None])
        self.three(x[None])
        return x


class MyDropout(nn.Dropout):
    """Keeps torch's forward: a plain dropout."""


class OwnForward(nn.Dropout):
    def forward(self, x):
        return x * 1


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x / keep * torch.rand(x.shape[0], *[1] * (x.dim() - 1)).add(keep).floor()


class StochasticDepth(DropPath):
    pass


class SameLinear(nn.Linear):
    """Keeps torch's forward: a Linear."""


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.fixture(scope="module")
def kinds():
    return regraft.inspect(Kinds(), torch.ones(2, 3, 4))


DROPOUTS = {"plain", "mine", "lstm", "gru", "mha", ":dropout", ":scaled_dot_product_attention"}
RECURRENT = {
    f"{rnn}.weight_{side}_l{layer}" for rnn in ("lstm", "gru") for side in ("ih", "hh") for layer in (0, 1)
}
MATRICES = {"linear", "subclass", "other", "mha.in_proj_weight", "mha.out_proj", *RECURRENT}
SELECTED = [
    # a type name is that exact kind, made as a module or called
    ("Dropout", DROPOUTS),
    ("Dropout1d", {"one", ":dropout1d"}),
    ("Dropout2d", {"two", ":dropout2d"}),
    ("Dropout3d", {"three", ":dropout3d"}),
    ("AlphaDropout", {"alpha", ":alpha_dropout"}),
    ("FeatureAlphaDropout", {"feature", ":feature_alpha_dropout"}),
    ("DropPath", {"path", "depth"}),
    ("StochasticDepth", {"depth"}),
    ("MyDropout", {"mine"}),
    ("OwnForward", {"own"}),
    ("LSTM", {"lstm"}),
    ("GRU", {"gru"}),
    ("MultiheadAttention", {"mha"}),
    ("scaled_dot_product_attention", {":scaled_dot_product_attention"}),
    ("dropout", {":dropout"}),
    ("dropout2d", {":dropout2d"}),
    # every matrix that multiplies; each form by itself
    ("Linear", MATRICES),
    ("recurrent", RECURRENT),
    ("in_proj", {"mha.in_proj_weight"}),
    ("out_proj@mha.**", {"mha.out_proj"}),
    ("Embedding", {"table"}),
    # TYPE@PATH, *@PATH, a path
    ("Dropout@plain", {"plain"}),
    ("Dropout@{plain,mine,one}", {"plain", "mine"}),
    ("*@{plain,one}", {"plain", "one"}),
    ("Linear@**", MATRICES),
    ("Linear@*", {"linear", "subclass", "other"}),
    ("mha.out_proj", {"mha.out_proj"}),
    ("mha.**", {"mha", "mha.in_proj_weight", "mha.out_proj"}),
    # a regular expression over the whole path
    ("re:.*_proj", {"mha.out_proj"}),
    ("re:(lstm|gru)", {"lstm", "gru"}),
    ("re:ls", set()),
    ("re:(?i)LSTM", {"lstm"}),
    # a class is isinstance, and means modules alone
    (nn.Dropout, {"plain", "mine", "own"}),
    (nn.Linear, {"linear", "subclass", "other", "mha.out_proj"}),
    (nn.modules.dropout._DropoutNd, {"plain", "one", "two", "three", "alpha", "feature", "mine", "own"}),
    (DropPath, {"path", "depth"}),
    # a predicate
    (lambda site: site.family == "DropPath", {"path", "depth"}),
    (
        lambda site: site.kind == "call" and site.p == 0.1 and "alpha" in site.op,
        {":alpha_dropout", ":feature_alpha_dropout"},
    ),
    (lambda site: site.path == "linear" and site.shape == (4, 4), {"linear"}),
    # nothing
    ("Conv2d", set()),
    ("Dropout@one", set()),
]


def name(site):
    return site.path if site.kind in ("module", "weight") else f"{site.path}:{site.op}"


@pytest.mark.parametrize(
    ("key", "expected"),
    SELECTED,
    ids=[f"{i} {getattr(row[0], '__name__', row[0])}"[:40] for i, row in enumerate(SELECTED)],
)
def test_a_selector_selects(kinds, key, expected):
    selector = read_selector(key)
    assert {name(site) for site in kinds.sites if selector.matches(site)} == expected


def test_every_site_of_the_table_is_selected_by_a_double_star_and_by_a_star(kinds):
    for key in ("*", "**", "*@**", "re:.*"):
        assert all(read_selector(key).matches(site) for site in kinds.sites)
    assert all(isinstance(site, regraft.results.Site) for site in kinds.sites)


@pytest.mark.parametrize("path", ["first", "second", "*.0"])
def test_any_alias_of_a_shared_module_counts(path):
    net = nn.Module()
    net.first = net.second = nn.Dropout(0.1)
    net.inner = nn.Sequential(net.first)
    (site,) = regraft.inspect(net).sites
    assert site.paths == ("first", "second", "inner.0")
    assert read_selector(f"Dropout@{path}").matches(site)
    assert not read_selector("Dropout@third").matches(site)


@pytest.mark.parametrize(
    "key", ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.attention.self.dropout"]
)
@pytest.mark.transformers5
def test_a_dead_twin_and_its_call_are_one_site_with_two_paths(key):
    sites = regraft.inspect(tiny.bert()).sites
    selected = [site for site in sites if read_selector(f"Dropout@{key}").matches(site)]
    assert [(site.kind, site.op, site.p) for site in selected] == [
        ("call", "scaled_dot_product_attention", 0.1)
    ]


@pytest.mark.parametrize(
    ("text", "position", "rest"),
    [("after:Linear@head", "after", "Linear"), ("before: *@head", "before", "*"), ("Linear", "", "Linear")],
)
def test_a_position_can_lead(text, position, rest):
    selector = read_selector(text)
    assert (selector.position, selector.type) == (position, rest)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "the selector '' is empty"),
        ("after:", "the selector 'after:' is empty"),
        ("a b@c", "'a b' is no type\n  help: TYPE@PATH"),
        ("@c", "'' is no type"),
        ("Linear@", "one of its parts is empty"),
        ("Linear@a.{0..2", "a brace does not close"),
        ("re:(", r"the regular expression in 're:\(' cannot be read"),
        (3, "3 selects nothing: a int is no selector"),
        (None, "a NoneType is no selector"),
        (int, "int is no class of modules"),
    ],
)
def test_a_selector_that_cannot_be_read_says_why(key, message):
    with pytest.raises(RuleSyntaxError, match=message):
        read_selector(key)

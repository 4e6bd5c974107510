"""`rdrop_loss` against hand calculations, the paper's equations and torch's own losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import regraft
from regraft.errors import LossError, RateError
from regraft.training.rdrop.options import RDropOptions
from regraft.training.rdrop.rdrop_loss import rdrop_terms

P = [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
Q = [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
Y = [0, 1]


def terms(logits, labels, alpha=1.0, **options):
    return rdrop_terms(logits, labels, RDropOptions(alpha=alpha, **options))


def softmax(row):
    exponents = [math.exp(value) for value in row]
    return [value / sum(exponents) for value in exponents]


def hand_parts():
    """(CE of pass 1, CE of pass 2, symmetric KL), each as a list with one entry per sample."""
    first, second, apart = [], [], []
    for p_row, q_row, label in zip(P, Q, Y, strict=True):
        p, q = softmax(p_row), softmax(q_row)
        first.append(-math.log(p[label]))
        second.append(-math.log(q[label]))
        forwards = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        backwards = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        apart.append((forwards + backwards) / 2)
    return first, second, apart


def logits(dtype=torch.float64):
    return torch.tensor([P, Q], dtype=dtype)


def test_the_papers_loss_by_hand():
    first, second, apart = hand_parts()
    expected = sum(first) / 2 + sum(second) / 2 + 0.7 * sum(apart) / 2
    loss = regraft.rdrop_loss(logits(), torch.tensor(Y), alpha=0.7, ce="sum")
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    # And in closed form, so that a slip in the code above cannot hide one in the library: the label's
    # exponent is e^2 or e of a sum of e^2 + 2 or e + 2, and the two passes swap two classes.
    e = math.e
    ce = (math.log((e**2 + 2) / e**2) + math.log((e + 2) / e) + math.log(e**2 + 2) + math.log(e + 2)) / 2
    kl = (2 * (e**2 - 1) / (e**2 + 2) + (e - 1) / (e + 2)) / 2
    assert regraft.rdrop_loss(logits(), torch.tensor(Y), ce="sum").item() == pytest.approx(ce + kl, rel=1e-14)


def test_the_authors_convention_by_hand():
    first, second, apart = hand_parts()
    expected = 0.5 * (sum(first) / 2 + sum(second) / 2) + 4.0 * sum(apart)
    loss = regraft.rdrop_loss(logits(), torch.tensor(Y), alpha=4.0, reduction="sum")
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_the_terms_add_up_to_the_loss():
    task, kl = terms(logits(), torch.tensor(Y), 0.3)
    first, second, apart = hand_parts()
    assert task.item() == pytest.approx((sum(first) + sum(second)) / 4)
    assert kl.item() == pytest.approx(sum(apart) / 2)
    torch.testing.assert_close(task + 0.3 * kl, regraft.rdrop_loss(logits(), torch.tensor(Y), 0.3))


def pairs_by_definition(x):
    """Mean over pairs of passes of (KL_ij + KL_ji) / 2 at each position, as the equations read."""
    log_p = x.log_softmax(-1)
    kl = [
        (a.exp() * (a - b) + b.exp() * (b - a)).sum(-1) / 2
        for i, a in enumerate(log_p)
        for b in log_p[i + 1 :]
    ]
    return torch.stack(kl).mean(0)


@pytest.mark.parametrize("passes", [2, 3, 5])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 3, 5)])
def test_n_passes_by_definition(passes, shape):
    torch.manual_seed(0)
    x = torch.randn(passes, *shape, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, shape)
    ce = torch.stack([F.cross_entropy(one.reshape(-1, 7), labels.flatten()) for one in x])
    expected = ce.mean() + 0.8 * pairs_by_definition(x).mean()
    torch.testing.assert_close(regraft.rdrop_loss(x, labels, 0.8), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 10_000))
def test_properties(passes, batch, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(passes, batch, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    task, kl = terms(x, labels)
    assert kl >= 0
    torch.testing.assert_close(terms(x.flip(0), labels).kl, kl)  # no pass is the first
    torch.testing.assert_close(terms(x + 3, labels).kl, kl)  # logits are up to a constant
    assert terms(x[:1].expand(passes, -1, -1), labels).kl == 0  # exactly
    torch.testing.assert_close(regraft.rdrop_loss(x, labels, alpha=0), task)


def test_alpha_0_needs_no_second_pass_and_kl_does():
    x, labels = torch.randn(1, 4, 3), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(x[0], labels)
    torch.testing.assert_close(regraft.rdrop_loss(x, labels, alpha=0), expected)
    with pytest.raises(LossError, match="do not hold two passes"):
        regraft.rdrop_loss(x, labels)


@pytest.mark.parametrize("fill", [0.0, 1e30, math.inf, math.nan])
def test_ignored_positions_count_in_neither_term(fill):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 4)
    labels = torch.randint(0, 4, (2, 5))
    kept = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)
    expected = regraft.rdrop_loss(x[:, kept], labels[kept], 0.5)
    filled = torch.where(kept[None, :, :, None], x, fill).requires_grad_()
    loss = regraft.rdrop_loss(filled, labels.masked_fill(~kept, -100), 0.5)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert filled.grad[:, ~kept].abs().max() == 0
    assert filled.grad[:, kept].abs().min() > 0


def test_a_batch_without_labels_is_worth_0():
    x = torch.randn(2, 3, 4, requires_grad=True)
    loss = regraft.rdrop_loss(x, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert x.grad.abs().max() == 0


def test_shift_is_what_a_causal_model_computes():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[0, :2] = -100
    ce = [F.cross_entropy(one[:, :-1].reshape(-1, 9), labels[:, 1:].flatten()) for one in x]
    shifted = regraft.rdrop_loss(x, labels, 0, shift=True)
    torch.testing.assert_close(shifted, (ce[0] + ce[1]) / 2)
    kept = labels[:, 1:] != -100
    kl = terms(x, labels, shift=True).kl
    torch.testing.assert_close(kl, pairs_by_definition(x[:, :, :-1])[kept].mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_smoothing_and_class_weights_are_torchs(smoothing, weighted, soft):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (6,))
    if soft:
        labels = torch.rand(6, 4, dtype=torch.float64).softmax(-1)
    else:
        labels[2] = -100
    weight = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing}
    expected = sum(F.cross_entropy(one, labels, **options) for one in x) / 2
    loss = regraft.rdrop_loss(x, labels, 0, task="classification", **options)
    torch.testing.assert_close(loss, expected)


def test_num_items_in_batch_adds_up_over_an_accumulation():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 6, 5, 4), torch.randint(0, 4, (6, 5))
    labels[0] = -100
    labels[1, 2:] = -100
    items = (labels != -100).sum()
    whole = regraft.rdrop_loss(x, labels, 0.5)
    steps = [
        regraft.rdrop_loss(x[:, part], labels[part], 0.5, num_items_in_batch=items)
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(steps), whole)


def test_multi_label_is_bernoulli_kl_over_batch_and_labels():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 3)).double()
    p, q = x.sigmoid()
    total = 0.0
    for a, b in ((p, q), (q, p), (1 - p, 1 - q), (1 - q, 1 - p)):
        total = total + (a * (a / b).log()).sum()
    bce = sum(F.binary_cross_entropy_with_logits(one, labels) for one in x) / 2
    expected = bce + 0.6 * total / 2 / 15
    torch.testing.assert_close(regraft.rdrop_loss(x, labels, 0.6), expected)
    torch.testing.assert_close(regraft.rdrop_loss(x, labels.bool(), 0.6), expected)


def test_multi_label_entries_can_be_ignored():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 4, 3), torch.randint(0, 2, (4, 3)).float()
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    loss = regraft.rdrop_loss(x, labels.masked_fill(~kept, -100))
    flat = regraft.rdrop_loss(x[:, kept][:, None], labels[kept][None], task="multilabel")
    torch.testing.assert_close(loss, flat)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 1), (4,)), ((4,), (4,)), ((4, 1), (4, 1)), ((4,), (4, 1))]
)
def test_regression_never_broadcasts(outputs, targets):
    torch.manual_seed(0)
    x, y = torch.randn(3, *outputs, dtype=torch.float64), torch.randn(*targets, dtype=torch.float64)
    flat = x.reshape(3, 4)
    squares = [((flat[i] - flat[j]) ** 2).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    task = torch.stack([F.mse_loss(one, y.flatten()) for one in flat]).mean()
    torch.testing.assert_close(regraft.rdrop_loss(x, y, 0.5), task + 0.5 * sum(squares) / 3)


def test_regression_of_several_values_is_asked_for():
    x, y = torch.randn(2, 4, 3), torch.randn(4, 3)
    expected = F.mse_loss(x, y.expand_as(x)) + F.mse_loss(x[0], x[1])
    torch.testing.assert_close(regraft.rdrop_loss(x, y, task="regression"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    torch.manual_seed(0)
    x, labels = torch.randn(2, 8, 10).to(dtype), torch.randint(0, 10, (8,))
    loss = regraft.rdrop_loss(x, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, regraft.rdrop_loss(x.float(), labels), rtol=0, atol=0)


EXTREMES = [65504.0, -65504.0, 0.0, 60000.0]


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_half_precision_extremes_stay_finite(task):
    x = torch.tensor([[EXTREMES, EXTREMES[::-1]], [EXTREMES[::-1], EXTREMES]], dtype=torch.float16)
    x.requires_grad_()
    labels = torch.tensor([0, 1]) if task == "classification" else torch.zeros(2, 4)
    loss = regraft.rdrop_loss(x, labels, 0.1, task=task)
    loss.backward()
    assert loss.isfinite()
    # d(x - y)^2 at 131008 is beyond a half's range whoever computes it; the others are within.
    assert task == "regression" or x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_are_finite_and_count_nowhere(dtype, smoothing):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5).to(dtype)
    x[:, :, 3] = -math.inf
    x[0, :3, 4] = -math.inf  # masked in one pass only: the KL of the paper would be infinite
    x.requires_grad_()
    labels = torch.randint(0, 3, (6,))
    loss = regraft.rdrop_loss(x, labels, label_smoothing=smoothing)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad[:, :, 3].abs().max() == 0
    if not smoothing:
        without = x.detach()[:, 3:, [0, 1, 2, 4]]
        torch.testing.assert_close(
            regraft.rdrop_loss(x[:, 3:], labels[3:]), regraft.rdrop_loss(without, labels[3:])
        )


def test_masked_labels_of_multi_label_are_finite():
    x = torch.randn(2, 4, 3)
    x[:, :, 1] = -math.inf
    x.requires_grad_()
    loss = regraft.rdrop_loss(x, torch.zeros(4, 3))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("passes", [2, 3])
def test_gradients(task, passes):
    torch.manual_seed(0)
    x = torch.randn(passes, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 3]) if task == "classification" else torch.rand(3, 4).round().double()
    options = {"label_smoothing": 0.1} if task == "classification" else {}
    assert torch.autograd.gradcheck(lambda z: regraft.rdrop_loss(z, labels, 0.7, task=task, **options), x)


def test_reduction_none_is_the_loss_of_each_position():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 5, (3, 4))
    labels[1, 2] = -100
    each = regraft.rdrop_loss(x, labels, reduction="none")
    assert each.shape == (3, 4)
    assert each[1, 2] == 0
    torch.testing.assert_close(each.sum() / 11, regraft.rdrop_loss(x, labels))


def test_it_compiles_without_a_break():
    x, labels = torch.randn(2, 6, 4), torch.tensor([0, 1, 2, 3, -100, 0])
    compiled = torch.compile(regraft.rdrop_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels, 0.5), regraft.rdrop_loss(x, labels, 0.5))


def authors_kl(p, q):
    """`compute_kl_loss` of the authors' README, written out: summed over the batch."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    forwards = (log_q.exp() * (log_q - log_p)).sum()
    return (forwards + (log_p.exp() * (log_p - log_q)).sum()) / 2


ALPHAS = {
    # name: (the published loss, from the logits of both passes, the labels and its alpha;
    #        the same by us: the factor of the whole loss, and alpha for a batch of N)
    "paper, translation, summarization, language models, RoBERTa in fairseq": (
        lambda p, q, y, a: F.cross_entropy(p, y) + F.cross_entropy(q, y) + a * authors_kl(p, q) / len(y),
        lambda a, n: (2, a / 2),
    ),
    "authors' README, RoBERTa in transformers": (
        lambda p, q, y, a: 0.5 * (F.cross_entropy(p, y) + F.cross_entropy(q, y)) + a * authors_kl(p, q),
        lambda a, n: (1, a * n),
    ),
    "BERT in transformers": (
        lambda p, q, y, a: F.cross_entropy(p, y) + F.cross_entropy(q, y) + a * authors_kl(p, q),
        lambda a, n: (2, a * n / 2),
    ),
    "ViT": (
        lambda p, q, y, a: F.cross_entropy(p, y) + F.cross_entropy(q, y) + a * 2 * authors_kl(p, q),
        lambda a, n: (2, a * n),
    ),
}


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("alpha", [0.3, 5.0])
def test_the_table_that_translates_alpha(name, alpha):
    published, ours = ALPHAS[name]
    torch.manual_seed(0)
    x, labels = torch.randn(2, 6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    factor, translated = ours(alpha, 6)
    expected = published(x[0], x[1], labels, alpha)
    torch.testing.assert_close(factor * regraft.rdrop_loss(x, labels, translated), expected)
    if factor == 1:
        same = regraft.rdrop_loss(x, labels, alpha, reduction="sum")
        torch.testing.assert_close(same, expected)


def test_alpha_0_is_the_loss_of_plain_training():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    plain = F.cross_entropy(x[0], labels)
    torch.testing.assert_close(regraft.rdrop_loss(x[:1].expand(2, -1, -1), labels, 0), plain)
    torch.testing.assert_close(regraft.rdrop_loss(x[:1].expand(2, -1, -1), labels, 3.0), plain)


def test_soft_targets_are_classes():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    mixed = 0.3 * F.one_hot(torch.randint(0, 4, (6,)), 4) + 0.7 * F.one_hot(torch.randint(0, 4, (6,)), 4)
    mixed = mixed.double()
    mixed[0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    soft = sum(F.cross_entropy(one, mixed) for one in x) / 2
    torch.testing.assert_close(regraft.rdrop_loss(x, mixed, 0), soft)
    torch.testing.assert_close(regraft.rdrop_loss(x, mixed, 0, task="classification"), soft)


@pytest.mark.parametrize(
    "labels",
    [F.one_hot(torch.tensor([0, 1, 2]), 3).double(), torch.full((3, 3), 0.5).double()],
    ids=["one-hot", "neither"],
)
def test_what_soft_labels_mean_is_asked_for(labels):
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    with pytest.raises(LossError, match="task="):
        regraft.rdrop_loss(x, labels)
    values = {
        task: regraft.rdrop_loss(x, labels, task=task).item() for task in ("classification", "multilabel")
    }
    assert len(set(values.values())) == 2


def test_positions_without_a_label_can_count_in_the_kl():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([0, -100, 2, -100, -100, 1])
    kept = labels != -100
    ce = sum(F.cross_entropy(one[kept], labels[kept]) for one in x) / 2
    expected = ce + 0.7 * pairs_by_definition(x).mean()
    torch.testing.assert_close(regraft.rdrop_loss(x, labels, 0.7, consistency="all"), expected)
    nothing = torch.full((6,), -100)
    alone = regraft.rdrop_loss(x, nothing, 0.7, consistency="all")
    torch.testing.assert_close(alone, 0.7 * pairs_by_definition(x).mean())


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize(
    ("soft", "options"),
    [
        (False, {"shift": True}),
        *((soft, {}) for soft in (False, True)),
        *((soft, {"consistency": "all"}) for soft in (False, True)),
        *((soft, {"label_smoothing": 0.1}) for soft in (False, True)),
    ],
)
def test_chunks_change_nothing(monkeypatch, soft, passes, options):
    torch.manual_seed(0)
    x = torch.randn(passes, 3, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 5))
    labels[1, 2] = -100
    if soft:
        labels = torch.rand(3, 5, 7, dtype=torch.float64).softmax(-1)
    elif "shift" not in options:
        options = {**options, "weight": torch.rand(7, dtype=torch.float64)}
    slopes = []
    for size in (2**22, 30):
        monkeypatch.setattr("regraft.training.rdrop.rdrop_loss.CHUNK_ELEMENTS", size)
        y = x.clone().requires_grad_()
        loss = regraft.rdrop_loss(y, labels, 0.7, task="classification", **options)
        loss.backward()
        slopes.append((loss.detach(), y.grad))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-12)


def test_classes_on_another_axis():
    torch.manual_seed(0)
    x, labels = torch.randn(2, 3, 7, 5, 5), torch.randint(0, 7, (3, 5, 5))
    torch.testing.assert_close(
        regraft.rdrop_loss(x, labels, class_axis=1), regraft.rdrop_loss(x.movedim(2, -1), labels)
    )


X = torch.zeros(2, 4, 3)
INTS = torch.zeros(4, dtype=torch.long)
REFUSED = [
    (((X, X), INTS), {}, "tuple of 2, not one tensor"),
    ((X, INTS.tolist()), {}, "labels is a list, not a tensor"),
    ((X.long(), INTS), {}, "not floating point"),
    ((X[:1], INTS), {}, "do not hold two passes"),
    ((X[0, 0], INTS), {}, "do not hold two passes"),
    ((X, INTS[:3]), {}, r"labels of shape \(3,\) do not fit logits of shape \(2, 4, 3\)"),
    ((X, torch.zeros(4, 3, dtype=torch.long)), {}, "for several labels at once labels.float()"),
    ((X.view(2, 2, 2, 3).movedim(-1, 2), INTS.view(2, 2)), {}, "the classes are on axis 1: class_axis=1"),
    ((X, INTS + 3), {}, "labels from 3 to 3, for 3 classes"),
    ((X, INTS - 1), {}, "positions to ignore -100"),
    ((X[..., :1], INTS), {}, "there is one class"),
    ((X, torch.zeros(4)), {}, "class indices are integers"),
    ((X, torch.full((4, 3), 2.0)), {}, 'task="regression"'),
    ((X[..., :1], torch.zeros(4, 4)), {}, "a broadcast would compare every sample with every other"),
    ((X[0], X[1], INTS), {}, r"torch.stack\(\[first, second\]\)"),
    ((X, INTS), {"task": "multi_label"}, "did you mean 'multilabel'?"),
    ((X, INTS), {"ce": "summ"}, "did you mean 'sum'"),
    ((X, INTS), {"reduction": "mean"}, "did you mean 'batchmean'"),
    ((X, INTS), {"weight": torch.ones(2)}, "weight of shape"),
    ((X, INTS), {"shift": True}, "needs a time axis"),
    ((X, torch.zeros(4, 3)), {"label_smoothing": 0.1}, "label_smoothing is for classification"),
    ((X[..., 0], torch.zeros(4)), {"weight": torch.ones(4)}, "no meaning for regression"),
]


@pytest.mark.parametrize(("args", "options", "message"), REFUSED)
def test_what_fits_no_task_is_refused(args, options, message):
    with pytest.raises(LossError, match=message) as caught:
        regraft.rdrop_loss(*args, **options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "options", [{"alpha": -1}, {"alpha": math.nan}, {"alpha": "1"}, {"label_smoothing": 1.0}]
)
def test_numbers_outside_their_range(options):
    with pytest.raises(RateError):
        regraft.rdrop_loss(X, INTS, **options)

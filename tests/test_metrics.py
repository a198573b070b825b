"""Every metric against its definition, walked down a sorted list in fp64; ties, empty users and k beyond n_items."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import DEVICE, random_clicks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_evaluate import Scores, one_user, random_case, ranked

from fastvae import evaluate, metrics
from fastvae.clicks import Clicks
from fastvae.metrics import (
    coverage_at_k,
    hit_at_k,
    map_at_k,
    mrr_at_k,
    novelty_at_k,
    precision_at_k,
)

INF = float("inf")


def best_items(scores, k):
    """The k best items, best first: sorted by score, then by item; items of -inf are not ranked."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order if scores[i] > -INF][:k]


def slow(kind, scores, wanted, k, counts=None, n_train=None):
    """A metric of one user by its definition, in fractions where there are any."""
    k = min(k, len(scores))
    best = best_items(scores, k)
    if kind == "novelty":
        bits = [-math.log2(max(counts[i], 1) / n_train) for i in best]
        return sum(bits) / len(bits) if bits else 0.0
    if not wanted:
        return math.nan
    hits = [i in wanted for i in best]
    if kind == "precision":
        return float(Fraction(sum(hits), k))
    if kind == "hit":
        return float(any(hits))
    if kind == "mrr":
        return next((float(Fraction(1, r)) for r, hit in enumerate(hits, 1) if hit), 0.0)
    if kind == "map":
        gains = [Fraction(sum(hits[:r]), r) for r in range(1, len(hits) + 1) if hits[r - 1]]
        return float(sum(gains, Fraction(0)) / min(k, len(wanted)))
    if kind == "recall":
        return float(Fraction(sum(hits), min(k, len(wanted))))
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(wanted)) + 1))
    return sum(1 / math.log2(r + 1) for r, hit in enumerate(hits, 1) if hit) / ideal


BY_HAND = [
    # held out: 0, 1, 2 of five items
    pytest.param("precision", (0, 3, 1, 4, 2), 3, 2 / 3, id="precision"),
    pytest.param("precision", (3, 4, 0, 1, 2), 2, 0.0, id="precision-no-hit"),
    pytest.param("precision", (0, 1, 2, 3, 4), 99, 3 / 5, id="precision-beyond-the-items"),
    pytest.param("map", (0, 3, 1, 4, 2), 3, (1 + 2 / 3) / 3, id="map-hits-at-1-and-3"),
    pytest.param("map", (0, 3, 1, 4, 2), 5, (1 + 2 / 3 + 3 / 5) / 3, id="map-of-all"),
    pytest.param("map", (0, 1, 3, 4, 2), 2, 1.0, id="map-is-cut-at-k"),
    pytest.param("mrr", (3, 4, 0, 1, 2), 5, 1 / 3, id="mrr-first-of-three"),
    pytest.param("mrr", (3, 4, 0, 1, 2), 2, 0.0, id="mrr-beyond-k"),
    pytest.param("hit", (3, 0, 4, 1, 2), 2, 1.0, id="hit"),
    pytest.param("hit", (3, 0, 4, 1, 2), 1, 0.0, id="no-hit"),
]


@pytest.mark.parametrize(("kind", "order", "k", "expected"), BY_HAND)
def test_by_hand(kind, order, k, expected):
    metric = getattr(metrics, f"{kind}_at_k")
    value = metric(ranked(*order), one_user(0, 1, 2, n_items=5), k)
    assert value.dtype == torch.float64 and value.item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("kind", metrics.HELD_OUT)
def test_ties_go_to_the_lower_item(kind):
    metric = getattr(metrics, f"{kind}_at_k")
    assert metric(torch.zeros(1, 4), one_user(0, n_items=4), 1).item() == 1.0
    assert metric(torch.zeros(1, 4), one_user(3, n_items=4), 1).item() == 0.0


@pytest.mark.parametrize("kind", metrics.HELD_OUT)
def test_users_without_held_out_items_and_without_ranked_items(kind):
    metric = getattr(metrics, f"{kind}_at_k")
    held_out = Clicks([0, 1, 1, 2], [1, 1], n_items=2)
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [-INF, -INF]])
    first, nothing_held_out, nothing_ranked = metric(scores, held_out, 1).tolist()
    assert (first, nothing_ranked) == (1.0, 0.0) and math.isnan(nothing_held_out)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 90)),
        elements=st.one_of(st.integers(-2, 2).map(float), st.just(-INF)),
    ),
    st.integers(1, 100),
    st.data(),
)
def test_metrics_equal_their_definitions(scores, k, data):
    dense = data.draw(hnp.arrays(np.bool_, scores.shape))
    held_out = Clicks.from_matrix(dense).to(DEVICE)
    train = data.draw(hnp.arrays(np.bool_, (6, scores.shape[1])))
    on_device = torch.from_numpy(scores).to(DEVICE)
    found = {
        kind: getattr(metrics, f"{kind}_at_k")(on_device, held_out, k).tolist()
        for kind in metrics.HELD_OUT
    }
    found["novelty"] = novelty_at_k(on_device, Clicks.from_matrix(train), k).tolist()
    for kind, values in found.items():
        for u, value in enumerate(values):
            wanted = set(np.flatnonzero(dense[u]))
            expected = slow(kind, scores[u].tolist(), wanted, k, train.sum(0), 6)
            assert value == pytest.approx(expected, abs=1e-9, nan_ok=True), (kind, u)
    covered = {i for row in scores.tolist() for i in best_items(row, k)}
    assert coverage_at_k(on_device, k) == pytest.approx(len(covered) / scores.shape[1])


def test_evaluate_gives_every_metric_of_every_user():
    model, fold_in, held_out = random_case()
    n_items = fold_in.shape[1]
    train = random_clicks([40] * 30, n_items, seed=3)
    names = [f"{kind}@{k}" for k in (3, 20, 10**6) for kind in metrics.KINDS]
    x, y = Clicks.from_matrix(fold_in).to(DEVICE), Clicks.from_matrix(held_out).to(DEVICE)
    result = evaluate(model, x, y, names, block_size=17, train=train)
    assert result == evaluate(model, x, y, names, train=train.to(DEVICE))
    users = [u for u in range(len(fold_in)) if fold_in[u].any() and held_out[u].any()]
    assert result.users.tolist() == users
    scores, counts = model.scores.cpu().numpy().copy(), train.to_dense().sum(0).tolist()
    scores[fold_in] = -INF
    for name in names:
        kind, k = name.split("@")
        if kind == "coverage":
            covered = {i for u in users for i in best_items(scores[u].tolist(), int(k))}
            assert result[name] == pytest.approx(len(covered) / n_items)
            assert name not in result.stderr and name not in result.values
            continue
        values = [
            slow(kind, scores[u].tolist(), set(np.flatnonzero(held_out[u])), int(k), counts, 30)
            for u in users
        ]
        assert result.values[name] == pytest.approx(np.array(values), abs=1e-9), name
        assert result[name] == pytest.approx(np.mean(values), abs=1e-9)
        assert result.stderr[name] == pytest.approx(np.std(values) / len(users) ** 0.5, abs=1e-9)
    assert list(result.mean) == names and "coverage@3_stderr" not in result.to_dict()
    assert str(result).count("±") == len(names) - 3


def test_each_of_several_k_is_cut_by_itself():
    """Lists are made for the largest k; the values of a smaller one must not see beyond it."""
    model, fold_in, held_out = random_case(n_users=20)
    train = random_clicks([40] * 5, fold_in.shape[1])
    alone = {
        f"{kind}@{k}": evaluate(model, fold_in, held_out, f"{kind}@{k}", train=train)
        for kind in metrics.KINDS
        for k in (1, 7)
    }
    together = evaluate(model, fold_in, held_out, [*alone, "ndcg@50"], train=train)
    assert {name: result[name] for name, result in alone.items()} == {
        name: together[name] for name in alone
    }


def test_novelty_of_items_that_few_clicked():
    train = Clicks.from_pairs([0, 1, 2, 3, 0, 1, 0], [0, 0, 0, 0, 1, 1, 2], n_items=4)
    # shares 1, 1/2, 1/4, and an item that nobody clicked counts as clicked once
    for item, bits in enumerate((0.0, 1.0, 2.0, 2.0)):
        assert novelty_at_k(ranked(item, n_items=4), train, 1).item() == pytest.approx(bits)
    counted = Clicks.from_pairs([0, 0], [0, 1], n_items=4)
    twice = Clicks(counted.indptr, counted.indices, [9.0, 3.0], 4)
    assert novelty_at_k(ranked(1, n_items=4), twice, 1) == 0.0


def test_what_novelty_and_coverage_refuse():
    three = one_user(0, n_items=3)
    with pytest.raises(ValueError) as raised:
        evaluate(Scores(torch.zeros(1, 3)), three, three, ["hit@1", "novelty@2"])
    assert str(raised.value) == (
        "evaluate: train must be the training clicks for novelty@2, got None"
    )
    with pytest.raises(ValueError, match=r"^evaluate: train must have the model's 3 items, got 4$"):
        evaluate(Scores(torch.zeros(1, 3)), three, three, "hit@1", train=one_user(0, n_items=4))
    with pytest.raises(TypeError, match=r"^novelty_at_k: train must be Clicks, got Tensor"):
        novelty_at_k(torch.zeros(1, 3), torch.zeros(1, 3), 1)
    with pytest.raises(ValueError) as raised:
        coverage_at_k(torch.zeros(3), 1)
    assert str(raised.value) == "coverage_at_k: scores must have shape [n_users, n_items], got [3]"
    with pytest.raises(ValueError, match=r"^coverage_at_k: scores must be finite, or -inf"):
        coverage_at_k(torch.full((1, 3), math.nan), 1)


@pytest.mark.parametrize("metric", [precision_at_k, map_at_k, mrr_at_k, hit_at_k])
def test_the_arguments_are_those_of_ndcg(metric):
    scores, held_out = torch.zeros(1, 3), one_user(0, n_items=3)
    assert metric(scores, held_out, 10**30) == metric(scores, held_out, 3)
    for k, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=rf"^{metric.__name__}: k must"):
            metric(scores, held_out, k)
    with pytest.raises(ValueError, match=rf"^{metric.__name__}: scores must have shape \[1, 3\]"):
        metric(torch.zeros(2, 3), held_out, 1)

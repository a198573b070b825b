"""Two evaluations side by side: intervals and p-values against plain numpy, and what does not fit."""

import json

import numpy as np
import pytest
from test_evaluate import random_case

from fastvae import Clicks, evaluate
from fastvae.baselines import Popularity
from fastvae.compare import compare
from fastvae.evaluate import Evaluation


def of_users(values, name="ndcg@10", users=None):
    values = np.asarray(values, float)
    users = np.arange(len(values)) if users is None else np.asarray(users)
    return Evaluation(
        {name: values.mean()}, {name: 0.0}, len(values), 0, users=users, values={name: values}
    )


def test_intervals_are_the_percentiles_of_resampled_means():
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = np.clip(a + rng.normal(0.02, 0.1, 300), 0, 1)
    found = compare(of_users(a), of_users(b), n_samples=4000, seed=3)["ndcg@10"]
    draws = rng.integers(0, 300, (4000, 300))
    for values, mean, interval in (
        (a, found.a, found.a_interval),
        (b, found.b, found.b_interval),
        (b - a, found.difference, found.difference_interval),
    ):
        assert mean == pytest.approx(values.mean())
        # two times 4,000 draws: their percentiles differ by chance, by a few percent of the spread
        assert interval == pytest.approx(
            np.quantile(values[draws].mean(1), [0.025, 0.975]), abs=0.1 * values.std() / 300**0.5
        )
    difference = b - a
    t = difference.mean() / (difference.std(ddof=1) / 300**0.5)
    # Student's density, summed up beyond t
    x = np.linspace(0, 50, 500_001)
    density = (1 + x**2 / 299) ** -150
    assert found.p_value == pytest.approx(density[x >= abs(t)].sum() / density.sum(), rel=1e-3)
    assert found.n_users == 300


def test_pairing_counts():
    """A small gain of every user is seen, though the users differ far more among each other."""
    rng = np.random.default_rng(1)
    a = rng.random(200)
    b = a + 0.01 * rng.random(200)
    found = compare(of_users(a), of_users(b))["ndcg@10"]
    assert found.p_value < 1e-9 and found.difference_interval[0] > 0
    assert found.a_interval[1] > found.b_interval[0]
    shuffled = compare(of_users(a), of_users(rng.permutation(b)))["ndcg@10"]
    assert shuffled.p_value > 1e-3 and shuffled.difference == pytest.approx(found.difference)


def test_the_seed_decides_and_the_confidence_widens():
    values = np.random.default_rng(2).random((2, 50))
    a, b = map(of_users, values)
    assert compare(a, b, seed=1) == compare(a, b, seed=1) != compare(a, b, seed=2)
    narrow, wide = (compare(a, b, confidence=c)["ndcg@10"].a_interval for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    reversed_ = compare(b, a)["ndcg@10"]
    assert reversed_.difference == -compare(a, b)["ndcg@10"].difference


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        pytest.param([0.5, 0.2], [0.5, 0.2], 1.0, id="the-same"),
        pytest.param([0.5, 0.25], [0.75, 0.5], 0.0, id="all-better-by-as-much"),
        pytest.param([0.5], [0.5], 1.0, id="one-user"),
    ],
)
def test_differences_without_spread(a, b, p, recwarn):
    found = compare(of_users(a), of_users(b))["ndcg@10"]
    assert found.p_value == p and found.difference_interval == (found.difference,) * 2
    json.dumps(found.to_dict(), allow_nan=False)
    assert not recwarn.list


def test_of_models_and_without_coverage():
    model, fold_in, held_out = random_case()
    names = ["ndcg@10", "coverage@10", "hit@3"]
    a = evaluate(model, fold_in, held_out, names)
    model.scores.copy_(model.scores.roll(1, 1))
    b = evaluate(model, fold_in, held_out, [*names, "mrr@3"])
    found = compare(a, b)
    assert list(found) == ["ndcg@10", "hit@3"]
    assert found["hit@3"].a == a["hit@3"] and found["hit@3"].b == b["hit@3"]
    assert found["hit@3"].n_users == a.n_evaluated
    only = evaluate(model, fold_in, held_out, ["coverage@10"])
    with pytest.raises(ValueError) as raised:
        compare(a, only)
    assert str(raised.value) == (
        "compare: a and b must have a metric with a value for each user, got coverage@10, of all users together"
    )


def test_the_same_number_of_users_of_another_split_are_no_pairs():
    _, fold_in, held_out = random_case()
    model = Popularity(Clicks.from_matrix(held_out))
    again = evaluate(model, fold_in, held_out)
    assert compare(evaluate(model, fold_in, held_out), again)["ndcg@100"].difference == 0
    swapped = [1, 0, *range(2, len(fold_in))]
    for other in (
        (fold_in[swapped], held_out[swapped]),
        (held_out, fold_in),
    ):
        with pytest.raises(ValueError) as raised:
            compare(again, evaluate(model, *other))
        assert str(raised.value) == (
            "compare: b must be of the fold_in and held_out of a, got others; users of another split are no pairs"
        )


def test_what_cannot_be_compared():
    a = of_users([0.5, 0.25])
    cases = [
        (of_users([0.5, 0.25, 0.1]), "b must be of the 2 users of a, got 3 others"),
        (of_users([0.5, 0.25], users=[0, 2]), "b must be of the 2 users of a, got 2 others"),
        (
            of_users([0.5, 0.25], "hit@1"),
            "a and b must have a metric in common, got ndcg@10 and hit@1",
        ),
        (Evaluation({"ndcg@10": 0.4}, {}, 2, 0), "b must hold the values of users, got none"),
    ]
    for b, message in cases:
        with pytest.raises(ValueError) as raised:
            compare(a, b)
        assert str(raised.value).startswith(f"compare: {message}")
    with pytest.raises(TypeError, match=r"^compare: a must be an Evaluation, got float$"):
        compare(0.5, a)
    for options, message in (
        ({"confidence": 1.0}, "confidence must lie in (0, 1), got 1.0"),
        ({"confidence": 0}, "confidence must"),
        ({"n_samples": 99}, "n_samples must be at least 100, got 99"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError) as raised:
            compare(a, a, **options)
        assert str(raised.value).startswith(f"compare: {message}")

"""NDCG@k and Recall@k: numbers worked out by hand, then a slow implementation on random cases."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import DEVICE, random_clicks, run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fastvae.clicks import Clicks
from fastvae.evaluate import Evaluation, Popularity, evaluate, ndcg_at_k, recall_at_k
from fastvae.models import MultiDAE, MultiVAE
from fastvae.recommend import recommend

INF = float("inf")


class Scores(nn.Module):
    """Looks up each user's scores by the first fold-in item, which here is the user's number."""

    def __init__(self, scores):
        super().__init__()
        self.register_buffer("scores", torch.as_tensor(scores, dtype=torch.float32))
        self.n_items = self.scores.shape[1]

    def forward(self, clicks):
        return self.scores[clicks.to_dense().argmax(1)]


def ranked(*items, n_items=None):
    """Scores of one user that rank the given items first, in this order, then the rest."""
    n_items = n_items or max(items) + 1
    order = [*items, *(i for i in range(n_items) if i not in items)]
    scores = torch.empty(1, n_items)
    scores[0, order] = -torch.arange(n_items, dtype=torch.float32)
    return scores


def one_user(*items, n_items):
    return Clicks([0, len(items)], sorted(items), n_items=n_items)


def slow_metrics(scores, held_out, k):
    """(ndcg, recall) of one user by the definition: sort all items, walk down the list."""
    order = [
        i for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)) if scores[i] > -INF
    ]
    if len(held_out) == 0:
        return math.nan, math.nan
    dcg = sum(1 / math.log2(rank + 1) for rank, i in enumerate(order[:k], 1) if i in held_out)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(held_out)) + 1))
    hits = len(set(order[:k]) & set(held_out))
    return dcg / ideal, hits / min(k, len(held_out))


# by hand


@pytest.mark.parametrize(
    ("order", "k", "expected"),
    [
        pytest.param((0, 3, 4, 1, 2), 3, 0.469279, id="hit-at-1"),
        pytest.param((0, 3, 1, 4, 2), 3, 0.703918, id="hits-at-1-and-3"),
        pytest.param((0, 1, 3, 4, 2), 2, 1.0, id="ideal-is-cut-at-k"),
    ],
)
def test_ideal_of_three_relevant_items(order, k, expected):
    ndcg = ndcg_at_k(ranked(*order), one_user(0, 1, 2, n_items=5), k)
    assert ndcg.item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (2, 0.630930), (3, 0.5)])
def test_discount_of_a_single_relevant_item(rank, expected):
    order = [1, 2, 3]
    order.insert(rank - 1, 0)
    held_out = one_user(0, n_items=4)
    assert ndcg_at_k(ranked(*order), held_out, 3).item() == pytest.approx(expected, abs=5e-7)
    assert recall_at_k(ranked(*order), held_out, 3).item() == 1.0
    assert recall_at_k(ranked(*order), held_out, rank).item() == 1.0
    if rank > 1:
        assert recall_at_k(ranked(*order), held_out, rank - 1).item() == 0.0


def test_recall_divides_by_what_k_items_can_reach():
    held_out = one_user(*range(30), n_items=40)
    assert recall_at_k(ranked(*range(40)), held_out, 20).item() == 1.0
    assert recall_at_k(ranked(*range(40)), held_out, 40).item() == 1.0
    assert recall_at_k(ranked(*range(30, 40), *range(30)), held_out, 20).item() == 0.5


def test_k_above_the_number_of_items():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    held_out = random_clicks([1, 7, 50, 20], 50)
    for metric in (ndcg_at_k, recall_at_k):
        at = {k: metric(scores, held_out, k) for k in (49, 50, 51, 100)}
        assert torch.equal(at[50], at[51]) and torch.equal(at[50], at[100])
        assert not at[49].isnan().any()
    assert recall_at_k(scores, held_out, 50).tolist() == [1.0] * 4


def test_fold_in_items_neither_hit_nor_hold_a_rank():
    scores, held_out = torch.tensor([[9.0, 8.0, 1.0, 0.0]]), one_user(2, n_items=4)
    assert recall_at_k(scores, held_out, 1).item() == 0.0
    scores[0, :2] = -INF
    assert recall_at_k(scores, held_out, 1).item() == 1.0
    result = evaluate(Popularity(random_clicks([2, 3], 4)), one_user(0, 1, n_items=4), held_out)
    assert result.n_evaluated == 1
    # all of -inf: no item is ranked, so none is hit
    assert ndcg_at_k(torch.full((1, 4), -INF), held_out, 4).item() == 0.0
    assert recall_at_k(torch.full((1, 4), -INF), held_out, 4).item() == 0.0


def test_evaluate_excludes_fold_in_items():
    # the model ranks the fold-in items 0, 1 first
    model = Scores([[9.0, 8.0, 7.0, 6.0]])
    fold_in, held_out = one_user(0, 1, n_items=4), one_user(2, n_items=4)
    assert evaluate(model, fold_in, held_out, ["recall@1"])["recall@1"] == 1.0


def test_ties_go_to_the_lower_item():
    scores = torch.zeros(1, 4)
    assert ndcg_at_k(scores, one_user(0, n_items=4), 1).item() == 1.0
    assert ndcg_at_k(scores, one_user(3, n_items=4), 1).item() == 0.0
    assert ndcg_at_k(scores, one_user(3, n_items=4), 4).item() == pytest.approx(1 / math.log2(5))


def test_a_user_without_held_out_items_is_nan():
    held_out = Clicks([0, 1, 1], [1], n_items=2)
    for metric in (ndcg_at_k, recall_at_k):
        values = metric(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), held_out, 1)
        assert values[0] == 1.0 and values[1].isnan()
        assert values.dtype == torch.float64


def test_values_of_held_out_clicks_do_not_matter():
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    counted = Clicks([0, 2], [0, 2], [5.0, 2.0], n_items=3)
    assert torch.equal(ndcg_at_k(scores, counted, 2), ndcg_at_k(scores, counted.binary(), 2))


def test_any_container_and_float_type():
    scores, dense = torch.tensor([[3.0, 2.0, 1.0]]), np.array([[0, 1, 0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert ndcg_at_k(scores.to(dtype), dense, 2).item() == pytest.approx(0.630930, abs=5e-7)


# against a slow implementation


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 120)),
        elements=st.one_of(
            st.integers(-2, 2).map(float), st.just(-INF), st.floats(-5, 5, width=32)
        ),
    ),
    st.integers(1, 130),
    st.data(),
)
def test_metrics_equal_a_slow_implementation(scores, k, data):
    dense = data.draw(hnp.arrays(np.bool_, scores.shape))
    held_out = Clicks.from_matrix(dense).to(DEVICE)
    ndcg, recall = (
        metric(torch.from_numpy(scores).to(DEVICE), held_out, k).tolist()
        for metric in (ndcg_at_k, recall_at_k)
    )
    for u in range(len(scores)):
        expected = slow_metrics(scores[u].tolist(), np.flatnonzero(dense[u]).tolist(), k)
        assert (ndcg[u], recall[u]) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def random_case(n_users=60, n_items=500):
    """A model with scores of its own for each user, fold-in and held-out clicks; some rows empty."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n_users, n_items, generator=generator).mul(4).round() / 4  # with ties
    rng = np.random.default_rng(0)
    fold_in, held_out = np.zeros((2, n_users, n_items), bool)
    for u in range(n_users):
        items = rng.choice(np.arange(n_users, n_items), u % 7 + u % 5 + 1, replace=False)
        fold_in[u, u] = True  # lets the model know the user
        fold_in[u, items[: u % 7]], held_out[u, items[u % 7 :]] = True, True
    fold_in[5], held_out[6] = False, False
    return Scores(scores).to(DEVICE), fold_in, held_out


def test_evaluate_equals_a_slow_implementation():
    model, fold_in, held_out = random_case()
    x, y = Clicks.from_matrix(fold_in).to(DEVICE), Clicks.from_matrix(held_out).to(DEVICE)
    result = evaluate(model, x, y, ["ndcg@100", "ndcg@3", "recall@20"], block_size=17)
    users = [u for u in range(len(fold_in)) if fold_in[u].any() and held_out[u].any()]
    scores = model.scores.cpu().numpy().copy()
    scores[fold_in] = -INF
    for name in result.mean:
        kind, k = name.split("@")
        values = [
            slow_metrics(scores[u].tolist(), np.flatnonzero(held_out[u]), int(k))[kind == "recall"]
            for u in users
        ]
        assert result[name] == pytest.approx(np.mean(values), abs=1e-9)
        assert result.stderr[name] == pytest.approx(np.std(values) / len(users) ** 0.5, abs=1e-9)
    assert (result.n_evaluated, result.n_skipped) == (len(users), len(fold_in) - len(users))


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 59, 10_000])
def test_the_block_size_changes_no_bit(block_size):
    model, fold_in, held_out = random_case()
    x, y = Clicks.from_matrix(fold_in).to(DEVICE), Clicks.from_matrix(held_out).to(DEVICE)
    assert evaluate(model, x, y, block_size=block_size) == evaluate(model, x, y)


# users that cannot be evaluated


def test_users_without_held_out_items_are_skipped_and_counted():
    # a perfect scorer of the first user
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(
            Scores([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]]),
            Clicks([0, 1, 2], [0, 0], n_items=3),
            Clicks([0, 1, 1], [1], n_items=3),
        )
    assert result == Evaluation(
        mean={"ndcg@100": 1.0, "recall@20": 1.0, "recall@50": 1.0},
        stderr={"ndcg@100": 0.0, "recall@20": 0.0, "recall@50": 0.0},
        n_evaluated=1,
        n_skipped=1,
    )


def test_users_without_fold_in_items_are_skipped_and_counted():
    fold_in, held_out = Clicks([0, 0, 1], [0], n_items=3), Clicks([0, 1, 2], [1, 1], n_items=3)
    result = evaluate(Scores([[0.0, 5.0, 1.0]]), fold_in, held_out)
    assert (result.n_evaluated, result.n_skipped) == (1, 1)


@pytest.mark.parametrize("n_users", [0, 2])
def test_no_evaluable_users(n_users):
    empty = Clicks([0] * (n_users + 1), [], n_items=3)
    with pytest.raises(ValueError) as raised:
        evaluate(Scores(torch.zeros(1, 3)), empty, empty)
    assert str(raised.value) == (
        f"evaluate: no evaluable users among {n_users}: each has an empty row in fold_in or in held_out; "
        "hold out more clicks per user or more users"
    )


# the result


def test_the_result_is_plain_json():
    model, fold_in, held_out = random_case()
    result = evaluate(model, fold_in, held_out, ["ndcg@10", "recall@5"])
    read = json.loads(json.dumps(result.to_dict()))
    assert read == result.to_dict()
    assert list(read) == [
        "ndcg@10",
        "recall@5",
        "ndcg@10_stderr",
        "recall@5_stderr",
        "n_evaluated",
        "n_skipped",
    ]
    assert str(Evaluation({"ndcg@9": 0.25}, {"ndcg@9": 0.015}, 1200, 3)) == (
        "ndcg@9 0.2500 ± 0.0150 (1,200 users evaluated, 3 skipped)"
    )


def test_metric_names():
    model, fold_in, held_out = random_case()
    single = evaluate(model, fold_in, held_out, "ndcg@10")
    twice = evaluate(model, fold_in, held_out, ["ndcg@10", "ndcg@10"])
    assert single == twice and list(single.mean) == ["ndcg@10"]
    for name in ("auc@10", "ndcg@0", "ndcg@", "ndcg@1.5", "NDCG@10", "ndcg@-1", "ndcg"):
        with pytest.raises(ValueError) as raised:
            evaluate(model, fold_in, held_out, ["recall@5", name])
        assert str(raised.value) == (
            f"evaluate: metrics must be names like 'ndcg@100' or 'recall@20', got {name!r}; the kinds are ndcg, recall, "
            "precision, map, mrr, hit, novelty, coverage"
        )


def test_progress_counts_users():
    model, fold_in, held_out = random_case(n_users=20)
    done = []
    evaluate(model, fold_in, held_out, block_size=8, progress=done.append)
    assert done == [8, 16, 18]


def test_the_model_comes_back_as_it_was():
    model, fold_in, held_out = random_case()
    scores = model.scores.clone()
    model.train()
    evaluate(model, fold_in, held_out)
    assert model.training and torch.equal(model.scores, scores)


@pytest.mark.parametrize("model_class", [MultiVAE, MultiDAE])
def test_the_models_are_evaluated_at_their_mean_and_train_on(model_class):
    torch.manual_seed(0)
    model = model_class([16, 32, 300]).to(DEVICE).train()
    fold_in, held_out = (
        random_clicks([u % 6 for u in range(50)], 300),
        random_clicks([3] * 50, 300, 1),
    )
    result = evaluate(model, fold_in, held_out)
    assert (result.n_evaluated, result.n_skipped) == (41, 9)
    assert result == evaluate(model, fold_in, held_out, block_size=13)
    assert model.training
    model.loss(fold_in.to(DEVICE)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_popularity_ranks_by_the_number_of_users():
    train = Clicks([0, 1, 3, 5], [2, 0, 2, 1, 2], [9.0, 7.0, 1.0, 1.0, 1.0], n_items=4)
    model = Popularity(train)
    assert model.counts.tolist() == [1.0, 1.0, 3.0, 0.0]
    assert torch.equal(Popularity(train.rows([1])).counts, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    result = evaluate(
        model, one_user(2, n_items=4), one_user(1, n_items=4), ["ndcg@1", "ndcg@2", "recall@2"]
    )
    assert result.mean == pytest.approx(
        {"ndcg@1": 0.0, "ndcg@2": 0.630930, "recall@2": 1.0}, abs=5e-7
    )
    assert evaluate(model, one_user(2, n_items=4), one_user(1, n_items=4)).n_evaluated == 1


# errors


def test_sizes_that_do_not_fit():
    model = Scores(torch.zeros(1, 3))
    three, four = one_user(0, n_items=3), one_user(0, n_items=4)
    cases = [
        ((three, four), "held_out must have shape [1, 3] like fold_in, got [1, 4]"),
        ((three, three.rows([0, 0])), "held_out must have shape [1, 3] like fold_in, got [2, 3]"),
        ((four, four), "fold_in must have the model's 3 items, got 4"),
        ((three, three, []), "metrics must name at least one metric, got none"),
        ((three, three, "ndcg@1", 0), "block_size must be at least 1, got 0"),
        ((three, three, "ndcg@1", 2**31), "block_size must lie below 2**31, got 2147483648"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError) as raised:
            evaluate(model, *args)
        assert str(raised.value) == f"evaluate: {message}"


@pytest.mark.parametrize("bad", [math.nan, -math.nan, INF])
def test_scores_that_are_not_finite(bad):
    model, fold_in, held_out = random_case()
    model.scores[9, 400] = bad
    with pytest.raises(ValueError) as raised:
        evaluate(model, fold_in, held_out)
    assert str(raised.value) == (
        "evaluate: model must give finite scores, got nan or inf for 1 of 58 users, first for user 9; "
        "load a checkpoint from before the loss diverged"
    )


@pytest.mark.parametrize("metric", [ndcg_at_k, recall_at_k])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_the_metrics_rank_no_score_that_is_not_finite(metric, bad):
    scores = torch.tensor([[0.0, -INF, 1.0], [0.0, bad, 1.0]])
    with pytest.raises(ValueError) as raised:
        metric(scores, Clicks([0, 1, 2], [0, 0], n_items=3), 1)
    assert str(raised.value) == (
        f"{metric.__name__}: scores must be finite, or -inf for items to leave out, got nan or inf for 1 of 2 users, "
        "first for user 1"
    )


def test_held_out_clicks_of_the_fold_in_are_left_out():
    model, fold_in, held_out = random_case()
    both = held_out.copy()
    both[9, 9] = both[12, 12] = True  # seen; the other clicks are not
    with pytest.warns(UserWarning) as caught:
        result = evaluate(model, fold_in, both)
    assert str(caught[0].message) == (
        f"evaluate: held_out must hold no clicks of fold_in, got 2 of {both.sum():,} that it holds; they are left out, "
        "for the items of fold_in are not ranked"
    )
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result == evaluate(model, fold_in, held_out)


def test_a_perfect_scorer_is_perfect_whatever_the_overlap():
    fold_in, held_out = (
        Clicks([0, 1, 2], [0, 0], n_items=4),
        Clicks([0, 2, 3], [0, 2, 0], n_items=4),
    )
    with pytest.warns(UserWarning, match="got 2 of 3 that it holds"):
        result = evaluate(Scores([[0.0, 1.0, 5.0, 1.0]]), fold_in, held_out)
    # the second user has nothing left to predict
    assert (result["recall@20"], result.n_evaluated, result.n_skipped) == (1.0, 1, 1)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no evaluable users among 2"):
        evaluate(Scores([[0.0, 1.0, 5.0, 1.0]]), fold_in, fold_in)


def test_a_model_that_is_none_is_named():
    three = one_user(0, n_items=3)
    for model, got in ((3, "int"), (nn.Linear(3, 3), "Linear")):
        with pytest.raises(TypeError) as raised:
            evaluate(model, three, three)
        assert str(raised.value) == (
            f"evaluate: model must be a MultiVAE, a MultiDAE, or another torch module with n_items, got {got}"
        )


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = MultiVAE([2, 3])
    three = one_user(0, n_items=3)
    with pytest.raises(ValueError) as raised:
        evaluate(model, three, one_user(1, n_items=3))
    assert str(raised.value) == (
        "evaluate: model must have weights in memory, got the device meta; load weights into it"
    )
    with pytest.raises(ValueError, match=r"^recommend: model must have weights in memory"):
        recommend(model, three)


def test_arguments_of_the_metrics():
    scores, held_out = torch.zeros(1, 3), one_user(0, n_items=3)
    with pytest.raises(ValueError) as raised:
        ndcg_at_k(torch.zeros(2, 3), held_out, 1)
    assert str(raised.value) == "ndcg_at_k: scores must have shape [1, 3] like held_out, got [2, 3]"
    for k in (0, -1):
        with pytest.raises(ValueError) as raised:
            recall_at_k(scores, held_out, k)
        assert str(raised.value) == f"recall_at_k: k must be at least 1, got {k}"
    for k in (1.0, True):
        with pytest.raises(TypeError) as raised:
            recall_at_k(scores, held_out, k)
        assert str(raised.value) == f"recall_at_k: k must be a whole number, got {k}"
    with pytest.raises(TypeError) as raised:
        evaluate(Scores(scores), held_out, held_out, block_size=2.5)
    assert str(raised.value) == "evaluate: block_size must be a whole number, got 2.5"
    with pytest.raises(TypeError, match=r"^Popularity: train must be Clicks, got Tensor; pass"):
        Popularity(scores)
    assert ndcg_at_k(scores, held_out, 10**30) == ndcg_at_k(scores, held_out, 3)
    for metrics in (None, [10], 10):
        with pytest.raises(
            TypeError, match=r"^evaluate: metrics must be names such as 'ndcg@100', got"
        ):
            evaluate(Scores(scores), held_out, held_out, metrics=metrics)
    with pytest.raises(TypeError, match=r"^ndcg_at_k: scores must be a float tensor, got int64$"):
        ndcg_at_k(scores.long(), held_out, 1)
    with pytest.raises(TypeError, match=r"^ndcg_at_k: scores must be a float tensor, got ndarray$"):
        ndcg_at_k(scores.numpy(), held_out, 1)


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_blocks():
    # dense scores of all users would be 916 MiB; 20,000 users are allowed 1.6 GB
    run = run_child("evaluate_memory.py")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 700, f"{run.stdout} MiB"

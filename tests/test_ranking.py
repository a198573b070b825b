"""Ranking: the order of top_k is exact, and a block has as many users as fit."""

import math

import numpy as np
import pytest
import torch
from helpers import DEVICE, Fixed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvae.clicks import Clicks
from fastvae.ranking import GROUP, MIN_ROWS, BlockScorer, top_k

INF = float("inf")


def slow_top_k(scores, k):
    """By definition: sort items by falling score, then by index; drop those of score -inf."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in ranked if scores[i] > -INF][:k]


# top_k

SCORES = st.one_of(
    st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0**-149, -(2.0**-149), 2.0**127, INF]),
    st.floats(width=32, allow_nan=False),
)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 150)), elements=SCORES),
    st.integers(1, 5),
)
def test_top_k_equals_sorting_by_score_then_index(scores, k):
    values, items = top_k(torch.from_numpy(scores).to(DEVICE), k)
    assert items.shape == values.shape == (len(scores), min(k, scores.shape[1]))
    for u, row in enumerate(scores.tolist()):
        expected = slow_top_k(row, k)
        padding = items.shape[1] - len(expected)
        assert items[u].tolist() == expected + [-1] * padding
        assert values[u].tolist() == [row[i] for i in expected] + [-INF] * padding


@pytest.mark.parametrize("k", [1, 2, 50, 200])
@pytest.mark.parametrize(
    "n_items",
    [
        pytest.param(1, id="smallest"),
        pytest.param(GROUP * 210, id="groups"),
        pytest.param(GROUP * 210 - 1, id="one-short-of-a-group"),
        pytest.param(GROUP * 210 + 7, id="groups-and-a-tail"),
    ],
)
def test_top_k_with_many_ties(n_items, k):
    scores = torch.randint(-3, 3, (4, n_items), generator=torch.Generator().manual_seed(n_items))
    _, items = top_k(scores.float().to(DEVICE), k)
    for row, found in zip(scores.tolist(), items.tolist(), strict=True):
        assert found == slow_top_k(row, k)


def test_equal_scores_come_in_item_order():
    _, items = top_k(torch.zeros(2, 10_000, device=DEVICE), 5)
    assert items.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("nan", [math.nan, -math.nan, INF - INF])
@pytest.mark.parametrize("n_items", [4, 5000])
def test_a_nan_of_either_sign_ranks_first_and_stays_nan(nan, n_items):
    scores = -torch.arange(n_items, dtype=torch.float32, device=DEVICE)[None]
    scores[0, 1], scores[0, -2] = INF, nan
    values, items = top_k(scores, 3)
    assert items.tolist() == [[n_items - 2, 1, 0]]
    assert math.isnan(values[0, 0]) and values[0, 1:].tolist() == [INF, 0.0]


def test_top_k_without_users_or_items():
    assert top_k(torch.zeros(0, 3), 2)[1].shape == (0, 2)
    assert top_k(torch.zeros(2, 0), 2)[1].shape == (2, 0)


@pytest.mark.parametrize(
    ("n_items", "n_users", "rows"),
    [
        pytest.param(31_990, 100, 58, id="2**24 // (8 * 32_000 + 24 * (1000 + 320) + 64 * 10)"),
        pytest.param(60, 7000, 6241, id="2**24 // (8 * 64 + 24 * 64 + 64 * 10)"),
        pytest.param(2**17, 100, MIN_ROWS, id="at-least-MIN_ROWS"),
        pytest.param(60, 5, 5, id="fewer-users"),
        pytest.param(60, 0, 1, id="no-users"),
    ],
)
def test_a_block_has_as_many_rows_as_fit(monkeypatch, n_items, n_users, rows):
    monkeypatch.setattr("fastvae.ranking.BLOCK_BYTES", 2**24)
    scorer = BlockScorer(Fixed(), Clicks([0] * (n_users + 1), [], n_items=n_items), 10, None)
    assert scorer.block_size == rows
    assert scorer.buffer.shape == (rows, -(-n_items // GROUP) * GROUP)

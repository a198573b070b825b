"""The baselines against their definitions in fp64, and that evaluate takes them as any model."""

import numpy as np
import pytest
import torch
from helpers import random_clicks

from fastvae import Clicks, baselines, evaluate
from fastvae.baselines import EASE, ItemKNN, Popularity, ease_fits


def slow_knn(train, n_neighbours):
    """[n_items, n_items]: the cosine of j in row i where j is among the nearest of i, else 0; by loops."""
    n_items = train.shape[1]
    similar = np.zeros((n_items, n_items))
    for i in range(n_items):
        cosine = np.zeros(n_items)
        for j in range(n_items):
            both = (train[:, i] & train[:, j]).sum()
            if i != j and both:
                cosine[j] = both / np.sqrt(train[:, i].sum() * train[:, j].sum())
        for j in sorted(range(n_items), key=lambda j: (-cosine[j], j))[:n_neighbours]:
            similar[i, j] = cosine[j]
    return similar


@pytest.fixture(scope="module")
def train():
    # few users: many equal similarities
    return random_clicks([0, 1, 5, 9, 3, 7, 2], 23, seed=2)


@pytest.mark.parametrize("n_neighbours", [1, 3, 50])
@pytest.mark.parametrize("block_bytes", [1, 2**26], ids=["an-item-a-block", "one-block"])
def test_item_knn_is_its_definition(train, n_neighbours, block_bytes, monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK_BYTES", block_bytes)
    model = ItemKNN(train, n_neighbours)
    expected = slow_knn(train.to_dense().numpy() > 0, n_neighbours)
    np.testing.assert_allclose(model.similar.toarray(), expected, rtol=1e-6)
    users = random_clicks([0, 4, 1], 23, seed=5)
    np.testing.assert_allclose(
        model(users), users.to_dense().double().numpy() @ expected, rtol=1e-5
    )
    assert model(users).dtype == torch.float32


@pytest.mark.parametrize("reg", [0.5, 20.0])
def test_ease_is_the_best_linear_model_with_a_zero_diagonal(train, reg):
    """Where B is best, the gradient of |X - X B|^2 + reg |B|^2 is 0 off the diagonal: no use of the closed form."""
    weight, x = EASE(train, reg).weight.double().numpy(), train.to_dense().double().numpy()
    assert (np.diag(weight) == 0).all()
    gradient = x.T @ (x @ weight - x) + reg * weight
    np.fill_diagonal(gradient, 0)
    scale = np.abs(x.T @ x).max()
    assert np.abs(gradient).max() < 1e-5 * scale < np.abs(x.T @ x - np.diag(np.diag(x.T @ x))).max()
    users = random_clicks([0, 4, 1], 23, seed=5)
    np.testing.assert_allclose(
        EASE(train, reg)(users), users.to_dense().double().numpy() @ weight, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("make", [Popularity, ItemKNN, EASE])
def test_values_of_clicks_do_not_matter(make, train):
    counted = Clicks(train.indptr, train.indices, np.arange(1.0, train.nnz + 1), train.n_items)
    assert torch.equal(make(train)(train), make(counted)(counted))


@pytest.mark.parametrize("make", [Popularity, ItemKNN, EASE])
def test_evaluate_takes_a_baseline_in_any_blocks(make, train):
    fold_in, held_out = random_clicks([3] * 20, 23, seed=7), random_clicks([2] * 20, 23, seed=8)
    fold_in, held_out = (x.to_dense().numpy() > 0 for x in (fold_in, held_out))
    held_out = held_out & ~fold_in
    results = [evaluate(make(train), fold_in, held_out, block_size=size) for size in (3, 100)]
    assert results[0] == results[1]


def test_baselines_learn_who_likes_what():
    """Two groups of users with items of their own; popularity cannot tell them apart."""
    rng = np.random.default_rng(0)
    x = np.zeros((80, 40), bool)
    for u in range(80):
        x[u, rng.choice(20, 12, replace=False) + 20 * (u % 2)] = True
    fold_in, held_out = x[60:].copy(), x[60:].copy()
    for u in range(20):
        held_out[u, np.flatnonzero(x[60 + u])[:6]] = fold_in[u, np.flatnonzero(x[60 + u])[6:]] = (
            False
        )
    train = Clicks.from_matrix(x[:60])
    recall = {
        make.__name__: evaluate(make(train), fold_in, held_out, "recall@14")["recall@14"]
        for make in (Popularity, ItemKNN, EASE)
    }
    # fourteen items of the user's own group are left, and hold every held-out one
    assert recall["ItemKNN"] == recall["EASE"] == 1.0 and recall["Popularity"] < 0.8


def test_ease_keeps_to_its_budget(train):
    assert ease_fits(16_384) and not ease_fits(16_385)
    assert ease_fits(23, 8 * 23**2) and not ease_fits(23, 8 * 23**2 - 1)
    assert EASE(train, max_bytes=8 * 23**2).weight.shape == (23, 23)
    with pytest.raises(ValueError) as raised:
        EASE(train, max_bytes=8 * 23**2 - 1)
    assert str(raised.value) == (
        "EASE: train must have at most 22 items for max_bytes=4,231, got 23; raise max_bytes where there is memory"
    )


def test_what_the_baselines_refuse(train):
    for make in (ItemKNN, EASE):
        with pytest.raises(
            TypeError, match=rf"^{make.__name__}: train must be Clicks, got ndarray"
        ):
            make(np.eye(3))
    with pytest.raises(ValueError, match=r"^ItemKNN: n_neighbours must be at least 1, got 0$"):
        ItemKNN(train, 0)
    for reg in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^EASE: reg must"):
            EASE(train, reg)

"""Made-up clicks have the shape and the popularity asked for, and something to learn where that is asked for."""

import numpy as np
import pytest

from fastvae.synthetic import synthetic_clicks


@pytest.mark.parametrize("kind", ["flat", "latent"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((300, 200, 6000), id="plain"),
        pytest.param((40, 30, 1150), id="nearly-all-items"),
        pytest.param((40, 30, 1200), id="all-items"),
        pytest.param((40, 3, 120), id="fewer-items-than-the-minimum"),
        pytest.param((0, 10, 0), id="no-users"),
    ],
)
def test_synthetic_clicks_have_the_shape_asked_for(kind, shape):
    n_users, n_items, nnz = shape
    x = synthetic_clicks(*shape, seed=1, kind=kind)
    assert x.shape == (n_users, n_items) and x.nnz == nnz and x.values is None
    lengths = x.row_lengths()
    assert (lengths >= min(5, n_items)).all() and (lengths <= n_items).all()
    again = synthetic_clicks(*shape, seed=1, kind=kind)
    assert again.indices.tolist() == x.indices.tolist()


def test_flat_clicks_follow_the_popularity_asked_for():
    n_items, nnz, s, q = 50, 40_000, 1.7, 10.0
    x = synthetic_clicks(nnz, n_items, nnz, s=s, q=q, sigma=0.5, min_user_clicks=1)
    expected = (np.arange(1, n_items + 1) + q) ** -s
    expected *= nnz / expected.sum()
    drawn = np.sort(np.bincount(x.indices, minlength=n_items))[::-1]
    # one click a user: a multinomial draw, so the counts lie within a few square roots
    assert (abs(drawn - expected) < 6 * np.sqrt(expected)).all()


def test_latent_clicks_have_something_to_learn():
    structure = {}
    for kind in ("flat", "latent"):
        x = synthetic_clicks(2000, 300, 60_000, kind=kind).to_scipy()
        users, items = (1 / np.sqrt(x.sum(axis=axis)) for axis in (1, 0))
        x = x * items * users[:, None]
        spectrum = np.linalg.eigvalsh((x.T @ x).toarray())[::-1]
        # the first value is 1, popularity; twenty topics show in the next nineteen
        structure[kind] = spectrum[1:20].sum()
    assert structure["latent"] > 1.5 * structure["flat"], structure


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "nnz must lie below 201, got 201", {"nnz": 201}),
        (ValueError, "nnz must be at least 50, got 49", {"nnz": 49}),
        (ValueError, "kind must be one of flat, latent, got 'dense'", {"kind": "dense"}),
        (TypeError, "n_items must be a whole number, got '20'", {"n_items": "20"}),
        (ValueError, "sigma must be a finite number of at least 0, got -1", {"sigma": -1}),
        (TypeError, "s must be a number, got None", {"s": None}),
        (ValueError, "seed must be at least 0, got -1", {"seed": -1}),
    ],
)
def test_synthetic_clicks_that_do_not_fit_are_refused(error, message, arguments):
    with pytest.raises(error) as raised:
        synthetic_clicks(**{"n_users": 10, "n_items": 20, "nnz": 100, **arguments})
    assert str(raised.value) == f"synthetic_clicks: {message}"

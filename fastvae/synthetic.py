"""Made-up clicks of a real data set's shape, for timing (flat) and for learning something (latent)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._checks import check_choice, check_integer, check_number
from .clicks import Clicks


def synthetic_clicks(
    n_users: int,
    n_items: int,
    nnz: int,
    seed: int = 0,
    *,
    kind: str = "flat",
    s: float = 1.7,
    q: float | None = None,
    sigma: float = 1.1,
    min_user_clicks: int = 5,
) -> Clicks:
    """Clicks of made-up users: exactly nnz distinct (user, item) pairs.

    kind   "flat": items by popularity alone, for timing; "latent": users with tastes, so that there is something to
           learn
    s, q   popularity of the item of rank r is proportional to (r + q)**-s (Zipf-Mandelbrot); q is by default 150 at
           ML-20M's 20,108 items and in proportion elsewhere
    sigma  spread of the log-normal activity of users, each with at least min_user_clicks

    Returns Clicks [n_users, n_items]. Raises: TypeError and ValueError for arguments that do not fit.
    """
    where = "synthetic_clicks"
    sizes = {"n_users": n_users, "n_items": n_items, "min_user_clicks": min_user_clicks}
    for name, size in sizes.items():
        check_integer(where, name, size)
    check_choice(where, "kind", kind, ("flat", "latent"))
    q = 150 * n_items / 20_108 if q is None else check_number(where, "q", q, 0)
    check_number(where, "s", s)
    check_number(where, "sigma", sigma, 0)
    low, high = min(min_user_clicks, n_items) * n_users, n_users * n_items
    check_integer(where, "nnz", nnz, low, high + 1)
    rng = np.random.default_rng(check_integer(where, "seed", seed, high=None))
    popularity = rng.permutation((np.arange(n_items) + 1.0 + q) ** -s)
    popularity /= popularity.sum()
    lengths = _activity(rng, n_users, n_items, nnz, sigma, min_user_clicks)
    draw = _flat_draw(rng, popularity) if kind == "flat" else _latent_draw(rng, popularity, n_users)
    pairs = _distinct_pairs(rng, lengths, popularity, draw)
    indptr = np.searchsorted(pairs, np.arange(n_users + 1) * n_items)
    return Clicks(indptr, pairs % max(n_items, 1), None, n_items)


def _activity(rng, n_users: int, n_items: int, nnz: int, sigma: float, least: int) -> np.ndarray:
    """Log-normal clicks per user between least and n_items, int64 [n_users], that sum to nnz."""
    weights = rng.lognormal(0.0, sigma, n_users)
    low, high = 0.0, (n_items + 1) / weights.min(initial=1.0)

    def scaled(c: float) -> np.ndarray:
        return np.clip(np.floor(c * weights), min(least, n_items), n_items).astype(np.int64)

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).sum() <= nnz else (low, middle)
    lengths = scaled(low)
    while (missing := nnz - lengths.sum()) > 0:
        lengths[rng.permutation(np.flatnonzero(lengths < n_items))[:missing]] += 1
    return lengths


Draw = Callable[[np.ndarray], np.ndarray]  # users [n] -> an item for each [n]


def _categorical(rng: np.random.Generator, probabilities: np.ndarray) -> Draw:
    """Draws a column for each of the given rows of probabilities [n_rows, n], whose rows sum to one."""
    n_rows, n = probabilities.shape
    # one ascending table for all rows: row r covers [r, r + 1]
    table = (np.cumsum(probabilities, axis=1) + np.arange(n_rows)[:, None]).ravel()

    def draw(rows: np.ndarray) -> np.ndarray:
        """A column for each row id."""
        place = np.searchsorted(table, rows + rng.random(len(rows)), side="right")
        return np.clip(place - rows * n, 0, n - 1)

    return draw


def _flat_draw(rng: np.random.Generator, popularity: np.ndarray) -> Draw:
    draw = _categorical(rng, popularity[None])
    return lambda users: draw(np.zeros(len(users), np.int64))


def _latent_draw(rng: np.random.Generator, popularity: np.ndarray, n_users: int) -> Draw:
    """15% of the draws are global popularity, the others an item of a topic of the user; 30% of those hop to a mate."""
    n_topics, niche_size, n_items = 20, 12, len(popularity)
    by_niche = rng.permutation(n_items)
    place = np.argsort(by_niche)
    affinity = np.exp(5.0 * rng.standard_normal((n_items // niche_size + 1, n_topics)))
    affinity /= affinity.sum(axis=1, keepdims=True)
    topics = popularity * affinity[place // niche_size].T  # [n_topics, n_items]
    topics = np.vstack([topics / topics.sum(axis=1, keepdims=True), popularity])
    draw_topic = _categorical(rng, rng.dirichlet(np.full(n_topics, 0.05), n_users))
    draw_item = _categorical(rng, topics)

    def draw(users: np.ndarray) -> np.ndarray:
        """An item for each user id."""
        is_popular = rng.random(len(users)) < 0.15
        items = draw_item(np.where(is_popular, n_topics, draw_topic(users)))
        hops = np.flatnonzero(~is_popular & (rng.random(len(users)) < 0.3))
        start = place[items[hops]] // niche_size * niche_size
        size = np.minimum(niche_size, n_items - start)
        items[hops] = by_niche[start + rng.integers(0, size)]
        return items

    return draw


def _distinct_pairs(
    rng: np.random.Generator, lengths: np.ndarray, popularity: np.ndarray, draw: Draw
) -> np.ndarray:
    """Sorted user * n_items + item, lengths[u] distinct ones of user u: draws that repeat an item are made again."""
    n_items = len(popularity)
    done, pairs, need = [], np.zeros(0, np.int64), lengths.copy()
    for _ in range(30):
        users = np.repeat(np.arange(len(lengths)), need)
        fresh = np.sort(users * n_items + draw(users))
        pairs = np.sort(np.append(pairs, fresh), kind="stable")  # merges the two runs
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])] if len(pairs) else pairs
        owners = pairs // n_items
        owned = np.bincount(owners, minlength=len(lengths))
        need = np.where(owned > 0, lengths - owned, 0)
        complete = need[owners] == 0
        done.append(pairs[complete])
        pairs = pairs[~complete]
        if not len(pairs):
            break
    # who has nearly all items would draw repeats for ever: choose among the others by popularity
    for user in np.flatnonzero(need):
        weights = popularity + 1e-12
        begin, end = np.searchsorted(pairs, [user * n_items, (user + 1) * n_items])
        weights[pairs[begin:end] % n_items] = 0
        rest = rng.choice(n_items, need[user], replace=False, p=weights / weights.sum())
        done.append(user * n_items + rest)
    return np.sort(np.concatenate([*done, pairs]), kind="stable")

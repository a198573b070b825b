"""Two models on the same users: bootstrap intervals of their means, and a paired test of the difference.

    difference[m] = mean over users of (b[m, u] - a[m, u])
    interval      = percentiles of that mean over n_samples draws of the users, with replacement
    p_value       = of the paired t-test that the expected difference is 0

The users are the sample, so the statements are about other users of the same kind; another split of the data, or another
seed of the training, varies the means beyond that. By scipy.stats.bootstrap and ttest_rel.
Source: Smucker et al. 2007, A comparison of statistical significance tests for information retrieval evaluation (the t-test
agrees with the bootstrap and with the randomisation test); Efron and Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ._checks import check_integer, check_number
from .evaluate import Evaluation

# numbers of a batch of bootstrap samples
_BATCH = 2**22


@dataclass(frozen=True)
class Comparison:
    """One metric of two models on the same users.

    a, b                     means
    a_interval, b_interval   (low, high) of each mean
    difference, difference_interval  of b - a, user by user
    p_value                  of the paired t-test; 1 where all users have the same values in both
    n_users                  users that the means are over
    """

    a: float
    a_interval: tuple[float, float]
    b: float
    b_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p_value: float
    n_users: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, fit for JSON."""
        return asdict(self)


def compare(
    a: Evaluation,
    b: Evaluation,
    *,
    confidence: float = 0.95,
    n_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compare two evaluations of the same users, by metric name.

    >>> users, better = np.arange(4), np.array([0.5, 0.5, 1.0, 1.0])
    >>> a = Evaluation({"hit@1": 0.5}, {"hit@1": 0.0}, 4, 0, users, {"hit@1": better - 0.25})
    >>> b = Evaluation({"hit@1": 0.75}, {"hit@1": 0.0}, 4, 0, users, {"hit@1": better})
    >>> found = compare(a, b)["hit@1"]
    >>> found.difference, found.difference_interval
    (0.25, (0.25, 0.25))

    a, b        what evaluate gave for the same fold_in, held_out and metrics; coverage, which is no mean, is left out
    confidence  of the intervals, in (0, 1)
    n_samples   bootstrap samples, at least 100
    seed        of the samples: the same evaluations and seed give the same intervals
    returns     a Comparison for each metric that both have, in the order of a

    Raises: ValueError where the two are not of the same users, have no metric in common, or settings are out of range;
    TypeError for other kinds.
    """
    n_samples, seed = check_settings(confidence, n_samples, seed)
    names = _common(a, b)
    first, second = (np.stack([side.values[name] for name in names]) for side in (a, b))
    low, high = _intervals(np.stack([first, second, second - first]), confidence, n_samples, seed)
    p_values = _p_values(first, second)
    found = {}
    for m, name in enumerate(names):
        intervals = [(float(low[side, m]), float(high[side, m])) for side in range(3)]
        found[name] = Comparison(
            a=float(first[m].mean()),
            a_interval=intervals[0],
            b=float(second[m].mean()),
            b_interval=intervals[1],
            difference=float((second[m] - first[m]).mean()),
            difference_interval=intervals[2],
            p_value=float(p_values[m]),
            n_users=first.shape[1],
        )
    return found


def check_settings(confidence: float, n_samples: int, seed: int) -> tuple[int, int]:
    """n_samples and seed as plain numbers. Raises: as compare."""
    check_number("compare", "confidence", confidence, 0, 1, above=True)
    n_samples = check_integer("compare", "n_samples", n_samples, 100)
    return n_samples, check_integer("compare", "seed", seed, 0, None)


def _common(a: Any, b: Any) -> list[str]:
    """The metrics with values of users that both have."""
    for name, side in (("a", a), ("b", b)):
        if not isinstance(side, Evaluation):
            got = type(side).__name__
            raise TypeError(f"compare: {name} must be an Evaluation, got {got}")
        if side.users is None:
            raise ValueError(f"compare: {name} must hold the values of users, got none")
    if not np.array_equal(a.users, b.users):
        raise ValueError(
            f"compare: b must be of the {len(a.users):,} users of a, got {len(b.users):,} others; evaluate both on the "
            "same fold_in and held_out"
        )
    if a.clicks is not None and b.clicks is not None and a.clicks != b.clicks:
        raise ValueError(
            "compare: b must be of the fold_in and held_out of a, got others; users of another split are no pairs"
        )
    names = [name for name in a.values if name in b.values]
    common = [name for name in a.mean if name in b.mean]
    if not common:
        raise ValueError(
            f"compare: a and b must have a metric in common, got {', '.join(a.mean)} and {', '.join(b.mean)}"
        )
    if not names:
        raise ValueError(
            f"compare: a and b must have a metric with a value for each user, got {', '.join(common)}, of all users "
            "together"
        )
    return names


def _intervals(
    values: np.ndarray, confidence: float, n_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [...] of the means of values [..., n_users]; all of them by the same draws of users."""
    from scipy import stats

    n_users = values.shape[-1]
    if n_users == 1:
        return values[..., 0], values[..., 0]
    found: Any = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=n_samples,
        batch=max(1, _BATCH // values.size),
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def _p_values(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of the paired t-test for each row of [n_metrics, n_users]."""
    from scipy import stats

    difference = second - first
    is_constant = np.ptp(difference, axis=1) == 0
    # a constant has no spread to test against: no difference at all, or one in every user alike
    p_values = np.where(difference[:, 0] == 0, 1.0, 0.0)
    if not is_constant.all():
        p_values[~is_constant] = stats.ttest_1samp(difference[~is_constant], 0, axis=1).pvalue
    return p_values

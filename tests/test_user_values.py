"""The metrics of each user in a file."""

import csv

import numpy as np
import pytest
from test_evaluate import random_case

from fastvae import evaluate
from fastvae.baselines import Popularity
from fastvae.clicks import Clicks
from fastvae.user_values import write_user_values


@pytest.fixture(scope="module")
def results():
    model, fold_in, held_out = random_case()
    names, train = ["ndcg@10", "coverage@5", "novelty@3"], Clicks.from_matrix(held_out)
    return {
        "Scores": evaluate(model, fold_in, held_out, names, train=train),
        "popularity": evaluate(Popularity(train), fold_in, held_out, names, train=train),
    }


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_row_for_each_model_and_evaluated_user(results, suffix, tmp_path):
    path = tmp_path / f"users.{suffix}"
    ids = [f"user, {n}" for n in range(60)]
    assert write_user_values(path, ids, results) == 2 * 58
    if suffix == "csv":
        rows = list(csv.DictReader(path.open(newline="")))
    else:
        rows = pytest.importorskip("polars").read_parquet(path).to_dicts()
    assert list(rows[0]) == ["model", "user", "ndcg@10", "novelty@3"]
    for name, result in results.items():
        of_model = [row for row in rows if row["model"] == name]
        # users 5 and 6 cannot be evaluated
        assert [row["user"] for row in of_model] == [ids[n] for n in range(60) if n not in (5, 6)]
        for metric in ("ndcg@10", "novelty@3"):
            values = np.array([float(row[metric]) for row in of_model])
            assert (values == result.values[metric]).all()
            assert values.mean() == pytest.approx(result[metric])


def test_what_cannot_be_written(results, tmp_path):
    with pytest.raises(ValueError) as raised:
        write_user_values(tmp_path / "users.csv", ["a"] * 59, results)
    assert str(raised.value) == (
        "write_user_values: user_ids must have the ids of 60 users or more, got 59"
    )
    for path, message in (
        ("users.txt", "path must end in .csv or .parquet, got 'users.txt'"),
        ("none/users.csv", "path must be a file in an existing folder, got "),
    ):
        with pytest.raises(ValueError) as raised:
            write_user_values(tmp_path / path, ["a"] * 60, results)
        assert str(raised.value).startswith(f"write_user_values: {message}")
    model, fold_in, held_out = random_case()
    share, other = (evaluate(model, fold_in, held_out, [name]) for name in ("coverage@5", "hit@1"))
    for found, message in (
        (
            {"A": share},
            "results must have a metric with a value for each user, got coverage@5 for A",
        ),
        (
            {**results, "A": other},
            "results must be of the same metrics, got ndcg@10, novelty@3 and hit@1 for A",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            write_user_values(tmp_path / "users.csv", ["a"] * 60, found)
        assert str(raised.value) == f"write_user_values: {message}"
    assert list(tmp_path.iterdir()) == []

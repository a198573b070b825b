"""fastvae evaluate's baselines and its file of users, and fastvae compare."""

import json

import pytest
from test_cli import prepared, run, train  # noqa: F401

from fastvae import Dataset, baselines, evaluate, load_model
from fastvae.baselines import EASE, ItemKNN, Popularity
from fastvae.compare import compare

pl = pytest.importorskip("polars")


@pytest.fixture
def trained(tmp_path, run, prepared):  # noqa: F811
    """A dataset folder and two runs on it."""
    data = prepared[1]
    for name, model in (("vae", "vae"), ("dae", "dae")):
        assert train(run, data, tmp_path / name, "--model", model)[0] == 0
    return data, tmp_path / "vae", tmp_path / "dae"


def test_evaluate_measures_the_baselines_by_every_metric(trained, run, tmp_path):  # noqa: F811
    folder, vae, _ = trained
    names = ["hit@3", "novelty@5", "coverage@5"]
    options = [part for name in names for part in ("--metric", name)]
    users = tmp_path / "users.parquet"
    code, out, err = run("evaluate", vae, folder, *options, "--json", "--per-user", users)
    assert (code, err) == (0, "")
    data = Dataset.load(folder)
    models = {
        "MultiVAE": load_model(vae / "best.pt")[0],
        "popularity": Popularity(data.train),
        "item-kNN": ItemKNN(data.train),
        "EASE": EASE(data.train),
    }
    expected = {
        name: evaluate(model, *data.test, metrics=names, train=data.train)
        for name, model in models.items()
    }
    assert json.loads(out) == {name: result.to_dict() for name, result in expected.items()}
    rows = pl.read_parquet(users)
    assert rows["user"].to_list() == [*data.users_test] * 4
    for name, result in expected.items():
        assert rows.filter(model=name)["novelty@5"].to_list() == result.values["novelty@5"].tolist()
    _, out, _ = run("evaluate", vae, folder, *options, "--users", "vad")
    assert [line for line in out.splitlines() if "item-kNN" in line and "±" in line]
    coverage = expected["EASE"]["coverage@5"]
    row = next(
        line for line in run("evaluate", vae, folder, *options)[1].splitlines() if "EASE" in line
    )
    assert f"{coverage:.4f}" in row


def test_baselines_that_take_long_are_left_out_with_a_word(trained, run, monkeypatch):  # noqa: F811
    folder, vae, _ = trained

    def measured(*options):
        code, out, err = run("evaluate", vae, folder, "--json", *options)
        assert code == 0
        return list(json.loads(out))[1:], err

    assert measured("--no-baselines") == (["popularity"], "")
    for limit in ("CHEAP_ITEMS", "CHEAP_PAIRS"):
        with monkeypatch.context() as patch:
            patch.setattr(baselines, limit, 5)
            names, err = measured()
            assert names == ["popularity"] and "--baselines measures them too" in err
            assert measured("--baselines") == (["popularity", "item-kNN", "EASE"], "")
    monkeypatch.setattr(baselines, "ease_fits", lambda n_items: False)
    names, err = measured()
    assert names == ["popularity", "item-kNN"] and err.startswith("EASE is left out: 60 items take")


def test_compare_is_compare_of_both_evaluations(trained, run):  # noqa: F811
    folder, vae, dae = trained
    options = ("--metric", "ndcg@10", "--samples", 200, "--seed", 3, "--confidence", 0.5)
    code, out, err = run("compare", vae, dae, folder, *options, "--json")
    assert (code, err) == (0, "")
    data = Dataset.load(folder)
    sides = [
        evaluate(load_model(path / "best.pt")[0], *data.test, metrics="ndcg@10")
        for path in (vae, dae)
    ]
    expected = compare(*sides, n_samples=200, seed=3, confidence=0.5)["ndcg@10"]
    assert json.loads(out) == json.loads(json.dumps({"ndcg@10": expected.to_dict()}))
    _, table, _ = run("compare", vae, dae, folder, *options)
    assert "15 users in both; 50% bootstrap intervals" in table
    assert f"{expected.difference:+.4f}" in table
    validation = json.loads(run("compare", vae, dae, folder, "--users", "vad", "--json")[1])
    assert list(validation) == ["ndcg@100", "recall@20", "recall@50"]
    assert validation["recall@20"]["a"] == pytest.approx(
        evaluate(load_model(vae / "best.pt")[0], *data.validation)["recall@20"]
    )


REFUSED = [
    ("compare {vae} none {data}", "compare: run must be a run folder or a checkpoint, got nothing at none"),
    ("compare {vae} {dae} {data} --users train", "compare: --users must be test or vad, got train"),
    ("compare {vae} {dae} {data} --confidence 1", "compare: --confidence must lie in (0, 1), got 1.0"),
    # before anything is read
    ("compare {vae} {dae} none --samples 9", "compare: --samples must be at least 100, got 9"),
    ("compare {vae} {dae} {data} --samples 9", "compare: --samples must be at least 100, got 9"),
    (
        "compare {vae} {dae} {data} --metric ndcg@5 --metric coverage@5",
        "compare: --metric must have a value for each user, got coverage@5, which is of all users together",
    ),
    (
        "evaluate {vae} {data} --per-user u.txt",
        "evaluate: --per-user must end in .csv or .parquet, got 'u.txt'",
    ),
    (
        "evaluate {vae} {data} --metric coverage@5 --per-user u.csv",
        "evaluate: --metric must have a metric with a value for each user, got coverage@5 for MultiVAE",
    ),
    ("evaluate {vae} {data} --metric auc@5", "evaluate: --metric must be names like 'ndcg@100'"),
]  # fmt: skip


def test_what_the_commands_refuse(trained, run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    data, vae, dae = (path.name for path in trained)
    for typed, message in REFUSED:
        arguments = typed.format(data=data, vae=vae, dae=dae).split()
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith(f"fastvae: {message}"), typed
